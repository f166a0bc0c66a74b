"""Pure functions on state dicts, and in-place cuts of live networks.

State dicts are mappings of names to tensors; nothing is copied, tensors are passed on. Every tensor
is kept, renamed or dropped by the tables of `architecture`; a name no table knows is an error.
Unless a function says otherwise, state dicts are in the addressed LDM form without a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .addresses import Slot, Unit, walk
from .architecture import Architecture
from .text import printable

StateDict = dict[str, Tensor]


class Form(NamedTuple):
    """How a state dict names its tensors: layout "ldm" or "diffusers", numbering "addressed" or "renumbered"."""

    layout: str = "ldm"
    numbering: str = "addressed"


ADDRESSED = Form()


class Mismatch(ValueError):
    """A state dict does not fit an architecture; the message names the tensor, what was wanted and what came."""


def check(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Slot], what: str) -> None:
    """Raise Mismatch unless names and shapes are exactly the wanted ones. `what` names the thing in the message."""
    for key, slot in wanted.items():
        if key not in shapes:
            raise Mismatch(f"{what}: {key} is missing ({slot.unit.address}, wanted shape {list(slot.shape)})")
        if tuple(shapes[key]) != slot.shape:
            raise Mismatch(
                f"{what}: {key} ({slot.unit.address}) has shape {printable(list(shapes[key]))}, wanted "
                f"{list(slot.shape)}"
            )
    for key in shapes:
        if key not in wanted:
            raise Mismatch(f"{what}: unknown tensor {printable(key)}")


def shapes_of(sd: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the mapping's own `shapes` where it has one (a file need not be read for them)."""
    known = getattr(sd, "shapes", None)
    return dict(known) if known is not None else {k: tuple(v.shape) for k, v in sd.items()}


def convert(sd: Mapping[str, Tensor], architecture: Architecture, source: Form, target: Form) -> StateDict:
    """Rename every tensor from one form to another (LDM or diffusers, addressed or renumbered).

    Raises Mismatch if `sd` is not exactly a state dict of `architecture` in the form `source`, and
    ValueError if the target form does not exist for it.
    """
    wanted = architecture.keys(*source)
    check(shapes_of(sd), wanted, "state dict")
    names = {slot.unit.key(slot.tensor): key for key, slot in architecture.keys(*target).items()}
    return {names[slot.unit.key(slot.tensor)]: sd[key] for key, slot in wanted.items()}


def readdressed(source: Architecture, target: Architecture) -> dict[str, str]:
    """Addressed name in `target` -> addressed name in `source`, where both are one renumbered network.

    They differ only in which layers of the original the student's are said to be. Raises ValueError for different
    networks.
    """
    if source.renumbered.config != target.renumbered.config:
        raise ValueError(
            f"{target.name or 'the wanted UNet'} is another network than {source.name or 'the given one'}: it keeps "
            "other "
            "numbers of layers or transformer blocks"
        )
    old, new = (architecture.keys("ldm", "renumbered") for architecture in (source, target))
    return {new[key].unit.key(new[key].tensor): slot.unit.key(slot.tensor) for key, slot in old.items()}


def cut(sd: Mapping[str, Tensor], architecture: Architecture) -> tuple[StateDict, tuple[str, ...]]:
    """Cut a full UNet down to `architecture`. Returns the new state dict and the names that were dropped."""
    full = Architecture.full(architecture.config)
    check(shapes_of(sd), full.keys(), "full UNet")
    kept = architecture.keys()
    return {k: sd[k] for k in kept}, tuple(k for k in full.keys() if k not in kept)


def combine(
    trunk: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    architecture: Architecture,
    units: Iterable[str] | None = None,
) -> StateDict:
    """A combined UNet: `units` (default: all of `architecture.own`) from the student, the rest from the trunk.

    trunk: a full UNet, or one that has at least the units taken from it. student: likewise.
    """
    played = set(architecture.own if units is None else units)
    result: StateDict = {}
    for key, slot in architecture.keys().items():
        source, what = (student, "student") if slot.unit.address in played else (trunk, "trunk")
        result[key] = _take(source, key, slot, what)
    return result


def extract(sd: Mapping[str, Tensor], architecture: Architecture, units: Iterable[str]) -> StateDict:
    """The tensors of some units, under their addressed names: what a pack file holds."""
    chosen = set(units)
    unknown = chosen - {u.address for u in architecture.kept}
    if unknown:
        raise ValueError(f"{min(unknown)} is cut or unknown in this architecture, so it cannot be extracted")
    return {k: _take(sd, k, s, "student") for k, s in architecture.keys().items() if s.unit.address in chosen}


def _take(sd: Mapping[str, Tensor], key: str, slot: Slot, what: str) -> Tensor:
    if key not in sd:
        raise Mismatch(f"{what}: {key} is missing ({slot.unit.address}, wanted shape {list(slot.shape)})")
    tensor = sd[key]
    if tuple(tensor.shape) != slot.shape:
        raise Mismatch(f"{what}: {key} ({slot.unit.address}) has shape {list(tensor.shape)}, wanted {list(slot.shape)}")
    return tensor


# Live networks --------------------------------------------------------------------------------------


def modules(unet: nn.Module, architecture: Architecture, layout: str) -> dict[str, nn.Module]:
    """The module that plays each unit of a live skeleton, by address."""
    found = {}
    for u in walk(architecture.config):
        try:
            found[u.address] = unet.get_submodule(u.path(layout))
        except AttributeError:
            raise Mismatch(
                f"{type(unet).__name__} has no module {u.path(layout)} ({u.address}); "
                f"wanted an unpruned {architecture.config.family} UNet in {layout} form"
            ) from None
    return found


StandIn = Callable[[Unit, bool], nn.Module]


def cut_modules(unet: nn.Module, architecture: Architecture, layout: str, stand_in: StandIn) -> None:
    """Replace the cut units of a live full skeleton, in place.

    stand_in(unit, is_block): makes the module that passes the input on, of a kind the network's
    forward loop accepts; `is_block` for a single transformer block of that unit.
    Cut only networks you made: replacing modules of one that others hold changes it for them too.
    """
    modules(unet, architecture, layout)
    for u in walk(architecture.config):
        path = u.path(layout)
        if u.address in architecture.cut:
            _replace(unet, path, stand_in(u, False))
            continue
        for i, block in enumerate(u.blocks):
            if block in architecture.cut:
                _replace(unet, f"{path}.transformer_blocks.{i}", stand_in(u, True))


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent).add_module(name, module)


def pass_through(u: Unit, h: Tensor) -> Tensor:
    """What a cut unit returns for its input h of shape (B, C, H, W).

    Decoder resnets get cat(h, skip) and give back h, the first channels. Elsewhere it is a copy, not
    the same tensor: encoder outputs go onto the skip stack, where hosts add control residuals in place.
    """
    if u.side == "up":
        return h[:, : u.channels_in - u.skip_channels].contiguous() if u.kind == "resnet" else h
    return h.clone() if u.kind != "transformer" else h


class PassThrough(nn.Module):
    """Stand-in for a cut unit or transformer block of a diffusers UNet2DConditionModel."""

    def __init__(self, unit: Unit, is_block: bool):
        super().__init__()
        self.unit, self.is_block = unit, is_block

    def extra_repr(self) -> str:
        return f"cut {self.unit.address}" + (" block" if self.is_block else "")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if self.is_block:
            return hidden_states
        h = pass_through(self.unit, hidden_states)
        # diffusers asks its transformers for a tuple and its resnets and samplers for a tensor.
        return (h,) if self.unit.kind == "transformer" else h


def cut_diffusers(unet: nn.Module, architecture: Architecture) -> None:
    """Cut a live, unpruned diffusers UNet2DConditionModel in place."""
    cut_modules(unet, architecture, "diffusers", PassThrough)


@torch.no_grad()
def load_units(unet: nn.Module, layout: str, architecture: Architecture, sd: Mapping[str, Tensor]) -> None:
    """Copy the addressed tensors of `sd` into a live skeleton (cut or not), wherever they have a home.

    Raises Mismatch for a name or shape that fits no unit kept in `architecture`.
    """
    table = architecture.keys()
    parameters = dict(unet.named_parameters())
    for key in sd:
        if key not in table:
            raise Mismatch(f"state dict: unknown tensor {key}")
        slot = table[key]
        parameters[slot.unit.key(slot.tensor, layout)].copy_(_take(sd, key, slot, "state dict"))
