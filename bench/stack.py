"""Everything together at SD1.5's full size: how much faster a run gets with an M2 pack, GRI, Speed Up, and all of them.

    python bootstrap.py bench NAME=stack ARGS="--cpu-time --sizes 512 --dtypes bf16 fp32"
    python bootstrap.py bench NAME=stack ARGS="--cpu-time --sizes 1024 --dtypes bf16"
    python bootstrap.py bench NAME=stack ARGS="--cpu-time --sizes 1024 --dtypes bf16 --whole"

Random weights in the host, euler, normal, 20 steps, CFG 7. Random weights have no quality, so the plan is the one of
Speed Up at "close" without a profile ("same to the eye" beside it); what it does to pictures of the emoji teacher
stands in bench/results/inheritance.json, and its PSNR from there beside the times here. A run is put together from the
medians of its kinds of step, three of each: in full, for the positive prompt alone, left out. --whole makes the whole
run with all together once, and says how far its time is from the sum. Multiplications are counted from the config
(`asdm_core.measure`), those that GRI leaves out included. Steps that are timed are kept as they come: a
stopped bench goes on, and runs are put together anew where other plans ship.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from asdm_core import forecast, packs
from asdm_core.architecture import Architecture
from asdm_core.assignment import Window
from asdm_core.measure import costs
from asdm_core.tensor_file import DTYPES
from bench._common import (
    RESULTS,
    add_common_arguments,
    begin,
    beside_earlier,
    command_line,
    pack_module,
    record,
)
from bench._unets import SD15, full_size, with_technique

STEPS, CFG, SAMPLER, SCHEDULER = 20, 7.0, "euler", "normal"
LIKENESS = ("close", "same to the eye")
ALL = "M2 pack + GRI + Speed Up (close)"
RUN = f"{SAMPLER}-{STEPS}-cfg{CFG:g}"
# One of each kind of step that plans have, after two in full: the first warms up, and lines need two.
KINDS = forecast.ForecastPlan(tuple(forecast.Action(kind) for kind in ("full", "full", "result", "cond")), name="kinds")


def plan_of(model, likeness: str) -> forecast.ForecastPlan:
    """The plan that ships for this run."""
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), SCHEDULER, STEPS)
    sampler = comfy.samplers.sampler_object(SAMPLER)
    return pack_module("nodes.speed_up").plan_for(likeness, sampler, sigmas, CFG, model)


def on_emoji(likeness: str) -> float | None:
    """PSNR of that plan on the emoji family, from the record."""
    path = RESULTS / "inheritance.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return next((r["psnr"] for r in rows if r.get("run") == RUN and r["setting"] == likeness), None)


def sample(model, clock: Callable[[], float], steps: int, size: int) -> list[float]:
    """Moments at which the steps of a run ended."""
    import comfy.sample

    marks: list[float] = []
    cond = [[torch.zeros(1, 77, 768), {}]]
    latent = torch.zeros(1, 4, size // 8, size // 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        comfy.sample.sample(
            model,
            noise,
            steps,
            CFG,
            SAMPLER,
            SCHEDULER,
            cond,
            cond,
            latent,
            disable_pbar=True,
            callback=lambda *_: marks.append(clock()),
        )
    return marks


def kinds(model, clock: Callable[[], float], size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, by its letter."""
    carried = with_technique(model, pack_module("nodes.engine.forecasts").Forecasts(KINDS))
    found: dict[str, list[float]] = {"F": [], "r": [], "c": []}
    for _ in range(rounds):
        marks = sample(carried, clock, len(KINDS.actions), size)
        for letter, before, after in zip(KINDS.letters()[1:], marks, marks[1:], strict=False):
            found[letter].append(after - before)
    return found


def multiplications(size: int, cut: bool, gri: bool) -> float:
    """Of one full evaluation for one prompt."""
    architecture = Architecture.preset("m2", SD15) if cut else Architecture.full(SD15)
    side = size // 8
    total = float(sum(cost.total for cost in costs(architecture, side, side).values()))
    if gri:
        left_out = pack_module("nodes.engine.regional").Regional().left_out(architecture, side, side)
        total -= sum(left_out.values())
    return total


class Models:
    """SD1.5 with random weights, alone and with an M2 pack, and GRI on either."""

    def __init__(self, dtype: str, folder: Path):
        self.plain = full_size(DTYPES[dtype])
        m2 = Architecture.preset("m2", SD15)
        description = packs.Description("pack", m2, m2.pack_units())
        state = self.plain.model.diffusion_model.state_dict()
        path = folder / f"m2-{dtype}.safetensors"
        packs.write_pack(path, {key: state[key] for key in description.keys()}, description, DTYPES[dtype])
        self.packed = pack_module("nodes.apply_pack").apply_pack(self.plain, path, path.name, Window())

    def get(self, cut: bool, gri: bool):
        model = self.packed if cut else self.plain
        return with_technique(model, pack_module("nodes.engine.regional").Regional()) if gri else model


# What stands on the MODEL beneath Speed Up: an M2 pack, GRI. The two that the summary needs come first.
BENEATH = ((False, False), (True, True), (True, False), (False, True))


def bench(
    dtype: str, size: int, rounds: int, whole: bool, clock, folder: Path, known: dict[str, dict]
) -> Iterator[list[dict]]:
    """The rows of each set of techniques beneath Speed Up, as they come. known: rows by setting, whose steps are not
    timed again: only put together anew, as the plans that ship may be others.
    """
    models = Models(dtype, folder)
    plans = {likeness: plan_of(models.plain, likeness) for likeness in LIKENESS}
    plans |= {"": forecast.every(STEPS, 1)}
    for cut, gri in BENEATH:
        beneath = [*(["M2 pack"] if cut else []), *(["GRI"] if gri else [])]
        model, work = models.get(cut, gri), multiplications(size, cut, gri)
        earlier = known.get(" + ".join(beneath) or "none")
        times = earlier["seconds_of_steps"] if earlier else kinds(model, clock, size, rounds)
        median = {letter: statistics.median(found) for letter, found in times.items()}
        rows: list[dict] = []
        for likeness, plan in plans.items():
            names = [*beneath, *([f"Speed Up ({likeness})"] if likeness else [])]
            rows.append(
                {
                    "part": "stack",
                    "dtype": dtype,
                    "size": size,
                    "setting": " + ".join(names) or "none",
                    "seconds": round(sum(median[letter] for letter in plan.letters()), 3),
                    "multiplications": work * 2 * STEPS * (1 - plan.saving()),
                    "plan": plan.letters(),
                    "psnr_on_emoji": on_emoji(likeness) if likeness else None,
                    "seconds_of_steps": times,
                }
            )
            print(f"{dtype} {size} {rows[-1]['setting']:45} {rows[-1]['seconds']:8.1f} s", flush=True)
        of_all, before = rows[LIKENESS.index("close")], known.get(ALL, {})
        if cut and gri and before.get("plan") == of_all["plan"] and "whole_run_over_sum" in before:
            of_all["whole_run_over_sum"] = before["whole_run_over_sum"]
        elif whole and cut and gri:
            carried = with_technique(model, pack_module("nodes.engine.forecasts").Forecasts(plans["close"]))
            sample(carried, clock, 2, size)
            began = clock()
            sample(carried, clock, STEPS, size)
            of_all["whole_run_over_sum"] = (clock() - began) / of_all["seconds"]
        yield rows


def summary_of(rows: list[dict]) -> dict[str, float]:
    found, ceilings = {}, []
    for dtype, size in sorted({(row["dtype"], row["size"]) for row in rows}):
        of = {r["setting"]: r for r in rows if (r["dtype"], r["size"]) == (dtype, size)}
        if "none" not in of or ALL not in of:
            continue
        none, suffix = of["none"], "" if dtype == "bf16" else f"_{dtype}"
        for likeness, name in (("close", ""), ("same to the eye", "_same_to_the_eye")):
            all_together = of[ALL.replace("close", likeness)]
            found[f"stack_{size}{name}{suffix}"] = none["seconds"] / all_together["seconds"]
            if not name:
                time = all_together["seconds"] / none["seconds"]
                ceilings.append(time / (all_together["multiplications"] / none["multiplications"]))
        if "whole_run_over_sum" in of[ALL]:
            found[f"whole_run_over_sum_{size}{suffix}"] = of[ALL]["whole_run_over_sum"]
    return found | ({"overhead_over_mac_ceiling": max(ceilings)} if ceilings else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, choices=[512, 1024], default=[512, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp32", "fp16"], default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="also make one whole run with all together")
    add_common_arguments(parser)
    args, host, _, clock = begin(parser)
    command = command_line("stack")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            for dtype in args.dtypes:
                path = RESULTS / "stack.json"
                earlier = json.loads(path.read_text())["rows"] if path.exists() else []
                known = {r["setting"]: r for r in earlier if (r["dtype"], r["size"]) == (dtype, size)}
                for rows in bench(dtype, size, args.rounds, args.whole, clock, Path(folder), known):
                    _, rows = beside_earlier(
                        "stack", {}, rows, command, lambda r: (r["dtype"], r["size"], r["setting"])
                    )
                    record("stack", summary_of(rows), rows, command, host, args.notes)


if __name__ == "__main__":
    main()
