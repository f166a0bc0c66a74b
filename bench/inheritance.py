"""Feature inheritance: cost of an inherited step at full size, and quality against time on the emoji family.

    python bootstrap.py bench NAME=inheritance [ARGS="--cpu-time --pictures 8"]

Part one: SD1.5 with random weights, 512 x 512, classifier-free guidance, euler. How long an inherited step
takes, relative to a full one, against the same ratio of multiplications, and against the time that the units
it computes take in a full step (shallow layers do fewer multiplications in the same time than deep ones). And a run
with interval 1 against one without the node, at 128 x 128, where a step is short and any overhead shows more.

Part "runs" (bench/_savings.py): the emoji teacher, 16 prompts with paired seeds, CFG 3 and 7, ten samplers and step
counts and one image to image. Likeness to the full run, and to the same prompts in 100 steps, against multiplications
of the whole run: Speed Up's plans fitted to a recording of 8 prompts ("profile"; one of them is among the 16, with
another noise) and from the table that ships ("uncalibrated"), the same sampler in fewer steps, whole-step
extrapolation of first and second order, a first-block cache, DeepCache's plans, the dial of Feature Inheritance, the
core's EasyCache and LazyCache. Rows are kept as they come, so a stopped bench goes on where it stopped. At its end
docs/forecasts.md is made anew from the record, which "--parts page" does alone.

Part two: the emoji teacher, 20 steps (and 30 and 50 for one sampler each), CFG 3, paired seeds, against the run in
full. In the same host, one after another: our dial and its neighbours, DeepCache's plan as a setting of
ours (output reuse, uniform and quadratic), the core's EasyCache and LazyCache at several thresholds. A
method's quality at 40% less time is read off the upper edge of its settings, between the measured points.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch

from asdm_core import inheritance
from asdm_core.measure import psnr, ratio, ssim, time_alternating
from asdm_core.tensor_file import DTYPES
from bench._common import (
    RESULTS,
    ROOT,
    add_common_arguments,
    at_saving,
    begin,
    beside_earlier,
    command_line,
    pack_module,
    pyplot,
    record,
    upper_edge,
)
from bench import _savings, _savings_page
from bench._family import Family
from bench._unets import full_size, with_plan

RUNS = {
    f"{sampler}-{steps}": (sampler, scheduler, steps)
    for sampler, scheduler, steps in (
        ("euler", "normal", 20),
        ("dpmpp_2m", "karras", 20),
        ("dpmpp_sde", "karras", 20),
        ("heun", "normal", 20),
        ("euler", "normal", 50),
        ("dpmpp_2m", "karras", 30),
    )
}
METHODS = ("ours", "deepcache", "easycache", "lazycache")
SAVED = 0.4
AT = f"at {SAVED:.0%} less time"
EASY, LAZY = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8), (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)


# Part one: cost -------------------------------------------------------------------------------------


def steps_of(model, clock: Callable[[], float], steps: int, size: int = 64) -> list[float]:
    """Seconds of each step of a run but the first, which warms up."""
    import comfy.sample

    marks = []
    cond = [[torch.zeros(1, 77, 768), {}]]
    latent = torch.zeros(1, 4, size, size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        comfy.sample.sample(
            model,
            noise,
            steps,
            7.0,
            "euler",
            "normal",
            cond,
            cond,
            latent,
            disable_pbar=True,
            callback=lambda *_: marks.append(clock()),
        )
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def unit_times(model, config, clock, rounds: int) -> dict[str, float]:
    """Seconds that each unit takes in a full step; "" is all the rest. Median of the rounds."""
    host_units = pack_module("nodes.engine.units")
    times: dict[str, list[float]] = {}
    started = {}
    handles = []
    for address, layer in host_units.layers(model.model.diffusion_model, config).items():
        handles.append(layer.register_forward_pre_hook(lambda *_, a=address: started.update({a: clock()})))
        handles.append(
            layer.register_forward_hook(lambda *_, a=address: times.setdefault(a, []).append(clock() - started[a]))
        )
    total = []
    for _ in range(rounds):
        total += steps_of(model, clock, 2)
    for handle in handles:
        handle.remove()
    found = {
        a: statistics.median(t[1::2]) for a, t in times.items()
    }  # every other forward: the first of a run warms up
    return found | {"": statistics.median(total) - sum(found.values())}


def bench_cost(dtype: str, rounds: int, clock) -> tuple[dict, list[dict]]:
    model = full_size(DTYPES[dtype])
    architecture = pack_module("nodes.engine.network").architecture_of(model)
    config = architecture.config
    every = inheritance.Schedule("explicit", steps=(0,))
    plans = {f"deepcache-{b}": inheritance.deepcache(config, b, every) for b in (0, 1, 2, 3)}
    plans |= {
        "shallow-only": inheritance.shallow_only(config, every),
        "encoder": inheritance.encoder(config, every),
        "attention": inheritance.attention(config, schedule=every),
        "deepcache-1, forecast": inheritance.deepcache(config, 1, every).reusing("forecast"),
    }
    units = unit_times(model, config, clock, rounds)
    never = inheritance.deepcache(config, 0, inheritance.Schedule(interval=1))
    steps_of(model, clock, 2)
    times: dict[str, list[float]] = {name: [] for name in ("off", *plans)}
    short = time_alternating(
        {
            "off": lambda: sum(steps_of(model, clock, 4, 16)),
            "interval 1": lambda: sum(steps_of(with_plan(model, never), clock, 4, 16)),
        },
        4 * rounds,
        clock=clock,
    )
    for _ in range(rounds):
        times["off"] += steps_of(model, clock, 2)
        for name, plan in plans.items():
            times[name] += steps_of(with_plan(model, plan), clock, 2)
    rows: list[dict] = []
    worst: list[float] = []
    beyond: list[float] = []
    for name, plan in plans.items():
        full, inherited = inheritance.step_macs(plan, architecture)
        over = ratio(times, name, "off")
        rows.append(
            {
                "part": "cost",
                "dtype": dtype,
                "plan": name,
                "seconds": statistics.median(times[name]),
                "over_full": over,
                "macs_over_full": inherited / full,
                "over_mac_ceiling": over / (inherited / full),
                "all_seconds": times[name],
            }
        )
        if name in ("deepcache-0", "deepcache-1", "deepcache-2", "deepcache-3", "encoder"):
            worst.append(over / (inherited / full))
            # The same step if nothing but its units cost time: what is above that is our own.
            runs = inheritance.flow(config, plan.reuse(config)).computes
            alone = units[""] + sum(t for a, t in units.items() if a in runs)
            rows[-1]["over_unit_times"] = statistics.median(times[name]) / alone
            beyond.append(rows[-1]["over_unit_times"])
    rows.append(
        {
            "part": "cost",
            "dtype": dtype,
            "plan": "off",
            "seconds": statistics.median(times["off"]),
            "all_seconds": times["off"],
        }
    )
    rows += [
        {"part": "cost", "dtype": dtype, "plan": f"{name}, 128 x 128", "all_seconds": t} for name, t in short.items()
    ]
    return {
        "overhead_interval_1": ratio(short, "interval 1", "off") - 1,
        "inherited_step_over_mac_ceiling": max(worst),
        "inherited_step_over_unit_times": max(beyond),
    }, rows


# Part two: quality ----------------------------------------------------------------------------------


def methods(model) -> dict[str, tuple[str, object]]:
    """Label -> (method, MODEL)."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    config = pack_module("nodes.engine.network").architecture_of(model).config
    schedule = inheritance.Schedule
    found = {}
    for branch in (0, 1, 3):
        for interval in (2, 3):
            plan = inheritance.deepcache(config, branch, schedule(interval=interval)).reusing("forecast")
            found[f"forecast, branch {branch}, every {interval}"] = ("ours", with_plan(model, plan))
        for interval in (2, 3, 5):
            found[f"deepcache {branch}, uniform {interval}"] = (
                "deepcache",
                with_plan(model, inheritance.deepcache(config, branch, schedule(interval=interval))),
            )
        quadratic = schedule("quadratic", interval=3, power=1.4, centre=0.3)
        found[f"deepcache {branch}, quadratic 3"] = (
            "deepcache",
            with_plan(model, inheritance.deepcache(config, branch, quadratic)),
        )
    for threshold in EASY:
        found[f"easycache {threshold}"] = (
            "easycache",
            EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).args[0],
        )
    for threshold in LAZY:
        found[f"lazycache {threshold}"] = (
            "lazycache",
            LazyCacheNode.execute(model, threshold, 0.15, 0.95, False).args[0],
        )
    return found


def bench_quality(family: Family, rounds: int, clock, names: list[str]) -> list[dict]:
    """Time and quality of every method in the runs named. A time is the median of the rounds; pictures are the same in
    each.
    """
    rows = []
    settings = methods(family.model)
    for sampler, scheduler, steps in (RUNS[name] for name in names):
        full, _ = family.run(family.model, sampler, scheduler, steps, clock)
        run = {"part": "quality", "sampler": sampler, "scheduler": scheduler, "steps": steps}
        made: dict[str, torch.Tensor] = {}

        def call(label, model, sampler=sampler, scheduler=scheduler, steps=steps, made=made):
            made[label] = family.run(model, sampler, scheduler, steps, clock)[0]

        calls = {"full": lambda: call("full", family.model)} | {
            k: lambda k=k, m=m: call(k, m) for k, (_, m) in settings.items()
        }
        times = time_alternating(calls, rounds, warmup=0, clock=clock)
        rows.append(
            run
            | {
                "setting": "full",
                "method": "full",
                "seconds": statistics.median(times["full"]),
                "top1": family.top1(full),
            }
        )
        points: dict[str, list[tuple[float, float]]] = {m: [] for m in METHODS}
        for label, (method, _) in settings.items():
            pictures = made[label]
            saving = 1 - ratio(times, label, "full")
            quality = psnr(pictures, full).clamp(max=80)
            points[method].append((saving, float(quality.mean())))
            rows.append(
                run
                | {
                    "setting": label,
                    "method": method,
                    "time_saved": round(saving, 4),
                    "psnr": round(float(quality.mean()), 3),
                    "psnr_se": round(float(quality.std() / len(quality) ** 0.5), 3),
                    "ssim": round(float(ssim(pictures, full).mean()), 4),
                    "top1": family.top1(pictures),
                }
            )
        at = {method: at_saving(found, SAVED) for method, found in points.items()}
        rows += [run | {"setting": AT, "method": method, "psnr": value} for method, value in at.items()]
        print(
            f"{sampler} {steps}: " + ", ".join(f"{m} {v if v is None else round(v, 2)}" for m, v in at.items()),
            flush=True,
        )
    return rows


def quality_summary(rows: list[dict]) -> dict[str, float]:
    """Quality at 40% less time: a mean over the runs in which the method gets as far as that."""
    reached = {
        m: [r["psnr"] for r in rows if r.get("setting") == AT and r["method"] == m and r["psnr"] is not None]
        for m in METHODS
    }
    return {f"psnr_{m}_at_40pct": statistics.mean(values) for m, values in reached.items() if values}


def draw(rows: list[dict], path: Path) -> None:
    """Quality against time saved, one plot for each run."""
    if (plt := pyplot()) is None:
        return

    colours = {"ours": "#d1495b", "deepcache": "#2b59c3", "easycache": "#3a9d5d", "lazycache": "#8a94a6"}
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), sharex=True)
    for ax, (sampler, scheduler, steps) in zip(axes.flat, RUNS.values(), strict=True):
        mine = [r for r in rows if r.get("time_saved") is not None and (r["sampler"], r["steps"]) == (sampler, steps)]
        for method, colour in colours.items() if mine else ():
            points = [(r["time_saved"], r["psnr"]) for r in mine if r["method"] == method]
            edge = upper_edge(points)
            ax.plot(
                *zip(*edge, strict=True), color=colour, lw=1.6, label={"ours": "asdm, forecasts"}.get(method, method)
            )
            ax.scatter(*zip(*points, strict=True), color=colour, s=14, alpha=0.6)
        ax.axvline(SAVED, color="#c0c6d0", lw=1, zorder=0)
        ax.set(
            title=f"{sampler}, {scheduler}, {steps} steps",
            ylabel="PSNR to the full run (dB)",
            xlabel="time saved",
            xlim=(0, 0.8),
            ylim=(15, 65),
        )
        ax.grid(True, alpha=0.25)
    shown = max((ax.get_legend_handles_labels() for ax in axes.flat), key=lambda found: len(found[0]))
    figure.legend(*shown, frameon=False, loc="upper right", ncol=4)
    figure.suptitle("Emoji teacher, 128 x 128 pixels: quality against time saved", x=0.02, ha="left")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def bench_runs(args, host: Path, clock) -> None:
    """Rows of part "runs" that the record does not have yet; each is kept as it comes."""
    savings, command = _savings.Savings(args.pictures, clock), command_line("inheritance")
    for name in args.whole:
        path = RESULTS / "inheritance.json"
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        known = {(r["method"], r["setting"]) for r in earlier if r.get("run") == name}
        for row in savings.rows(_savings.RUNS[name], args.methods, known):
            print(f"{name:22} {row['method']:13} {row.get('saved', 0):.3f} {row.get('psnr', 0):6.2f} {row['setting']}")
            summary, rows = beside_earlier("inheritance", {}, [row], command, _part)
            summary |= _savings.summary(rows)
            with redirect_stdout(io.StringIO()):
                record("inheritance", summary, rows, command, host, args.notes)
    write_page()


def write_page() -> None:
    """The part "Measured" of docs/forecasts.md and its plot, from the record."""
    found = json.loads((RESULTS / "inheritance.json").read_text())
    page = ROOT / "docs" / "forecasts.md"
    page.write_text(_savings_page.with_measures(page.read_text("utf-8"), found["rows"], found["summary"]), "utf-8")
    _savings_page.draw(found["rows"], page.with_suffix(".png"))


def _part(row: dict) -> tuple:
    """Rows of the record that are measured together, and take each other's place."""
    whole = (row["run"], row["method"], row["setting"]) if row["part"] == _savings.PART else ()
    return row["part"], row.get("sampler"), row.get("steps"), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["cost", "quality", _savings.PART, "page"], default=["cost", "quality"]
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default=None, help="of part one; by default fp16 on CUDA and bf16 on a CPU"
    )
    parser.add_argument("--cost-rounds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="of part two")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="of part two")
    parser.add_argument("--whole", nargs="+", choices=_savings.RUNS, default=list(_savings.RUNS), help='of part "runs"')
    parser.add_argument("--methods", nargs="+", choices=_savings.METHODS, default=list(_savings.METHODS), help="of it")
    add_common_arguments(parser)
    args, host, device, clock = begin(parser)
    summary: dict[str, float] = {}
    rows = []
    if _savings.PART in args.parts:
        bench_runs(args, host, clock)
    elif "page" in args.parts:
        write_page()
    if not {"cost", "quality"} & set(args.parts):
        return
    if "quality" in args.parts:
        rows += bench_quality(Family(args.pictures), args.rounds, clock, args.runs)
    if "cost" in args.parts:
        found, more = bench_cost(args.dtype or ("fp16" if device.type == "cuda" else "bf16"), args.cost_rounds, clock)
        summary, rows = summary | found, rows + more
    command = command_line("inheritance")
    summary, rows = beside_earlier("inheritance", summary, rows, command, _part)
    summary |= quality_summary(rows)
    draw([row for row in rows if row["part"] == "quality"], ROOT / "docs" / "inheritance.png")
    record("inheritance", summary, rows, command, host, args.notes)


if __name__ == "__main__":
    main()
