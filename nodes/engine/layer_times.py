"""Timing the runs of a MODEL, evaluation by evaluation and layer by layer: what Measure Speed puts on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...asdm_core.addresses import unit
from ...asdm_core.architecture import Architecture
from ...asdm_core.measure import costs
from ...asdm_core.steps import Moment
from .forecasts import FORECAST
from .technique import LEFT_OUT, MEASURING, PLAYED, AtUNet, InRun, Log, Measured, Say, Start, Technique, UNetInRun
from .timing import Recorder


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of one run. Numbers only, so that it may outlive the run.

    shape: of the latents, (B, C, H, W). evaluations: (step, seconds, roles) of each; roles: see
    `InRun.evaluation_role`. layers: (address, role) -> seconds in all and calls; see `Technique.role`.
    """

    shape: tuple[int, ...]
    evaluations: Sequence[tuple[int, float, frozenset[str]]]
    layers: dict[tuple[str, str], tuple[float, int]]


@dataclass(frozen=True)
class Timed(Technique):
    """Has the runs of a MODEL timed."""

    log: Log[LayerTimes] = field(default_factory=Log, compare=False)

    key: ClassVar[str] = "times"
    order: ClassVar[int] = MEASURING

    def bind(self, start: Start, say: Say) -> InRun:
        return _InRun(self.log, Recorder(start.model.load_device), start.shape)


class _InRun(InRun):
    def __init__(self, log: Log[LayerTimes], recorder: Recorder, shape: tuple[int, ...]):
        self._log, self._recorder, self._shape = log, recorder, shape
        self._step = 0
        self._roles: list[frozenset[str]] = []
        self._seen, self._sees = False, False  # whether layers were seen in this evaluation, and in the first

    def at(self, unet: UNetInRun, model) -> AtUNet:
        return _Layers(self._recorder, self.saw)

    def begin_evaluation(self, moment: Moment) -> None:
        self._step, self._seen = moment.step, False

    def saw(self) -> None:
        """A layer is about to play; not called in compiled networks."""
        self._seen = True

    def predict(self, call: Callable, x: Tensor, timestep: Tensor, options: dict, seed):
        with self._recorder.evaluation(self._step):
            return call(x, timestep, options, seed)

    def end_evaluation(self, roles: frozenset[str]) -> None:
        self._sees |= self._seen and not self._roles  # nothing can have been in the network's place yet
        left_out = self._sees and not self._seen and FORECAST not in roles
        self._roles.append(roles | {LEFT_OUT} if left_out else roles)

    def close(self) -> None:
        times = zip(self._recorder.evaluations(), self._roles, strict=False)
        evaluations = [(step, seconds, roles) for (step, seconds), roles in times]
        self._log.last = LayerTimes(self._shape, evaluations, self._recorder.layers())


class _Layers(AtUNet):
    name = "timed"  # layers are seen by the dispatcher alone

    def __init__(self, recorder: Recorder, saw: Callable[[], None]):
        self._recorder, self._saw = recorder, saw
        # One at a time, and none that was broken off; of each UNet, which may run in threads beside one another.
        self._begun: tuple[str, Any] = "", None

    def begin_pass(self, number: int) -> None:
        self._saw()

    def begin_layer(self, address: str, role: str) -> None:
        if not torch.compiler.is_compiling():  # a compiled graph has no layers
            self._begun = role, self._recorder.now()

    def end_layer(self, address: str, current: nn.Module, x: Tensor, out: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._recorder.layer(address, *self._begun)


class MeasuredRun(Measured):
    """A measured run, and what its layers would have needed for more multiplications."""

    def __init__(self, times: LayerTimes, architecture: Architecture, techniques: Sequence[Technique]):
        whole, (height, width) = Architecture.full(architecture.config), times.shape[-2:]
        self.evaluations, self.layers = times.evaluations, times.layers
        self.left_out = {t.role: t.left_out(whole, height, width) for t in techniques if t.role}
        macs = {address: cost.total for address, cost in costs(whole, height, width).items()}
        self._config = architecture.config
        self._seconds: dict[str, float] = defaultdict(float)  # by kind of layer; "": of all kinds
        self._macs: Counter = Counter()
        for (address, role), (seconds, calls) in times.layers.items():
            left_out = self.left_out.get(role, {}).get(address)
            done = macs[address] - (left_out or 0)
            if done > 0 and (role == PLAYED or left_out is not None):  # what inherits does nothing of its own
                for kind in (self._kind(address), ""):
                    self._seconds[kind] += seconds
                    self._macs[kind] += calls * done

    def _kind(self, address: str) -> str:
        return unit(self._config, address).kind

    def needed(self, address: str, multiplications: float) -> float:
        kind = self._kind(address) if self._macs[self._kind(address)] else ""
        return multiplications * self._seconds[kind] / self._macs[kind] if self._macs[kind] else 0.0
