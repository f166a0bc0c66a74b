"""Whole-step forecasts on the emoji family: the table that Speed Up ships with, and how its plans do.

    python bootstrap.py bench NAME=forecasts ARGS="--parts table"
    python bootstrap.py bench NAME=forecasts ARGS="--runs euler-20-7 dpmpp_2m-20-7"

Part "table": runs of the teacher in many steps, with guidance 3 and 7 and with samplers that add no noise, some at
every step, or all of it anew, are recorded; of their v only inner products
are kept, in models/forecasts.safetensors. Part "rows": on other prompts, with paired seeds, each run against itself in
full: plans fitted from that table ("speed up", which knows sampler, noise levels and CFG), plans fitted to a recording
of this very run ("calibrated"), straight lines at every n-th step ("extrapolation"), and the same sampler in fewer
steps. PSNR is the mean over the pictures, decoded, of range 0 to 1; saved is the share of the network's
multiplications, guidance included.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import safetensors.numpy
import torch

from asdm_core import forecast, forecast_fit
from asdm_core.measure import psnr
from bench._unets import with_technique
from bench._common import ROOT, add_common_arguments, begin, beside_earlier, command_line, pack_module, record

FAMILY = ROOT / "models" / "emoji"
TABLE = ROOT / "models" / "forecasts.safetensors"
SCHEDULERS = {"euler": "normal", "dpmpp_2m": "karras", "heun": "normal", "uni_pc": "normal"}
RUNS = {
    f"{sampler}-{steps}-{cfg}": (sampler, SCHEDULERS[sampler], steps, float(cfg))
    for sampler, counts in (("euler", (20, 30, 50)), ("dpmpp_2m", (20, 30)), ("heun", (20,)), ("uni_pc", (20,)))
    for steps in counts
    for cfg in (3, 7)
}
SAVED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# What the table is recorded with, by what the sampler does with noise: adds none, some at every step, all anew.
RECORDED = {"none": "dpmpp_2m", "some": "dpmpp_2m_sde", "all": "lcm"}
METHODS = ("speed up", "fewer steps", "extrapolation", "calibrated")
TEST, CALIBRATION = (0, 0), (17, 1000)  # first prompt among the concepts, first seed


class Prompts:
    """The emoji teacher with some prompts, and runs of it."""

    def __init__(self, pictures: int, first: int, seed: int):
        load = pack_module("nodes.engine.models").load_checkpoint
        self.model, clip, self.vae = load(FAMILY / "emoji-teacher.safetensors")
        names = list(json.loads((FAMILY / "concepts.json").read_text("utf-8")).values())
        chosen = names[first :: max(1, len(names) // pictures)][:pictures]

        def encode(text):
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]

        self.cond = [[torch.cat([encode(name) for name in chosen]), {}]]
        self.uncond = [[encode("").repeat(len(chosen), 1, 1), {}]]
        seeds = range(seed, seed + len(chosen))
        self.noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def run(self, model, sampler: str, scheduler: str, steps: int, cfg: float) -> torch.Tensor:
        """Latents (N, 4, 16, 16)."""
        import comfy.sample

        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                self.noise,
                steps,
                cfg,
                sampler,
                scheduler,
                self.cond,
                self.uncond,
                torch.zeros_like(self.noise),
                seed=1,
                disable_pbar=True,
            )

    @torch.inference_mode()
    def pictures(self, latents):
        return self.vae.decode(latents).movedim(-1, 1).float().clamp(0, 1)

    def recorded(self, run):
        """(recorder, root mean square of the result) of a run in full."""
        recorded = pack_module("nodes.engine.forecasts").Recorded()
        recorder = recorded.results
        latents = self.run(with_technique(self.model, recorded), *run)
        return recorder, float(self.model.model.process_latent_in(latents).square().mean() ** 0.5)


def write_table(prompts: Prompts, steps: int) -> None:
    """Record runs with guidance 3 and 7 in many steps, and keep the inner products of their v."""
    tensors: dict[str, np.ndarray] = {}
    for noise, sampler in RECORDED.items():
        for cfg in (3.0, 7.0):
            recorder, size = prompts.recorded((sampler, "karras", steps, cfg))
            found = recorder.statistics(cfg, size)
            values, vectors = np.linalg.eigh(found.gram)
            name = f"{noise}-cfg{cfg:g}"
            tensors |= {
                f"{name}.factor": (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32),
                f"{name}.sigmas": found.sigmas.astype(np.float32),
                f"{name}.run": np.array([cfg, size], dtype=np.float32),
            }
    metadata = {"model": "emoji-teacher", "steps": str(steps), "pictures": str(len(prompts.noise))}
    safetensors.numpy.save_file(tensors, TABLE, metadata)
    print(f"wrote {TABLE.relative_to(ROOT)}, {TABLE.stat().st_size // 1024} KB", flush=True)


def rows_of(name: str, run: tuple, test: Prompts, calibration: Prompts, args) -> list[dict]:
    """Every method at several savings, for one run."""
    import comfy.samplers

    forecasts, speed_up = pack_module("nodes.engine.forecasts"), pack_module("nodes.speed_up")
    sampler, scheduler, steps, cfg = run
    full = test.pictures(test.run(test.model, *run))
    sigmas = comfy.samplers.calculate_sigmas(test.model.get_model_object("model_sampling"), scheduler, steps)
    response = forecasts.response_of(comfy.samplers.sampler_object(sampler), sigmas, test.model)
    rows = []
    n = len(response)

    def row(method: str, setting: str, model, saved: float, error=None, steps=steps) -> None:
        made = psnr(test.pictures(test.run(model, sampler, scheduler, steps, cfg)), full).clamp(max=80)
        rows.append(
            {"part": "rows", "run": name, "method": method, "setting": setting, "saved": round(saved, 4)}
            | {"psnr": round(float(made.mean()), 3), "psnr_least": round(float(made.min()), 3)}
            | ({} if error is None else {"predicted_error": round(error, 5)})
        )
        r = rows[-1]
        print(
            f"{name:15} {method:14} {saved:.3f} {r['psnr']:6.2f} {r['psnr_least']:6.2f} {error} {setting}", flush=True
        )

    def carried(plan):
        return with_technique(test.model, forecasts.Forecasts(plan))

    def fitted_rows(method: str, recording) -> None:
        fits = forecast_fit.fits_of(recording)
        for saved in args.saved:
            found = forecast_fit.best_of(fits, round(n * (1 - saved)))
            row(method, found.plan.letters(), carried(found.plan), found.saving, found.error)

    if "speed up" in args.methods:
        table = speed_up.statistics_for(comfy.samplers.sampler_object(sampler), cfg)
        fitted_rows("speed up", table.recording(response, cfg, speed_up.positions_of(response, sigmas)))
    if "fewer steps" in args.methods:
        for saved in args.saved:
            fewer = round(steps * (1 - saved))
            row("fewer steps", f"{fewer} steps", test.model, 1 - fewer / steps, steps=fewer)
    if "extrapolation" in args.methods and n == steps:
        for interval in (2, 3, 4):
            plan = forecast.every(steps, interval)
            row("extrapolation", f"every {interval}", carried(plan), plan.saving())
    if "calibrated" in args.methods:
        recorder, size = calibration.recorded(run)
        fitted_rows("calibrated", recorder.recording(response, cfg, size))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["table", "rows"], default=["rows"])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--table-steps", type=int, default=60)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--saved", nargs="+", type=float, default=list(SAVED))
    add_common_arguments(parser)
    args, host, _, _ = begin(parser)
    calibration = Prompts(args.pictures, *CALIBRATION)
    if "table" in args.parts:
        write_table(calibration, args.table_steps)
    command = command_line("forecasts")
    if "rows" not in args.parts:
        return
    test = Prompts(args.pictures, *TEST)
    for name in args.runs:  # kept as they come, so that a stopped bench goes on
        rows = rows_of(name, RUNS[name], test, calibration, args)
        _, rows = beside_earlier("forecasts", {}, rows, command, lambda row: (row["run"], row["method"]))
        record("forecasts", summary_of(rows), rows, command, host, args.notes)


def summary_of(rows: list[dict]) -> dict[str, float]:
    """The least lead over fewer steps, in dB, of plans that save at least as much, at 40% and 50%."""
    found = {}
    for method in ("calibrated", "speed up"):
        for saved in (0.4, 0.5):
            leads = []
            for name in {row["run"] for row in rows}:
                mine = [r for r in rows if r["run"] == name and r["method"] == method and r["saved"] >= saved - 0.01]
                fewer = [r for r in rows if r["run"] == name and r["method"] == "fewer steps"]
                other = [r["psnr"] for r in fewer if abs(r["saved"] - saved) < 0.01]
                if mine and other:
                    leads.append(max(r["psnr"] for r in mine) - max(other))
            if leads:
                found[f"{method.replace(' ', '_')}_lead_over_fewer_steps_at_{saved:.0%}".replace("%", "pct")] = min(
                    leads
                )
    return found


if __name__ == "__main__":
    main()
