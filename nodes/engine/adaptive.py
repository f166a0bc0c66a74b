"""Whole steps left out as the run itself decides: by how little the first layer of the network has changed.

The first layer sees the latent and the noise level and no prompt, so one forward of a call stands for all of them, and
the largest change of any picture of the batch counts. Where it is small enough the forward ends there (`LeftOut`) and
the results are forecast; else it goes on as ever, and its first layer is what later ones are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...asdm_core.architecture import Architecture, first_resnet
from ...asdm_core.forecast import RESULT, UNGUIDED, Action, Adaptive, ForecastPlan, relative_change
from ...asdm_core.steps import Moment
from .forecasts import Forecaster, ForecastReport
from .technique import AtUNet, Forward, Log, Say, UNetInRun


class LeftOut(Exception):
    """Ends a forward whose result is forecast."""


class AdaptiveForecaster(Forecaster):
    """Carries an adaptive schedule out in one run. Holds no model."""

    def __init__(
        self,
        adaptive: Adaptive,
        log: Log[ForecastReport],
        sigmas: Sequence[float],
        positive: frozenset,
        say: Say,
        guided: tuple[float, float] = (0.0, 1.0),
    ):
        """guided: guidance acts between them only, in 0..1 of the run."""
        self._steps = max(len(sigmas) - 1, 1)
        super().__init__(ForecastPlan((Action(),) * self._steps), log, sigmas, positive, say)
        self._adaptive, self._guided = adaptive, guided
        self._run = 0  # evaluations in a row that were not made
        self._unets = 0
        self._call = 0  # within the evaluation
        self._first: dict[int, Tensor] = {}  # what the first layer made when it was last followed by the others
        self._newest: list[tuple[int, float]] = []
        self.watched: bool | None = None  # of the next forward: compared (True), only remembered, or neither
        self.leaving = False

    def at(self, unet: UNetInRun, model) -> AtUNet:
        self._unets += 1
        return _FirstLayer(self, unet)

    @property
    def _draws(self) -> bool:
        return self._unets == 1  # the work of several comes in threads

    def begin_evaluation(self, moment: Moment) -> None:
        super().begin_evaluation(moment)
        self._call, self.watched, self.leaving = 0, None, False

    def _decide(self, moment: Moment) -> tuple[int, Action]:
        if self._done:
            self._run = 0 if "F" in self._done[-1] or not self._done[-1] else self._run + 1
        self._unplanned -= 1
        start, end = self._guided
        if self._guided != (0.0, 1.0) and not start <= self._position / self._steps < end:
            return self._unplanned, Action(UNGUIDED)
        asks = self._adaptive.asks(self._steps, moment.step, self._run)
        return self._unplanned, Action(RESULT) if asks else Action()

    def _forecast(self, executor, model, conds, x, timestep, options, keys, now, first) -> list[Tensor] | None:
        self._call += 1
        if self._action.kind == UNGUIDED:
            return super()._forecast(executor, model, conds, x, timestep, options, keys, now, first)
        if not keys or self._action.kind != RESULT or self._results(keys, now, first) is None:
            self.watched = False
            return None
        known = next(iter(keys.values()))
        self._newest = [(k, point.position) for k, point in reversed(self._tracks[known].points.items())]
        self.watched = True
        try:
            results = executor(model, conds, x, timestep, options)
        except LeftOut:
            found = super()._forecast(executor, model, conds, x, timestep, options, keys, now, first)
            self._action = Action(RESULT)
            return found
        self._computed += len(keys)
        self._done[-1].add("F")
        self._remember(list(keys), keys, now, x, results)
        return results

    def saw(self, out: Tensor) -> None:
        """The first layer has played, in the forward that is watched."""
        compared, self.watched = self.watched, None
        before = self._first.get(self._call)
        if compared and before is not None and before.shape == out.shape:
            change = relative_change(out, before)
            action = self._adaptive.action(self._newest, self._position, change)
            if action.kind == RESULT:
                self._action, self.leaving = action, True
                return
        self._first[self._call] = out.clone()

    def bytes(self) -> int:
        return super().bytes() + sum(t.nbytes for t in self._first.values())

    def close(self) -> None:
        super().close()
        self._first.clear()


class _FirstLayer(AtUNet):
    """Watches the first layer of one UNet. It reads a number on its way, which no compiled graph could."""

    def __init__(self, run: AdaptiveForecaster, unet: UNetInRun):
        self._run = run
        self._address = first_resnet(unet.config, unet.cut).address

    def begin_forward(self, forward: Forward) -> None:
        self.name = "" if self._run.watched is None else "watched"

    def begin_again(self) -> None:
        self.name = ""

    def defies_graphs(self, patches: Mapping[str, list]) -> bool:
        return bool(self.name)

    def begin_layer(self, address: str, role: str) -> None:
        # Not as soon as it is known: those who measure layers have seen the first one end by now.
        if self._run.leaving:
            self._run.leaving = False
            raise LeftOut

    def end_layer(self, address: str, current: nn.Module, x: Tensor, out: Tensor) -> None:
        if address == self._address and self._run.watched is not None:
            self._run.saw(out)


def probe_elements(architecture: Architecture, shape: Sequence[int]) -> int:
    """Numbers that are remembered of the first layer for a batch of latents (B, C, H, W)."""
    first = first_resnet(architecture.config, architecture.cut)
    return first.channels_out * shape[0] * -(-shape[-2] // first.scale) * -(-shape[-1] // first.scale)
