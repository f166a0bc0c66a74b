"""What tells one MODEL from another, the same after a restart: its weights, sampled, and what stands on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from . import bypass
from .technique import techniques_of
from .unpatched import Unpatched

TENSORS, NUMBERS = 32, 64  # so many tensors are looked at, with so many numbers of each
PATCHED = 16  # so many patched weights


def fingerprint(model, without: Callable[[Any], bool]) -> str:
    """A digest of a MODEL's network and of what stands on the MODEL; without: techniques that do not count.

    Reads a few thousand numbers, whatever the size of the network, and the weights as they were before LoRAs were
    written into them. A LoRA in bypass mode counts as the same one in the weights, which paints the same.
    """
    patches, injections = bypass.apart(model)
    found = [
        type(model.model.diffusion_model).__name__,
        *_weights(model),
        *_patches(patches),
        *(f"object {name} {type(thing).__name__}" for name, thing in sorted(model.object_patches.items())),
        *sorted(f"injected {_names(injection.inject)}" for injection in injections),
        *_options(model.model_options),
        *(f"{t.key} {plain(t)}" for t in techniques_of(model) if not without(t)),
    ]
    sampling = model.get_model_object("model_sampling")
    found += [
        *(kind.__name__ for kind in type(sampling).__mro__),
        f"{float(sampling.sigma_max):.4g} {float(sampling.sigma_min):.4g}",
    ]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:32]


def _evenly(names: Sequence[str], count: int) -> Sequence[str]:
    step = max(1, len(names) // count)
    return names[::step][:count]


def numbers_of(tensor: Tensor) -> str:
    """A few numbers of a tensor and its shape, in four digits: the same in whatever memory it lies."""
    try:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // NUMBERS)][:NUMBERS].float().cpu()
        return f"{tuple(tensor.shape)} {' '.join(f'{n:.3e}' for n in some.tolist())}"
    except (RuntimeError, NotImplementedError, TypeError):  # of a kind that cannot be taken apart, quantised in groups
        return f"{tuple(tensor.shape)} {tensor.dtype}"


def _weights(model) -> list[str]:
    """The network's, without what the host has written into them."""
    weights = Unpatched(model)
    held = {name: tensor for name in weights if (tensor := weights.held(name)) is not None and tensor.dim() > 1}
    return [f"{len(weights)} tensors", *(f"{name} {numbers_of(held[name])}" for name in _evenly(sorted(held), TENSORS))]


def _patches(patches: Mapping[str, list]) -> list[str]:
    """LoRAs and merged weights: where, how strong, and some of their numbers."""
    found = [f"{len(patches)} patched"]
    for name in _evenly(sorted(map(str, patches)), PATCHED):
        for strength, value, strength_model, *_ in patches[name]:
            tensors = _tensors(value)[:2]
            found.append(f"{name} {strength:.4g} {strength_model:.4g} {' '.join(map(numbers_of, tensors))}")
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for part in value for tensor in _tensors(part)]
    return _tensors(getattr(value, "weights", ()))


def _options(options: Mapping[str, Any]) -> list[str]:
    """What other nodes put round the network: functions by their names, since they have no other that lasts."""
    found = []
    for name, value in sorted(options.items()):
        if name == "transformer_options":
            for kind, inside in sorted(value.items()):
                if kind in ("patches", "patches_replace"):
                    found += [f"{kind} {at} {_names(functions)}" for at, functions in sorted(inside.items())]
        elif callable(value) or isinstance(value, list) and value:
            found.append(f"{name} {_names(value)}")
    return found


def _names(functions: Any) -> str:
    if isinstance(functions, Mapping):
        return " ".join(f"{at} {_names(f)}" for at, f in sorted(functions.items(), key=lambda item: str(item[0])))
    if isinstance(functions, list | tuple):
        return " ".join(map(_names, functions))
    return str(getattr(functions, "__qualname__", type(functions).__qualname__))


def plain(value: Any) -> str:
    """What a piece of data says, without what differs from one process to the next."""
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{f.name}={plain(getattr(value, f.name))}" for f in fields(value) if f.compare)
        return f"{type(value).__name__}({inside})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{plain(k)}: {plain(v)}" for k, v in value.items())) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(plain, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, Tensor):
        return numbers_of(value)
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
