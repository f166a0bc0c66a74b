"""Whole runs of the emoji teacher: likeness to the full run against multiplications, for every way of saving them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from asdm_core import forecast, inheritance
from asdm_core import forecast_fit as fit
from asdm_core.measure import psnr, ssim
from bench._common import at_saving, pack_module
from bench._family import Family
from bench._unets import with_technique

PART = "runs"
DETERMINISTIC = ("euler", "dpmpp_2m", "heun", "uni_pc")
# Cheapest first: a run that is stopped has then done most.
KINDS = (
    ("lcm", "simple", 8),
    ("euler", "normal", 20),
    ("dpmpp_2m", "karras", 20),
    ("uni_pc", "normal", 20),
    ("dpmpp_2m_sde", "karras", 20),
    ("euler", "normal", 30),
    ("dpmpp_2m", "karras", 30),
    ("euler", "normal", 50),
    ("heun", "normal", 20),
    ("dpmpp_sde", "karras", 20),
)


@dataclass(frozen=True)
class Whole:
    """One kind of run."""

    sampler: str
    scheduler: str
    steps: int
    cfg: float
    denoise: float = 1.0
    flow: bool = False  # as models by flow matching are sampled

    @property
    def name(self) -> str:
        kind = "-flow" if self.flow else "" if self.denoise == 1 else "-img2img"
        return f"{self.sampler}{kind}-{self.steps}-cfg{self.cfg:g}"

    @property
    def counts(self) -> bool:
        """Whether it is one of those that the keys of the record are over."""
        return self.sampler in DETERMINISTIC and not self.flow


RUNS = {
    run.name: run
    for run in (
        *(Whole(*kind, cfg) for kind in KINDS for cfg in (3.0, 7.0)),
        Whole("euler", "normal", 20, 7.0, denoise=0.6),
        *(Whole("euler", "simple", 20, cfg, flow=True) for cfg in (3.0, 7.0)),
    )
}
SAVED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)
CONVERGED = ("dpmpp_2m", "karras", 100)
OURS, UNCALIBRATED, FEWER = "profile", "uncalibrated", "fewer steps"
PEERS = ("easycache", "lazycache", "deepcache", "first block", "extrapolation")
METHODS = (OURS, UNCALIBRATED, FEWER, "extrapolation", "first block", "dial", "easycache", "lazycache", "deepcache")


def second_order(n: int, interval: int) -> forecast.ForecastPlan:
    """Every `interval`-th of n steps is full; between them the parabola through the last three, as far as there are."""
    actions: list[forecast.Action] = []
    for s in range(n):
        made = [q for q in range(s) if actions[q].computes]
        if s % interval == 0:
            actions.append(forecast.Action())
        elif len(made) < 3:
            actions.append(forecast.Action(forecast.RESULT))
        else:
            points = made[-3:]
            weights = tuple(
                (q, float(np.prod([(s - other) / (q - other) for other in points if other != q]))) for q in points
            )
            actions.append(forecast.Action(forecast.RESULT, weights))
    return forecast.ForecastPlan(tuple(actions), name=f"second order, every {interval}")


@dataclass
class Setting:
    """One way of making a run: its MODEL, its steps, and how to learn the share of multiplications that it saved."""

    method: str
    name: str
    model: object
    saved: Callable[[], float] | float | None
    steps: int
    more: dict = field(default_factory=dict)


class Savings:
    """The test prompts, the calibration prompts, and everything that is tried on them."""

    def __init__(self, pictures: int, clock):
        self.test, self.calibration, self._clock = Family(pictures), Family(8, 17, 1000), clock
        self.model = self.test.model
        self._architecture = pack_module("nodes.engine.network").architecture_of(self.model)
        self._computed = 0  # pictures and prompts that the network computed, by its first layer
        self._converged: dict[tuple, torch.Tensor] = {}
        self._start: dict[int, torch.Tensor] = {}
        first = self.model.model.diffusion_model.input_blocks[0][0]
        first.register_forward_pre_hook(self._count)

    def _count(self, module, inputs) -> None:
        self._computed += len(inputs[0])

    def _model(self, run: Whole, family: Family | None = None):
        """The MODEL of a run, of the test prompts if no others are given."""
        model = (family or self.test).model
        if not run.flow:
            return model
        from bench._blended import blended

        return blended(model)

    def latents(self, family: Family, model, run: Whole, steps: int | None = None, sampler=None) -> torch.Tensor:
        start = self._beginning(family, run)
        name, scheduler, count = sampler or (run.sampler, run.scheduler, steps or run.steps)
        torch.manual_seed(0)
        return family.latents(model, name, scheduler, count, cfg=run.cfg, denoise=run.denoise, start=start)

    def _beginning(self, family: Family, run: Whole) -> torch.Tensor | None:
        """Pictures of the same prompts from other noise, to begin image to image with."""
        if run.denoise == 1:
            return None
        if id(family) not in self._start:
            noise, family.noise = family.noise, family.noise.flip(0)
            self._start[id(family)] = family.latents(family.model, "euler", "normal", 20)
            family.noise = noise
        return self._start[id(family)]

    def rows(self, run: Whole, methods: list[str], known: set[tuple[str, str]]) -> Iterator[dict]:
        """Rows of a run that are not known yet, by (method, setting)."""
        full_seconds, full = self._made(self._model(run), run, run.steps)
        total = self._computed
        same: dict = {"part": PART, "run": run.name, "sampler": run.sampler, "scheduler": run.scheduler}
        same |= {"steps": run.steps, "cfg": run.cfg}
        converged = self._converged_run(run) if run.counts else None
        if ("full", "full") not in known:
            yield (
                same
                | {"method": "full", "setting": "full", "seconds": full_seconds}
                | self._likeness(full, None, converged)
            )
        for setting in self._settings(run, methods):
            if (setting.method, setting.name) in known:
                continue
            seconds, made = self._made(setting.model, run, setting.steps)
            saved = setting.saved() if callable(setting.saved) else setting.saved
            if saved is None:
                saved = 1 - self._computed / total
            yield (
                same
                | {"method": setting.method, "setting": setting.name, "saved": round(saved, 4)}
                | {"seconds": seconds, "time_saved": round(1 - seconds / full_seconds, 4)}
                | self._likeness(made, full, converged)
                | setting.more
            )

    def _made(self, model, run: Whole, steps: int) -> tuple[float, torch.Tensor]:
        self._beginning(self.test, run)  # its drawing is no part of the run
        self._computed = 0
        before = self._clock()
        latents = self.latents(self.test, model, run, steps)
        return round(self._clock() - before, 3), self.test.pictures(latents)

    def _converged_run(self, run: Whole) -> torch.Tensor:
        key = run.cfg, run.denoise
        if key not in self._converged:
            self._converged[key] = self.test.pictures(self.latents(self.test, self.model, run, sampler=CONVERGED))
        return self._converged[key]

    def _likeness(self, made, full, converged) -> dict:
        found = {"top1": self.test.top1(made)}
        for name, wanted in (("", full), ("_converged", converged)):
            if wanted is not None:
                quality = psnr(made, wanted).clamp(max=80)
                found[f"psnr{name}"] = round(float(quality.mean()), 3)
                found[f"psnr{name}_least"] = round(float(quality.min()), 3)
                found[f"ssim{name}"] = round(float(ssim(made, wanted).mean()), 4)
        return found

    # the settings ------------------------------------------------------------------------------------

    def _settings(self, run: Whole, methods: list[str]) -> Iterator[Setting]:
        for method in methods:
            yield from getattr(self, "_" + method.replace(" ", "_"))(run)

    def _fewer_steps(self, run: Whole) -> Iterator[Setting]:
        for steps in sorted({round(run.steps * (1 - saved)) for saved in (0.05, 0.1, *SAVED)} - {run.steps}):
            yield Setting(FEWER, f"{steps} steps", self._model(run), 1 - steps / run.steps, steps)

    def _carried(self, method: str, name: str, run: Whole, plan, **more) -> Setting:
        technique = pack_module("nodes.engine.forecasts").Forecasts(plan)

        def saved() -> float:
            return technique.log.last.saving

        return Setting(method, name, with_technique(self._model(run), technique), saved, run.steps, more)

    def _extrapolation(self, run: Whole) -> Iterator[Setting]:
        for interval in (2, 3, 4):
            for order, plan in ((1, forecast.every), (2, second_order)):
                name = f"order {order}, every {interval}"
                yield self._carried("extrapolation", name, run, plan(run.steps, interval))

    def _answer(self, run: Whole):
        """(sampler, sigmas, response)."""
        import comfy.samplers

        forecasts = pack_module("nodes.engine.forecasts")
        # As KSampler has them: some samplers leave out the last but one.
        settings = run.steps, torch.device("cpu"), run.sampler, run.scheduler, run.denoise, self.model.model_options
        sigmas = comfy.samplers.KSampler(self._model(run), *settings).sigmas.cpu()
        sampler = comfy.samplers.sampler_object(run.sampler)
        return sampler, sigmas, forecasts.response_of(sampler, sigmas, self._model(run))

    def _uncalibrated(self, run: Whole) -> Iterator[Setting]:
        speed_up = pack_module("nodes.speed_up")
        sampler, sigmas, response = self._answer(run)
        positions = speed_up.positions_of(response, sigmas)
        recording = speed_up.statistics_for(sampler, run.cfg, positions).recording(response, run.cfg, positions)
        yield from self._fitted(UNCALIBRATED, run, fit.fits_of(recording))
        for likeness in speed_up.LIKENESS:
            technique = speed_up.SpeedUp(likeness)

            def saved(technique=technique) -> float:
                return technique.log.last.saving

            yield Setting(UNCALIBRATED, likeness, with_technique(self._model(run), technique), saved, run.steps)

    def _profile(self, run: Whole) -> Iterator[Setting]:
        _, _, response = self._answer(run)
        recorded = pack_module("nodes.engine.forecasts").Recorded()
        latents = self.latents(self.calibration, with_technique(self._model(run, self.calibration), recorded), run)
        size = float(self.model.model.process_latent_in(latents).square().mean() ** 0.5)
        recording = recorded.results.recording(response, run.cfg, size)
        yield from self._fitted(OURS, run, fit.fits_of(recording))

    def _fitted(self, method: str, run: Whole, fits: list[fit.PlanFit]) -> Iterator[Setting]:
        n = len(fits[0].recording)
        for saved in SAVED:
            if round(n * (1 - saved)) >= 1:
                best = fit.best_of(fits, round(n * (1 - saved)), patient=method == OURS)
                name = f"{saved:.0%}: {best.plan.letters()}"
                yield self._carried(method, name, run, best.plan, predicted_error=round(best.error, 5))

    def _featured(self, method: str, name: str, run: Whole, plan: inheritance.Plan) -> Setting:
        technique = pack_module("nodes.engine.inheritance").Inheritance(plan)
        full, inherited = inheritance.step_macs(plan, self._architecture)

        def saved() -> float:
            counts = technique.log.last.counts
            share = sum(n for (_, mode), n in counts.items() if mode == "replay") / sum(counts.values())
            return share * (1 - inherited / full)

        return Setting(method, name, with_technique(self._model(run), technique), saved, run.steps)

    def _dial(self, run: Whole) -> Iterator[Setting]:
        for name in inheritance.DIALS:
            yield self._featured("dial", name, run, inheritance.dial(self._architecture.config, name))

    def _deepcache(self, run: Whole) -> Iterator[Setting]:
        schedule, config = inheritance.Schedule, self._architecture.config
        schedules = {f"uniform {n}": schedule(interval=n) for n in (2, 3, 5)}
        schedules["quadratic 3"] = schedule("quadratic", interval=3, power=1.4, centre=0.3)
        for branch in (0, 1):
            for name, when in schedules.items():
                plan = inheritance.deepcache(config, branch, when)
                yield self._featured("deepcache", f"branch {branch}, {name}", run, plan)

    def _first_block(self, run: Whole) -> Iterator[Setting]:
        for threshold in THRESHOLDS:
            when = inheritance.Schedule("adaptive", threshold=threshold, max_run=4)
            plan = inheritance.shallow_only(self._architecture.config, when)
            yield self._featured("first block", f"threshold {threshold}", run, plan)

    def _easycache(self, run: Whole) -> Iterator[Setting]:
        from comfy_extras.nodes_easycache import EasyCacheNode

        for threshold in THRESHOLDS:
            model = EasyCacheNode.execute(self._model(run), threshold, 0.15, 0.95, False).args[0]
            yield Setting("easycache", f"threshold {threshold}", model, None, run.steps)

    def _lazycache(self, run: Whole) -> Iterator[Setting]:
        from comfy_extras.nodes_easycache import LazyCacheNode

        for threshold in THRESHOLDS:
            model = LazyCacheNode.execute(self._model(run), threshold, 0.15, 0.95, False).args[0]
            yield Setting("lazycache", f"threshold {threshold}", model, None, run.steps)


# What follows from the rows ----------------------------------------------------------------------------


def _finished(rows: list[dict], run: str, method: str) -> bool:
    """Whether all plans of a method were measured in a run."""
    return sum(r["run"] == run and r["method"] == method and "%:" in r["setting"] for r in rows) >= len(SAVED)


def _points(rows: list[dict], run: str, *methods: str) -> list[tuple[float, float]]:
    return [(r["saved"], r["psnr"]) for r in rows if r["run"] == run and r["method"] in methods and "psnr" in r]


def _measured(points: list[tuple[float, float]], saved: float) -> float | None:
    """The best that was measured with at least so much saved."""
    return max((quality for s, quality in points if s >= saved - 1e-3), default=None)


def _line(points: list[tuple[float, float]], saved: float) -> float | None:
    """Between the points, straight."""
    at = sorted(points)
    if not at or not at[0][0] <= saved <= at[-1][0]:
        return None
    return float(np.interp(saved, [s for s, _ in at], [quality for _, quality in at]))


def summary(rows: list[dict]) -> dict[str, float]:
    """The keys of the record that the rows suffice for.

    Ours is what was measured, with at least so much saved; fewer steps and peers are read off between their points.
    """
    rows = [row for row in rows if row["part"] == PART]
    runs = sorted({row["run"] for row in rows})
    found: dict[str, float] = {}
    for prefix, method in (("", OURS), ("uncalibrated_", UNCALIBRATED)):
        for key, run, least in (
            ("saving_at_35db_euler20_cfg3", "euler-20-cfg3", 35),
            ("saving_at_44db_euler50_cfg3", "euler-50-cfg3", 44),
            ("saving_at_32db_dpmpp_2m20_cfg7", "dpmpp_2m-20-cfg7", 32),
        ):
            points = _points(rows, run, method)
            if _finished(rows, run, method):
                found[prefix + key] = max((s for s, quality in points if quality >= least), default=0.0)
        leads: dict[str, list[float]] = {"fewer_steps": [], "best_peer": []}
        for run in runs:
            mine, fewer = _points(rows, run, method), _points(rows, run, FEWER)
            deterministic = RUNS[run].counts
            # SDE runs are not hopeless at 20%; beyond that nothing comes near.
            for saved in (0.4, 0.5) if deterministic else (0.2,) if run.startswith("dpmpp_2m_sde") else ():
                ours = _measured(mine, saved)
                if ours is None or not _finished(rows, run, method):
                    continue
                other = _line(fewer, saved)
                if deterministic and other is not None:
                    leads["fewer_steps"].append(ours - other)
                peers = [at_saving(points, saved) for p in PEERS if (points := _points(rows, run, p))]
                reached = [quality for quality in peers if quality is not None]
                if reached:
                    leads["best_peer"].append(ours - max(reached))
        for name, values in leads.items():
            if values:
                found[f"{prefix}lead_over_{name}_db"] = min(values)
    dial = [
        quality - other
        for run in runs
        for saved, quality in _points(rows, run, "dial")
        if RUNS[run].counts and (other := _line(_points(rows, run, FEWER), saved)) is not None
    ]
    if dial:
        found["dial_lead_over_fewer_steps_db"] = min(dial)
    found["runs_measured"] = sum(_finished(rows, run, OURS) and bool(_points(rows, run, FEWER)) for run in runs)
    for run in runs:
        for method in (OURS, UNCALIBRATED):
            at = _measured(_points(rows, run, method), 0.4)
            if at is not None:
                found[f"psnr_at_40pct_{method}_{run}"] = at
    return found
