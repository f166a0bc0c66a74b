"""docs/evidence.md: the text of bench/tables.py, and the sections of fewstep.py, style.py and longer.py in it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench._evidence import NAMES, SHIPPED_SAMPLES, grown, of_seeds
from train.emoji.compare import REFERENCE

TABLES = {
    "Table 1: students of stage 1, with further experts": (
        "shipped-small",
        "shipped-tiny-e2",
        "base",
        "base-task",
        "base-on",
        "base-e2",
        "base-clme",
        "small",
        "small-on",
        "small-e2",
        "small-e2-fixed",
        "small-clme",
        "tiny",
        "tiny-on",
        "tiny-e2",
        "tiny-e2-fixed",
        "tiny-clme",
    ),
    "Table 2: combined UNets": (
        "shipped-m1",
        "shipped-m2",
        "base",
        "m1",
        "m2",
        "m3",
        "m4",
        "m5",
        "m5-seconds",
        "m2-paper",
        "m2-mid",
        "m2-features",
        "m2-both",
    ),
    "Controls": (
        "teacher-on",
        "m2-direct",
        "m2-alone",
        "m1-alone",
        "m3-alone",
        "base-alone",
        "small-alone",
        "tiny-alone",
    ),
}


PAGE = """\
# What the papers claim, tried at emoji scale

Written by `bench/tables.py` from its measurements (`bench/results/tables.json`); nothing is typed in by hand. The \
numbers compare techniques with each other on the small [emoji family](../models/README.md). **They say nothing \
absolute about SD1.5.**

- Each run of one stage learned from {samples:,} samples, equal for all: the same samples in the same order, batch \
{batch}, learning rate {lr:g}. That is very little: all rows are far from converged, and a claim about long training \
is not refuted by them. The rows "in models/" are not part of the comparison: they are the weights that ship, made by \
the same recipes ([models/README.md](../models/README.md) says with how many samples).
- {finished} of {runs} runs are finished; {spread}. Pictures are not counted as n.
- Measured on {pictures} pictures of each row ({prompts} plain prompts, {steps} DDIM steps, CFG {cfg:g}), drawn from \
the same noises in every row, and on {fixed} fixed inputs (v-MSE). PSNR and SSIM are to the original's picture from \
the same noise; border (how muddy the ground is) and grad (sharpness, in proportion to the original's) stand where a \
row was measured since they are. Accuracy is the emoji classifier's top-1. KID is the unbiased kernel distance of its \
features to real glyphs{frechet}.
- Distances to the teacher punish a network that is better than it; accuracy, KID and the v-MSE to the data do not.
- A verdict needs a difference above a margin: {margins}{chance}.
- "samples" and "s" (seconds of training) include the stage before. The teacher's outputs were computed once and are \
not counted.{notes}
{trained_on}
## Claims

{claims}

![v-MSE to the teacher of all rows](evidence-rows.png)

## The original and what is merely cut

{cut}

{tables}

![v-MSE to the teacher by timestep](evidence-timesteps.png)

## Table 3: two UNets in one sampling run

Rows differ in MACs, so they are drawn against them and not ranked alone. The paper's S1 is Base for 10 of 25 steps, \
then the original; S2 the original for 15, then Base; S3 the original for 10, then Base.

{switches}

![PSNR against MACs](evidence-switching.png)

## Transfer: packs in the OpenMoji finetune they never saw

PSNR, SSIM and the gap are to the finetune's own pictures.

{transfer}

## Not tried here

- VGG: where A-SDM has it, the rows with features of a frozen network have the family's own classifier, at one weight.
- Held-out pairs of emoji and style or background; see [models/README.md](../models/README.md) for the shipped pack.

## Doing it again

```
{command}
```

The same command goes on where it stopped; more `--seeds` add training seeds of the key rows, more `--rounds` add \
pictures.
"""


def switch_title(switch: tuple[str, str, float]) -> str:
    first, second = (name.replace("whole", "the original") for name in switch[:2])
    in_the_paper = {("base", 0.4): " (S1)", ("whole", 0.6): " (S2)", ("whole", 0.4): " (S3)"}
    return f"{first} for {switch[2]:.0%}, then {second}{in_the_paper.get((switch[0], switch[2]), '')}"


def said_of_the_spread(seeds: int) -> str:
    if seeds == 1:
        return (
            "every row is **one** training run, so nothing here knows the spread over training seeds; small "
            "differences may be chance"
        )
    return (
        f"the standard deviation over {seeds} training seeds is in brackets where a row has several; the others are "
        "**one** training run"
    )


def said_of_chance(seeds: int) -> str:
    if seeds == 1:
        return ". With one training seed nobody knows what chance can do; these are guesses"
    return (
        ", and one above twice the standard error over training seeds, where one of the two rows has several; "
        "elsewhere nobody knows what chance can do"
    )


def said_of_the_frechet_distance(original: dict) -> str:
    if "fed_glyphs" not in original:
        return ""
    return (
        ", FED their Frechet distance. Few pictures bias that upwards, all rows alike: as many real glyphs (or "
        f"{REFERENCE // 2:,}) get {original['fed_glyphs']:.1f}"
    )


def said_of_training_on(rows: dict[str, dict]) -> str:
    """A line where the original became worse by more training."""
    if "teacher-on" not in rows or rows["teacher-on"]["v_mse_data"] <= rows["whole"]["v_mse_data"]:
        return ""
    return (
        f"- The original trained on went from {rows['whole']['v_mse_data']:.4f} to "
        f"{rows['teacher-on']['v_mse_data']:.4f} in v-MSE to the data: at this learning rate so few samples make a "
        "finished network worse before they could make it better.\n"
    )


# Text -----------------------------------------------------------------------------------------------

COLUMNS = (
    ("samples", "samples", "{:,.0f}"),
    ("seconds", "s", "{:.0f}"),
    ("v_mse_teacher", "v-MSE to teacher", "{:.4f}"),
    ("v_mse_data", "v-MSE to data", "{:.4f}"),
    ("psnr", "PSNR", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("border", "border", "{:.4f}"),
    ("grad", "grad", "{:.2f}"),
    ("gap_recovered", "gap recovered", "{:.2f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("kid", "KID", "{:.3f}"),
    ("fed", "FED", "{:.1f}"),
)


def table(
    rows: Mapping[str, Mapping], chosen: Sequence[tuple[str, str]], macs: Mapping[str, float] | None = None
) -> list[str]:
    """A Markdown table of (name, what it is); a row without numbers was not run."""
    columns = [c for c in COLUMNS if any(c[0] in rows.get(name, ()) for name, _ in chosen)]
    lines = [
        f"| row | {'MACs | ' if macs else ''}{' | '.join(title for _, title, _ in columns)} |",
        "|---" * (1 + len(columns) + bool(macs)) + "|",
    ]
    for name, what in chosen:
        found = rows.get(name)
        if found is None:
            cells = ["not run"] + [""] * (len(columns) - 1)
        else:
            cells = []
            for key, _, form in columns:
                text = form.format(found[key]) if key in found else ""
                cells.append(text + (f" ({form.format(found[f'{key}_sd'])})" if f"{key}_sd" in found else ""))
        lines.append(f"| {what} | {f'{macs[name]:.2f} | ' if macs else ''}{' | '.join(cells)} |")
    return lines


def differences(found: Mapping) -> str:
    """How two rows differ, in words."""
    parts = []
    for metric, difference in found["differences"].items():
        number = (
            f"{difference:+.2f} dB"
            if metric == "psnr"
            else f"{difference:+.1%}"
            if metric == "accuracy"
            else f"{difference:+.4f}"
        )
        parts.append(f"{NAMES[metric]} {number}" + {1: " (better)", -1: " (worse)", 0: ""}[found["signs"][metric]])
    return "; ".join(parts)


def claims_text(verdicts: Sequence[Mapping]) -> list[str]:
    lines = ["| claim | from | verdict | difference |", "|---|---|---|---|"]
    for v in verdicts:
        detail = (
            f"missing: {', '.join(v['missing'])}"
            if "missing" in v
            else f"`{v['better']}` - `{v['worse']}`: {differences(v)}"
        )
        lines.append(f"| {v['claim']} | {v['source']} | **{v['verdict']}** | {detail} |")
    return lines


# Few steps ------------------------------------------------------------------------------------------

FEW = "## Few steps without guidance"
FEW_ROWS = {
    "ddim_20": "the original, 20 steps of ddim, CFG 3",
    **{f"teacher_{n}": f"the original, {n} step{'s'[: n > 1]} of dpmpp_2m, CFG 3" for n in (4, 3, 2, 1)},
    "three_steps_lora": "LoRA, 3 steps (not in models/)",
    "two_steps_lora": "LoRA in models/, 2 steps",
    "two_steps_lora_m2": "the same with M2 in models/, not trained together",
    "two_steps_m2": "the same with M2 for two steps in models/, which learned beneath it",
    "one_step": "LoRA, 1 step (not in models/)",
}


def with_few_steps(page: str, found: Mapping) -> str:
    """docs/evidence.md with its section on few steps made anew. found: bench/results/fewstep.json."""
    rows = {row["row"]: row for row in found["rows"]}
    lines = [
        "PSNR to the original's pictures of 20 steps, over all plain prompts, from several noises each where there are "
        "more than 360. `border`: how muddy the ground is. "
        "`grad`: sharpness, in proportion to the 20 steps'. How each was trained: "
        "[two steps for twenty](few_steps.md).",
        "",
        "| row | pictures | forwards | fewer multiplications | PSNR | border | grad | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, what in FEW_ROWS.items():
        if (row := rows.get(name)) is None:
            lines.append(f"| {what} | | | | not run | | | |")
            continue
        quality = f"{row['psnr']:.2f} +- {row['psnr_se']:.2f}" if "psnr" in row else ""
        numbers = f"{row['factor']:.1f} x | {quality} | {row['border']:.4f} | {row['grad']:.2f} | {row['top1']:.1%}"
        lines.append(f"| {what} | {row['pictures']:,} | {row['forwards']} | {numbers} |")
    return with_section(page, FEW, [*lines, "", "`python bootstrap.py bench NAME=fewstep` makes this section anew."])


# Style ----------------------------------------------------------------------------------------------

STYLE = "## Style: what a pack leaves of a finetune's"
STYLE_ROWS = {
    "style_openmoji_3": "the finetune itself, 3 steps",
    "style_openmoji_2": "the finetune itself, 2 steps",
    "style_m1_absolute": "M1 in models/, its own units",
    "style_m1_difference": "M1 as a difference",
    "style_m2_absolute": "M2, its own units",
    "style_m2_difference": "M2 as a difference",
    "style_m2_styles": "M2 in models/, a difference that carries over what cut units have",
    "style_m2_fitted_1min": "M2 in models/, fitted for 1 minute of one core",
    "style_m2_fitted_3min": "M2 in models/, fitted for 3 minutes",
    "style_m2_fitted_3min_any": "M2 in models/, fitted for 3 minutes for runs of any number of steps",
    "style_m2_fitted_10min": "M2 in models/, fitted for 10 minutes",
    "style_m2_from_second": "M2 in models/ from the second step on, the first by the finetune itself",
    "style_m2_fitted_3min_from_second": "the same, fitted for 3 minutes",
    "style_2_steps_lora": "the two-step LoRA on the whole finetune",
    "style_2_steps_lora_m2_difference": "the two-step LoRA and M2 in models/",
    "style_teacher_3": "in the teacher: itself, 3 steps",
    "style_teacher_m2_absolute": "in the teacher: M2, its own units",
    "style_teacher_m2_difference": "in the teacher: M2 as a difference",
    "style_teacher_m2_styles": "in the teacher: M2 in models/",
}


def with_style(page: str, found: Mapping) -> str:
    """docs/evidence.md with its section on style made anew. found: bench/results/fewstep.json."""
    rows = {row["row"]: row for row in found["rows"]}
    lines = [
        "In OpenMoji, a finetune that no training of these packs and no choice of a setting ever saw: PSNR to the "
        "finetune's own pictures of 4 steps (dpmpp_2m, simple, CFG 3) from the same noise, `grad` the mean difference "
        "of neighbouring pixels in proportion to theirs, accuracy by the family's classifier. Packs are drawn with 3 "
        "steps of the same, for which they were fitted if nothing else is said, the two-step LoRA with 2 without "
        "guidance. The last rows are in the teacher, against its own 4 steps.",
        "",
        "| row | forwards | PSNR | grad | accuracy |",
        "|---|---|---|---|---|",
    ]
    for name, what in STYLE_ROWS.items():
        if (row := rows.get(name)) is not None:
            error = f" +- {row['psnr_se']:.2f}" if "psnr_se" in row else ""
            numbers = f"{row['psnr']:.2f}{error} | {row['grad']:.2f} | {row['top1']:.1%}"
            lines.append(f"| {what} | {row['forwards']} | {numbers} |")
        else:
            lines.append(f"| {what} | | not run | | |")
    if (speed := rows.get("fit_speed")) is not None:
        lines += [
            "",
            f"A fit makes {speed['share']:.2f} of the samples in a CPU second that a bare step of teacher and student "
            "makes.",
        ]
    picture = "The finetune's own 4 steps, then the first rows of the table, in its order as they were drawn"
    lines += ["", f"![{picture}](evidence-style.jpg)", ""]
    return with_section(page, STYLE, [*lines, "`python bootstrap.py bench NAME=style` makes this section anew."])


def with_section(page: str, heading: str, lines: Sequence[str]) -> str:
    """docs/evidence.md with a section made anew, or put before the last one but one."""
    made = "\n".join([heading, "", *lines, ""]) + "\n"
    before, _, rest = page.partition(f"{heading}\n")
    if rest:
        return before + made + rest[rest.index("\n## ") + 1 :]
    before, last, after = page.partition("## Not tried here")
    return before + made + last + after


# More samples ---------------------------------------------------------------------------------------

LONGER = "## More samples, and what chance does"


ROLLOUTS = {
    "own_states": "its own states, many trajectories",
    "few_trajectories": "the same, few trajectories",
    "teacher_states": "the states of the teacher's trajectory",
    "pairs": "states between its noise and its picture (Rectified Diffusion)",
    "guidance_alone": "as many steps as the teacher: guidance alone",
}


def _key_rows(rows: Sequence[Mapping]) -> list[str]:
    """A table of those that have several training seeds."""
    of: dict[tuple[str, int], list[Mapping]] = {}
    for row in rows:
        of.setdefault((row["what"], row["samples"]), []).append(row)
    several = {key: its for key, its in of.items() if len(its) > 1}
    if not several:
        return []
    lines = [
        "The key rows of the tables above from as many samples as the last of these columns, each trained with several "
        "seeds: means over them, with the standard deviation in brackets.",
        "",
        "| row | samples | seeds | pictures | PSNR | border | grad | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (what, samples), its in several.items():
        cells = []
        for key, form in (("psnr", ".2f"), ("border", ".4f"), ("grad", ".3f"), ("accuracy", ".1%")):
            values = [row[key] for row in its]
            cells.append(f"{statistics.mean(values):{form}} ({statistics.stdev(values):{form}})")
        pictures = " or ".join(str(n) for n in sorted({row["pictures"] for row in its}))
        lines.append(f"| {what} | {samples:,} | {len(its)} | {pictures} | {' | '.join(cells)} |")
    return [*lines, ""]


def with_longer(page: str, rows: Sequence[Mapping]) -> str:
    """docs/evidence.md with its section on more samples made anew. rows: those of bench/results/longer.json."""
    parts = {part: [row for row in rows if row["part"] == part] for part in ("samples", "noises", "rollouts")}
    lines: list[str] = []
    if parts["samples"]:
        packs = grown(parts["samples"])
        counts = sorted({row["samples"] for row in parts["samples"] if row["row"] in packs})
        lines += [
            "M1 and M2, both stages by the recipes and settings of the tables above, from so many samples a stage: "
            "PSNR to the original's pictures, with the standard deviation over training seeds in brackets where there "
            "are several. The packs in models/ learned by another optimiser in their later stretches, and M2 in its "
            "last one from captions that are mostly the plain name, as those it is measured with.",
            "",
            f"| samples of a stage | {' | '.join(f'{count:,}' for count in counts)} | in models/ |",
            f"|{'---|' * (len(counts) + 2)}",
        ]
        shipped = {row["row"]: row for row in parts["noises"]}
        for name in packs:
            its = [of_seeds(rows, name, count) for count in counts]
            cells = [f"{v['']:.2f}" + (f" ({v['_sd']:.2f})" if "_sd" in v else "") for v in its]
            last = f"{shipped[name]['psnr']:.2f} after {SHIPPED_SAMPLES[name]:,}" if name in shipped else ""
            lines.append(f"| {name.upper()} | {' | '.join(cells)} | {last} |")
        lines += ["", "![PSNR against samples, on a logarithmic axis](evidence-samples.png)", ""]
        lines += _key_rows([row for row in parts["samples"] if "what" in row])
    if parts["noises"]:
        row = parts["noises"][0]
        lines += [
            f"The files in models/, with pictures from the noises of {row['noises']} seeds: mean, standard deviation "
            "over these seeds, and each. What a row above gets from one seed of noise is known no better than that.",
            "",
            "| file | PSNR | each |",
            "|---|---|---|",
        ]
        for row in parts["noises"]:
            each = ", ".join(f"{value:.2f}" for value in row["each"])
            lines.append(f"| {row['row'].replace('_', ' ')} | {row['psnr']:.2f} ({row['psnr_sd']:.2f}) | {each} |")
        lines.append("")
    if parts["rollouts"]:
        lines += [
            "Ways of rollout: LoRAs without guidance, all from as many samples, measured as few steps are.",
            "",
            "| way | steps | trajectories | each walked | PSNR | border | grad | accuracy |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(parts["rollouts"], key=lambda row: list(ROLLOUTS).index(row["row"])):
            learned = f"{row['steps']} | {row['trajectories']:,} | {row['uses']} times"
            numbers = f"{row['psnr']:.2f} +- {row['psnr_se']:.2f} | {row['border']:.4f} | {row['grad']:.2f}"
            lines.append(f"| {ROLLOUTS[row['row']]} | {learned} | {numbers} | {row['top1']:.1%} |")
        lines += ["", f"Each from {parts['rollouts'][0]['samples']:,} samples.", ""]
    return with_section(page, LONGER, [*lines, "`python bootstrap.py bench NAME=longer` makes this section anew."])
