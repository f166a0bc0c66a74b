"""What is checked and timed: networks, and a table of techniques. A technique more is a line more in TABLE.

Everything is made as in a workflow, by the nodes of the pack and of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from ..asdm_core import condconv, packs, tensor_file
from ..asdm_core.addresses import UNetConfig, keys
from ..asdm_core.architecture import FAMILIES, Architecture
from ..asdm_core.inheritance import DIALS
from . import narrow
from .faces import execute, pack_folder

LIKENESS = ("same to the eye", "close", "same motif")  # positions of Speed Up
LONG = 20  # steps of a run in which steps are left out
STUDENT = 1  # seed of the weights that packs play


@dataclass
class Network:
    """A MODEL to try techniques on. family: sd15 or sdxl, whose presets it takes. gri: settings of GRI that play.

    full: of full size, whose weights are drawn coarsely, and whose packs are in `dtype`.
    """

    name: str
    family: str
    config: UNetConfig
    model: Any
    gri: dict = field(default_factory=lambda: {"window": 4, "pool": 2})
    full: bool = False
    dtype: torch.dtype | None = None

    def written(self, name: str, description: packs.Description, tensors: dict) -> str:
        """The name of a pack that is written once."""
        file = f"{self.name} {name}.safetensors"
        if not (pack_folder() / file).exists():
            packs.write_pack(pack_folder() / file, tensors, description, self.dtype)
        return file

    def preset(self, name: str) -> str:
        """A pack of a preset, with random weights."""
        chosen = Architecture.preset(name, self.config)
        description = packs.Description("pack", chosen, chosen.pack_units())
        if self.full:
            return self.written(name, description, {k: t.to(self.dtype) for k, t in self._drawn(description)})
        weights = narrow.weights(self.config, STUDENT)
        return self.written(name, description, {k: weights[k] for k in description.keys()})

    def _drawn(self, description):
        return narrow.drawn(description.keys(), STUDENT, rows=True)

    def own_weights(self) -> str:
        """A pack of all layers of the MODEL itself."""
        chosen = Architecture.full(self.config)
        description = packs.Description(
            "pack", chosen, tuple(u.address for u in chosen.kept if not u.address.startswith("stem."))
        )
        state = self.model.model.diffusion_model.state_dict()
        dtype = next(t.dtype for t in state.values())
        name = f"own {dtype}".replace("torch.", "")  # a file of each type that its numbers were rounded to
        if dtype not in tensor_file.DTYPES.values():  # fp8, which the network computes in a wider type as well
            dtype = torch.float16
        return self.written(name, description, {k: state[k].cpu().to(dtype) for k in description.keys()})

    def experts(self, how: str) -> str:
        """A pack of two experts on the convolutions of the shallowest decoder layer that no preset cuts."""
        convs = [a for a in condconv.convolutions(self.config) if a.startswith(f"up.{self.config.levels - 1}.0.")]
        settings = condconv.CondConv(dict.fromkeys(convs, 2))
        description = packs.Description("pack", Architecture.full(self.config), condconv=settings)
        return self.written(f"experts {how}", description, condconv.start(self.config, settings, how))

    def applied(self, pack: str, model=None, **more):
        """A MODEL with a pack, by Apply Pack."""
        settings = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0, **more}
        return execute("ASDMApplyPack", model=model or self.model, pack_name=pack, **settings)[0]

    def attending(self, model=None, **more):
        """A MODEL with GRI Attention."""
        settings = {"stages": 2, "shifted": False, "start_percent": 0.0, "end_percent": 1.0, **self.gri, **more}
        return execute("ASDMGRIAttention", model=model or self.model, **settings)[0]

    def inheriting(self, preset, model=None):
        """A MODEL with Feature Inheritance: by a name of the dial, or by single settings (a dict)."""
        preset = preset if isinstance(preset, dict) else {"preset": preset}
        return execute(
            "ASDMFeatureInheritance",
            model=model or self.model,
            preset=preset,
            memory_limit_mb=0,
            keep_on_cpu=False,
        )[0]

    def sped_up(self, likeness, model=None):
        """A MODEL with Speed Up, whole steps alone."""
        return execute("ASDMSpeedUp", model=model or self.model, likeness=likeness, large_pictures=False)[0]

    def switched(self, second, at: float = 0.5, unit: str = "share of steps"):
        """A MODEL that gives over to a second one."""
        return execute(
            "ASDMSwitchUNet",
            model_first=self.model,
            model_second=second,
            switch_at=at,
            unit=unit,
            crossfade_steps=0,
        )[0]

    def sample(self, model, size=(16, 16), **more):
        """Latents of a run, on the CPU."""
        with torch.inference_mode():
            return narrow.sample(model, self.config, size, **more).float().cpu()


# Networks -------------------------------------------------------------------------------------------


def emoji(folder: Path) -> Network:
    """The embedded teacher."""
    model = execute("ASDMCheckpointLoader", ckpt_name="emoji-teacher.safetensors")[0]
    return Network("emoji", "sd15", FAMILIES["emoji"], model)


def random_narrow(name: str, family: str, config: UNetConfig, folder: Path) -> Network:
    return Network(name, family, config, narrow.model(folder, config))


NETWORKS: dict[str, Callable[[Path], Network]] = {
    "emoji": emoji,
    "narrow SD1.5": partial(random_narrow, "narrow SD1.5", "sd15", narrow.SD),
    "narrow SDXL": partial(random_narrow, "narrow SDXL", "sdxl", narrow.SDXL),
    "two levels": partial(random_narrow, "two levels", "sd15", narrow.SHORT),
}


def full_size(family: str, dtype: torch.dtype) -> Network:
    """SD1.5 or SDXL with random weights, as the stock loader gives them."""
    config = FAMILIES[family]
    state = {k: t.to(dtype) for k, t in narrow.drawn(keys(config), rows=True)}
    model = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": dtype})
    return Network(family, family, config, model, {"window": 0, "pool": 0}, True, dtype)


def context(config: UNetConfig, full: bool) -> dict:
    """The number of tokens of a prompt: 77 at full size."""
    tokens = 77 if full else 7
    return {"positive": narrow.cond(config, 1, tokens), "negative": narrow.cond(config, 2, tokens)}


# Techniques -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Technique:
    """make: Network -> MODEL. family: for presets of one family only. preset: whose work is known.

    ours: made by the pack, not by the host. headline: named in the report's one sentence. steps: of its runs, where
    what it does depends on them; 0 for those of the check. jump: how far its picture moves where rounding turns one of
    its choices: GRI puts a token into the cell with the nearest mean key, and two can be equally near.
    """

    name: str
    make: Callable[[Network], object]
    family: str = ""
    preset: str = ""
    ours: bool = True
    headline: bool = False
    steps: int = 0
    jump: float = 0.0


def pack(name: str, preset: str, family: str) -> Technique:
    return Technique(name, lambda n: n.applied(n.preset(preset)), family, preset)


def together(preset: str):
    """A pack, Speed Up, GRI attention and experts in one MODEL."""

    def make(n: Network):
        model = n.applied(n.experts("random"), n.applied(n.preset(preset)))
        return n.attending(n.sped_up("close", model))

    return make


def of_host(module: str, node: str, *inputs):
    """A MODEL by a node of the host."""

    def make(n: Network):
        import importlib

        return getattr(importlib.import_module(f"comfy_extras.{module}"), node).execute(n.model, *inputs)[0]

    return make


# More than the types round: a token that goes to another cell moves the picture at once.
JUMP = 0.02
NONE = Technique("none", lambda n: n.model, ours=False)
TABLE: tuple[Technique, ...] = (
    NONE,
    pack("M1", "m1", "sd15"),
    pack("M2", "m2", "sd15"),
    pack("M3", "m3", "sd15"),
    pack("Base", "base", "sd15"),
    pack("SSD-1B", "ssd-1b", "sdxl"),
    pack("Vega", "vega", "sdxl"),
    pack("KOALA-700M", "koala-700m", "sdxl"),
    Technique("GRI", lambda n: n.attending(), jump=JUMP),
    *(
        Technique(f"inheritance '{name}'", partial(Network.inheriting, preset=name), steps=LONG)  # late in a run
        for name in DIALS
    ),
    *(
        Technique(f"Speed Up '{name}'", partial(Network.sped_up, likeness=name), headline=name == "close", steps=LONG)
        for name in LIKENESS
    ),
    Technique("switch to M2", lambda n: n.switched(n.applied(n.preset("m2"))), "sd15"),
    Technique("switch to Vega", lambda n: n.switched(n.applied(n.preset("vega"))), "sdxl"),
    Technique("CondConv", lambda n: n.applied(n.experts("random"))),
    Technique("all together", together("m2"), "sd15", steps=LONG, jump=JUMP),
    Technique("all together", together("vega"), "sdxl", steps=LONG, jump=JUMP),
    Technique("EasyCache", of_host("nodes_easycache", "EasyCacheNode", 0.2, 0.15, 0.95, False), ours=False),
    Technique("HyperTile", of_host("nodes_hypertile", "HyperTile", 256, 2, 0, False), ours=False),
    Technique("ToMe", of_host("nodes_tomesd", "TomePatchModel", 0.3), ours=False),
)


def of(network: Network) -> tuple[Technique, ...]:
    """The techniques that go with a network."""
    return tuple(t for t in TABLE if t.family in ("", network.family))
