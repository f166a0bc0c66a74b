"""A node that holds the middle of a UNet over some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from comfy_api.latest import io

from ..asdm_core.addresses import unit
from ..asdm_core.hold import Hold
from .common import CATEGORY
from .engine import units
from .engine.network import architecture_of
from .engine.on_model import with_technique
from .engine.technique import COMPUTING, AtUNet, InRun, Technique


@dataclass(frozen=True)
class Held(Technique):
    hold: Hold

    key: ClassVar[str] = "toy"
    order: ClassVar[int] = COMPUTING
    role: ClassVar[str] = "held"

    def check(self, model):
        self.hold.unit(architecture_of(model).config)

    def device_bytes(self, model, shape, conds):
        return 4 * shape[0] * shape[2] * shape[3] * len(conds)

    def bind(self, start, say):
        say(f"the middle is held in {len(start.sigmas) - 1} steps.")
        return HeldInRun(self.hold)

    def label(self):
        return "held middle"

    def tells(self, model):
        return [f"The middle computes at every step divisible by {self.hold.interval}."]


class HeldInRun(InRun):
    def __init__(self, hold):
        self.hold = hold

    def at(self, unet, model):
        return HeldAtUNet(self.hold, unet)


class HeldAtUNet(AtUNet):
    """State over steps: what the middle transformer added at the last step that computed."""

    def __init__(self, hold, unet):
        self._hold, self._address = hold, hold.unit(unet.config)
        self._unit = unit(unet.config, self._address)
        self._computes, self._added, self._holds = True, None, False

    @property
    def name(self):
        return "holds" if self._holds else "adds"

    @property
    def held(self):
        return self._added if self._holds else None

    @held.setter
    def held(self, added):
        self._added = added

    def begin_evaluation(self, moment):
        self._computes = self._hold.computes(moment.step)

    def begin_forward(self, forward):
        fits = self._added is not None and self._added.shape[0] == forward.x.shape[0]
        self._holds = not self._computes and fits
        if self._holds:
            self._player = units.player(self._unit, lambda x: x + self._added)

    def player(self, address, current):
        return self._player if self._holds and address == self._address else current

    def role(self, address, role):
        return "held" if self._holds and address == self._address else role

    def end_layer(self, address, current, x, out):
        if address == self._address and not self._holds:
            self._added = out - x

    def close(self):
        self._added = None


class ASDMToy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMToy",
            display_name="Hold the Middle",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.Int.Input("interval", default=2, min=1, max=100)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, interval):
        return io.NodeOutput(with_technique(model, Held(Hold(interval))))
