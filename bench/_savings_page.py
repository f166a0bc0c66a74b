"""The part "Measured" of docs/forecasts.md and its plot, from the rows of part "runs" of bench/inheritance.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import _savings
from bench._common import at_saving, pyplot, upper_edge
from bench._savings import DETERMINISTIC, FEWER, OURS, PEERS, RUNS, UNCALIBRATED, Whole

HEADING = "## Measured"
LIKENESS = ("same to the eye", "close", "same motif")
GOALS = {
    "saving_at_35db_euler20_cfg3": (0.70, "saved at 35 dB: euler, 20 steps, CFG 3"),
    "saving_at_44db_euler50_cfg3": (0.80, "saved at 44 dB: euler, 50 steps, CFG 3"),
    "saving_at_32db_dpmpp_2m20_cfg7": (0.50, "saved at 32 dB: dpmpp_2m, 20 steps, CFG 7"),
    "lead_over_fewer_steps_db": (6.0, "least lead over fewer steps at 40% and 50% saved"),
    "lead_over_best_peer_db": (0.0, "least lead over the best of the other ways, where they were measured"),
}
COLOURS = {OURS: "#d1495b", UNCALIBRATED: "#e8a33d", FEWER: "#2b59c3", "others": "#8a94a6"}


def in_words(run: Whole) -> str:
    begins = "" if run.denoise == 1 else f", denoise {run.denoise:g}"
    flow = ", flow matching" if run.flow else ""
    return f"{run.sampler}, {run.scheduler}, {run.steps} steps, CFG {run.cfg:g}{begins}{flow}"


def _of(rows: Sequence[Mapping], run: str, method: str) -> list[Mapping]:
    return [row for row in rows if (row["run"], row["method"]) == (run, method) and "psnr" in row]


def _quality(row: Mapping) -> str:
    return f"{row['psnr']:.1f} dB ({row['psnr_least']:.1f})"


def _at(rows: Sequence[Mapping], saved: float) -> Mapping | None:
    """The best row with at least so much saved."""
    return max((r for r in rows if r["saved"] >= saved - 1e-3), key=lambda r: r["psnr"], default=None)


def _near(rows: Sequence[Mapping], saved: float) -> Mapping | None:
    return min(rows, key=lambda r: abs(r["saved"] - saved), default=None)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _dial(rows: Sequence[Mapping]) -> Iterator[list[str]]:
    for name, run in RUNS.items():
        found = {r["setting"]: r for r in _of(rows, name, UNCALIBRATED)}
        if all(likeness in found for likeness in LIKENESS):
            yield [in_words(run), *(f"{found[one]['saved']:.0%}: {_quality(found[one])}" for one in LIKENESS)]


def _beside(rows: Sequence[Mapping]) -> Iterator[list[str]]:
    for name, run in RUNS.items():
        for saved in (0.4, 0.5) if run.sampler in DETERMINISTIC else (0.2,):
            ours, without = (_at(_of(rows, name, method), saved) for method in (OURS, UNCALIBRATED))
            fewer = _near(_of(rows, name, FEWER), saved)
            if ours and without and fewer:
                yield [in_words(run), f"{saved:.0%}", *(_quality(r) for r in (ours, without, fewer))]


def _peers(rows: Sequence[Mapping]) -> Iterator[list[str]]:
    for name, run in RUNS.items():
        saved = 0.4 if run.sampler in DETERMINISTIC else 0.2
        found: list[str] = []
        for method in (OURS, UNCALIBRATED, *PEERS, "dial"):
            points = [(r["saved"], r["psnr"]) for r in _of(rows, name, method)]
            found.append(_read_off(points, saved))
        if any(found[2:]):
            yield [in_words(run), f"{saved:.0%}", *found]


def _read_off(points: list[tuple[float, float]], saved: float) -> str:
    """Likeness at a saving, in words; of settings that all save more, that of the best, and how much it saves."""
    if not points:
        return ""
    value = at_saving(points, saved)
    if value is None:
        return "not reached"
    least, _ = upper_edge(points)[0]
    return f"{value:.1f} dB" + (f" (at {least:.0%})" if least > saved + 0.005 else "")


def _goals(summary: Mapping[str, float]) -> Iterator[list[str]]:
    for key, (goal, what) in GOALS.items():
        values = [summary.get(prefix + key) for prefix in ("", "uncalibrated_")]
        if any(value is not None for value in values):
            form = "{:.1f} dB" if key.endswith("_db") else "{:.0%}"
            yield [what, form.format(goal), *("" if v is None else form.format(v) for v in values)]


def with_measures(page: str, rows: Sequence[Mapping], summary: Mapping[str, float]) -> str:
    """The page with its part "Measured", which is the last, made anew."""
    rows = [row for row in rows if row["part"] == _savings.PART]
    lines = [
        HEADING,
        "",
        "Emoji teacher, 128 x 128, 16 prompts, in one ComfyUI: mean PSNR to the same run in full, and in brackets",
        'that of the furthest picture. `make bench NAME=inheritance ARGS="--parts runs"` makes this part anew from',
        "`bench/results/inheritance.json`. With flow matching the same network is sampled as such models are: latents",
        "(1 - sigma) x0 + sigma n, and a shift of 3.",
        "",
        "![likeness against multiplications saved, for each run](forecasts.png)",
        "",
        "**The dial**, without a profile: share of the multiplications that each position saves, and likeness.",
        *_table(["run", *LIKENESS], list(_dial(rows))),
        "**Beside fewer steps** of the same sampler. Profiles were learned from 8 prompts, of which one (tennis) is",
        "among the 16 as well, with other noises.",
        *_table(["run", "saved", "with a profile", "without", "fewer steps"], list(_beside(rows))),
    ]
    if peers := list(_peers(rows)):
        head = ["run", "saved", "with a profile", "without", "EasyCache", "LazyCache", "DeepCache's plans"]
        lines += [
            "**Beside other ways**, each at the best of its settings, read off between them; where all of them save",
            "more, what the best saves stands behind it. EasyCache and LazyCache with thresholds up to .5. Plain",
            "extrapolation draws whole steps on by lines or parabolas at even intervals; the dial is that of Feature",
            "Inheritance.",
            *_table([*head, "first-block cache", "plain extrapolation", "dial"], peers),
        ]
    if "dial_lead_over_fewer_steps_db" in summary:
        lines += [
            f"Each position of Feature Inheritance's dial is at least {summary['dial_lead_over_fewer_steps_db']:.1f} dB"
            " ahead of fewer steps, in all of these runs where it was measured.",
            "",
        ]
    lines += [
        "**What was aimed at**, and what is reached:",
        *_table(["", "goal", "with a profile", "without"], list(_goals(summary))),
    ]
    missing = [in_words(run) for name, run in RUNS.items() if not _of(rows, name, OURS) or not _of(rows, name, FEWER)]
    if missing:
        lines += [f"Not measured: {'; '.join(missing)}.", ""]
    return page.partition(HEADING)[0] + "\n".join(lines).rstrip() + "\n"


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """Likeness against multiplications saved, one plot for each run that is measured beside fewer steps."""
    if (plt := pyplot()) is None:
        return
    rows = [row for row in rows if row["part"] == _savings.PART]
    runs = [name for name in RUNS if _of(rows, name, OURS) and _of(rows, name, FEWER)]
    if not runs:
        return
    columns = 4
    figure, axes = plt.subplots(
        -(-len(runs) // columns), columns, figsize=(15, 3.1 * -(-len(runs) // columns)), sharex=True
    )
    for ax in axes.flat[len(runs) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, runs, strict=False):
        others = [(r["saved"], r["psnr"]) for method in (*PEERS, "dial") for r in _of(rows, name, method)]
        if others:
            ax.plot(
                *zip(*upper_edge(others), strict=True), color=COLOURS["others"], lw=1.3, label="the best of other ways"
            )
        for method, label in ((FEWER, "fewer steps"), (UNCALIBRATED, "Speed Up"), (OURS, "Speed Up with a profile")):
            points = sorted((r["saved"], r["psnr"]) for r in _of(rows, name, method))
            edge = points if method == FEWER else upper_edge(points)
            ax.plot(*zip(*edge, strict=True), color=COLOURS[method], lw=1.6, marker="o", ms=3, label=label)
        ax.set_title(in_words(RUNS[name]), fontsize=9)
        ax.set(xlim=(0, 0.85), ylim=(5, 65))
        ax.grid(True, alpha=0.25)
    for ax in axes[:, 0]:
        ax.set_ylabel("PSNR to the full run (dB)")
    shown = max((ax.get_legend_handles_labels() for ax in axes.flat), key=lambda found: len(found[0]))
    figure.legend(*shown, frameon=False, loc="upper right", ncol=4)
    figure.suptitle("Likeness against the share of multiplications saved", x=0.02, y=0.995, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=70)
    plt.close(figure)
