"""Deep copies of a MODEL: what other nodes have put on it acts on the copy's own network.

Their functions hold layers of the network that was there first, in closures and objects, and so do compiled modules: on
a copy they would go on playing that one.
"""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import PatcherInjection
from torch import nn

from . import bypass
from .network import ejected
from .rebinding import Opaque, Rebinding

_PREFIX = "diffusion_model"


def bind_to_copy(copy, model) -> list[str]:
    """Have what is on a deep copy of a MODEL act on the copy's own UNet. Returns where something holds layers of the
    MODEL and cannot be exchanged ("object_patches.diffusion_model.forward").
    """
    bypass.bind_to_copy(copy)
    # A patcher stands for whatever it has at the time.
    ignored = (comfy.model_patcher.ModelPatcher, comfy.model_base.BaseModel)
    rebinding, lost = Rebinding(_partners(copy, model), ignored, doubtful=False), []

    def bound(value, place: str):
        if type(value) is dict:
            return {name: bound(part, f"{place}.{name}") for name, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(bound(part, place) for part in value)
        if isinstance(value, PatcherInjection):
            return PatcherInjection(bound(value.inject, place), bound(value.eject, place))
        if not rebinding.concerns(value):
            return value
        try:
            return rebinding(value)
        except Opaque:
            lost.append(place)
            return value

    for part in ("object_patches", "model_options", "wrappers", "callbacks", "weight_wrapper_patches", "injections"):
        setattr(copy, part, bound(getattr(copy, part), part))
    return lost


def _partners(copy, model) -> dict[int, nn.Module]:
    """The copy's modules by the ids of those they were copied from, also of those that patches have replaced."""
    with ejected(model):
        own = dict(model.model.named_modules())
    theirs = [(path, module) for path, module in own.items()]
    for entry in comfy.model_management.current_loaded_models:
        if entry.model is not None and entry.model.model is model.model:
            for path, thing in entry.model.object_patches_backup.items():
                theirs += thing.named_modules(prefix=path) if isinstance(thing, nn.Module) else ()
    mine = dict(copy.model.named_modules())
    return {id(module): mine[path] for path, module in theirs if path.startswith(_PREFIX) and path in mine}
