"""Which claims of the papers held, computed from what bench/tables.py measured, as JSON, text and plots.

Nothing here is typed in: a verdict follows from the numbers of two rows and the margins below, and a row that was not
run is said to be not run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asdm_core.architecture import Architecture
from asdm_core.measure import costs, total
from train.emoji.unet import CONFIG

# A difference counts from here on: for v-MSE and kernel distance as a share of the smaller, for PSNR in dB, for
# accuracy in standard errors of the difference over prompts. And from twice the standard error over training seeds on,
# where one of the two rows has several; the larger spread is taken for both.
MARGINS = {"v_mse_teacher": 0.05, "v_mse_data": 0.02, "kid": 0.2, "psnr": 0.2, "accuracy": 2.0}
HIGHER = ("psnr", "accuracy")
NEAR = ("v_mse_teacher", "psnr")  # how near to the teacher
GOOD = ("v_mse_data", "accuracy", "kid")  # how good, whoever drew it: these can be better than the teacher's
NAMES = {
    "v_mse_teacher": "v-MSE to the teacher",
    "v_mse_data": "v-MSE to the data",
    "kid": "kernel distance",
    "psnr": "PSNR",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Claim:
    """That one row is better than another, in all of some metrics."""

    text: str
    source: str
    better: str
    worse: str
    metrics: tuple[str, ...] = NEAR


CLAIMS = (
    Claim("M2 is better than the original", "A-SDM, Table 2", "m2", "whole", GOOD),
    Claim("M2 is better than the original trained on for as long as its stage 2", "control", "m2", "teacher-on", GOOD),
    Claim("M2 is better than Base, which learned from as many samples", "A-SDM, Table 2", "m2", "base-on"),
    Claim("M2 is better than the Base it began with", "A-SDM, Table 2", "m2", "base"),
    Claim("M1 is better than the Base it began with", "A-SDM, Table 2", "m1", "base"),
    Claim("M2 is better than M1", "A-SDM, Table 2", "m2", "m1", GOOD),
    Claim("M1 is better than M3", "A-SDM, Table 2", "m1", "m3"),
    Claim("M2 with the original frozen is better than unfrozen (M5), equal samples", "A-SDM, Table 2", "m2", "m5"),
    Claim("the same, equal seconds", "control", "m2", "m5-seconds"),
    Claim("M1 with the original frozen is better than unfrozen (M4), equal samples", "A-SDM, Table 2", "m1", "m4"),
    Claim(
        "stage 1 helps M2: better than stage 2 alone for as many samples in all",
        "A-SDM, section 2.2",
        "m2",
        "m2-direct",
    ),
    Claim("the loss at the mid block helps M2", "A-SDM, section 2.5", "m2-mid", "m2"),
    Claim("features of a frozen network (here the classifier's) help M2", "A-SDM, section 2.5", "m2-features", "m2"),
    Claim("both together are better than the mid block alone", "A-SDM, section 2.5", "m2-both", "m2-mid"),
    Claim(
        "the losses of the blocks are better for M2 than the denoising loss and that of the mid block",
        "ours, against A-SDM",
        "m2",
        "m2-paper",
    ),
    Claim("Base learns more without the denoising loss", "ours, against BK-SDM", "base", "base-task"),
    Claim("distillation helps M2: better than without, as many samples", "BK-SDM", "m2-direct", "m2-alone"),
    Claim("M1 by distillation is better than without, as many samples", "BK-SDM", "m1", "m1-alone"),
    Claim("M3 by distillation is better than without, as many samples", "BK-SDM", "m3", "m3-alone"),
    Claim("distillation helps Base", "BK-SDM", "base", "base-alone"),
    Claim("distillation helps Small", "BK-SDM", "small", "small-alone"),
    Claim("distillation helps Tiny", "BK-SDM", "tiny", "tiny-alone"),
    Claim("CondConv e2 helps Tiny: better than Tiny trained on for as long", "A-SDM, Table 1", "tiny-e2", "tiny-on"),
    Claim("it is the routing: better than with a frozen router (Tiny)", "control", "tiny-e2", "tiny-e2-fixed"),
    Claim("CondConv e2 helps Small", "A-SDM, Table 1", "small-e2", "small-on"),
    Claim("it is the routing (Small)", "control", "small-e2", "small-e2-fixed"),
    Claim("CondConv e2 does not help Base: Base trained on is better", "A-SDM, Table 1", "base-on", "base-e2"),
    Claim("experts of the original's layers (CLME) help Tiny", "A-SDM, section 2.3", "tiny-clme", "tiny-on"),
    Claim("experts of the original's layers (CLME) help Small", "A-SDM, section 2.3", "small-clme", "small-on"),
    Claim(
        "first Base, then the original (S1) is better than the other way round (S2), equal MACs",
        "A-SDM, Table 3",
        "base-whole-0.4",
        "whole-base-0.6",
        ("psnr", "accuracy", "kid"),
    ),
    Claim("S1 is better than S3", "A-SDM, Table 3", "base-whole-0.4", "whole-base-0.4", ("psnr", "accuracy", "kid")),
)


def margin(metric: str) -> str:
    """The margin of a metric, in words."""
    unit = {"psnr": " dB", "accuracy": " standard errors"}.get(metric, " of the value")
    return f"{NAMES[metric]} {MARGINS[metric]:g}{unit}"


# Rows -----------------------------------------------------------------------------------------------


def flat(measured: Mapping) -> dict[str, float]:
    """The numbers of one measurement under the names of the tables."""
    found = {"accuracy": measured["top1"], "accuracy_se": measured["top1_se"]}
    found |= {
        k: measured[k]
        for k in ("psnr", "psnr_se", "ssim", "border", "grad", "kid", "fed", "fed_glyphs", "mse", "latent_mse")
        if k in measured
    }
    if "v_mse" in measured:
        found |= {"v_mse_teacher": measured["v_mse"]["teacher"]["all"], "v_mse_data": measured["v_mse"]["data"]["all"]}
    return found


def read(folder: Path, host: str, name: str, seeds: Sequence[int] | None) -> list[dict] | None:
    """The measurements of a row, one for each training seed that is finished; None where there is none."""
    names = [name] if seeds is None else [f"{name}-s{seed}" for seed in seeds]
    paths = [folder / f"{host}-{n}.json" for n in names]
    return [json.loads(path.read_text()) for path in paths if path.exists()] or None


def row(measurements: Sequence[Mapping], gap_from: Mapping | None = None) -> dict:
    """Means over the training seeds and, from two on, the standard deviation over these ("..._sd")."""
    values = [
        flat(m) | ({"gap_recovered": 1 - m["mse"] / gap_from["mse"]} if gap_from and "mse" in m else {})
        for m in measurements
    ]
    found = {"seeds": len(values), "pictures": measurements[0]["pictures"]}
    for key in values[0]:
        numbers = [v[key] for v in values]
        found[key] = statistics.mean(numbers)
        if len(numbers) > 1 and not key.endswith("_se"):
            found[f"{key}_sd"] = statistics.stdev(numbers)
    return found


def macs_share(architecture: Architecture) -> float:
    """MACs relative to the original's, at this family's size."""

    def count(a: Architecture) -> int:
        return total(costs(a, 16, 16)).total

    return count(architecture) / count(Architecture.full(CONFIG))


# Verdicts -------------------------------------------------------------------------------------------


def compare(metric: str, a: Mapping, b: Mapping) -> tuple[int, float]:
    """1 where a is better than b by more than the margin, -1 where worse, 0 else; and the difference a - b."""
    difference = a[metric] - b[metric]
    margin = MARGINS[metric]
    if metric == "accuracy":
        margin *= math.hypot(a["accuracy_se"], b["accuracy_se"])
    elif metric != "psnr":
        margin *= min(abs(a[metric]), abs(b[metric]))
    spread = max((row[f"{metric}_sd"] for row in (a, b) if f"{metric}_sd" in row), default=0.0)
    margin = max(margin, 2 * spread * math.hypot(a["seeds"] ** -0.5, b["seeds"] ** -0.5))
    if abs(difference) <= margin:
        return 0, difference
    return (1 if (difference > 0) == (metric in HIGHER) else -1), difference


def verdict(claim: Claim, rows: Mapping[str, Mapping]) -> dict:
    """Held: better in at least one metric and worse in none. Did not hold: the reverse. Else mixed, or no
    difference.
    """
    base = {"claim": claim.text, "source": claim.source, "better": claim.better, "worse": claim.worse}
    missing = [name for name in (claim.better, claim.worse) if name not in rows]
    if missing:
        return base | {"verdict": "not run", "missing": missing}
    a, b = rows[claim.better], rows[claim.worse]
    metrics = [m for m in claim.metrics if m in a and m in b]  # the original has no PSNR to itself
    found = {m: compare(m, a, b) for m in metrics}
    signs = {sign for sign, _ in found.values()}
    word = (
        "held"
        if signs <= {0, 1} and 1 in signs
        else "did not hold"
        if signs <= {0, -1} and -1 in signs
        else "no difference"
        if signs == {0}
        else "mixed"
    )
    return base | {
        "verdict": word,
        "differences": {m: difference for m, (_, difference) in found.items()},
        "signs": {m: sign for m, (sign, _) in found.items()},
        "seeds": min(a["seeds"], b["seeds"]),
    }


# More samples ---------------------------------------------------------------------------------------

# What the packs in models/ learned from in stage 2: 12,000, and 118,400 in each further stretch (models/README.md).
SHIPPED_SAMPLES = {"m1": 367_200, "m2": 485_600}


def of_seeds(rows: Sequence[Mapping], name: str, samples: int) -> dict[str, float]:
    """Mean PSNR over training seeds, as "", and from two on its standard deviation, as "_sd"."""
    values = [r["psnr"] for r in rows if r["part"] == "samples" and (r["row"], r["samples"]) == (name, samples)]
    return {"": statistics.mean(values)} | ({"_sd": statistics.stdev(values)} if len(values) > 1 else {})


def grown(rows: Sequence[Mapping]) -> list[str]:
    """Of rows of bench/longer.py, part "samples", those that were trained from several numbers of samples."""
    counts = {row["row"]: {r["samples"] for r in rows if r["row"] == row["row"]} for row in rows}
    return [name for name, its in counts.items() if len(its) > 1]


# Plots ----------------------------------------------------------------------------------------------


def _axes(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    axes.grid(True, alpha=0.3)
    return figure, axes


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def plot_rows(path: Path, rows: Mapping[str, Mapping]) -> None:
    """v-MSE to the teacher of every trained row, best first."""
    found = sorted(
        ((r["v_mse_teacher"], r.get("v_mse_teacher_sd", 0), name) for name, r in rows.items() if "samples" in r),
        reverse=True,
    )
    figure, axes = _axes(7, 0.6 + 0.24 * len(found))
    axes.barh([name for *_, name in found], [value for value, *_ in found], xerr=[sd for _, sd, _ in found])
    axes.set(xlabel="v-MSE to the teacher (less is nearer)")
    _save(figure, path)


def plot_timesteps(path: Path, bins: Mapping[str, Mapping[str, float]]) -> None:
    """v-MSE to the teacher by bins of t, for some rows."""
    figure, axes = _axes(7, 4)
    for name, values in bins.items():
        points = {k: v for k, v in values.items() if k != "all"}
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(xlabel="timestep (noise grows to the right)", ylabel="v-MSE to the teacher", yscale="log")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_switching(path: Path, rows: Mapping[str, Mapping], macs: Mapping[str, float]) -> None:
    """Quality against MACs for both orders of switching."""
    figure, axes = _axes(7, 4)
    for order, label in (
        (("base", "whole"), "first Base, then the original"),
        (("whole", "base"), "first the original, then Base"),
    ):
        points = sorted((macs[name], rows[name]["psnr"], name) for name in rows if name.startswith("-".join(order)))
        if points:
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], marker="o", label=label)
            for x, y, name in points:
                axes.annotate(name.rsplit("-", 1)[1], (x, y), fontsize=8, xytext=(3, 3), textcoords="offset points")
    if "base" in rows:
        axes.plot([macs["base"]], [rows["base"]["psnr"]], "k*", label="Base alone")
    axes.set(xlabel="MACs relative to the original's", ylabel="PSNR to the original, dB")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_samples(path: Path, rows: Sequence[Mapping]) -> None:
    """PSNR of packs against the samples of a stage, every training seed, and the packs in models/."""
    figure, axes = _axes(7, 4)
    shipped = {row["row"]: row["psnr"] for row in rows if row["part"] == "noises"}
    rows = [row for row in rows if row["part"] == "samples"]
    places = {row["samples"] for row in rows if row["row"] in grown(rows)}
    for number, name in enumerate(grown(rows)):
        its = [row for row in rows if row["row"] == name]
        counts = sorted({row["samples"] for row in its})
        colour = f"C{number}"
        axes.plot(counts, [of_seeds(its, name, n)[""] for n in counts], color=colour, label=name.upper())
        axes.plot([row["samples"] for row in its], [row["psnr"] for row in its], "o", color=colour)
        if name in shipped:
            axes.plot([SHIPPED_SAMPLES[name]], [shipped[name]], "*", color=colour, markersize=11)
            places.add(SHIPPED_SAMPLES[name])
    axes.set(xscale="log", xlabel="samples of a stage (a star: in models/)", ylabel="PSNR to the original, dB")
    axes.minorticks_off()
    axes.set_xticks(sorted(places), [f"{place:,}" for place in sorted(places)], rotation=45, ha="right")
    axes.legend(fontsize=8)
    _save(figure, path)
