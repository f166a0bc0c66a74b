"""The weights of a MODEL's checkpoint itself, without the LoRAs, merges and hooks that lie in the live ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from comfy.model_patcher import get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...asdm_core.identity import COARSE, Checkpoint
from .network import architecture_of, ejected

_PREFIX = "diffusion_model."


class Unpatched(Mapping[str, Tensor]):
    """By addressed LDM name, where they lie and as they are held, or float32 where the host has quantised them. These
    are the live weights where nothing patches them: neither to be kept nor to be changed.

    Raises ValueError for weights that are no numbers by themselves (blocks of GGUF), when they are asked for.
    """

    def __init__(self, model):
        self._found = {}
        with ejected(model):
            for key in [key for key, _ in model.model.named_parameters() if key.startswith(_PREFIX)]:
                weight = get_key_weight(model.model, key)[0]
                if (patched := model.backup.get(key)) is not None:
                    weight = patched.weight
                if (hooked := model.hook_backup.get(key)) is not None:
                    weight = hooked[0]
                self._found[key.removeprefix(_PREFIX)] = weight
        self.quantised = any(isinstance(weight, QuantizedTensor) for weight in self._found.values())

    def __getitem__(self, key: str) -> Tensor:
        return numbers(key, self._found[key])

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def held(self, key: str) -> Tensor | None:
        """The weight as its layer holds it, whatever that is; None where there is none."""
        return self._found.get(key)

    def number(self, key: str, at: int) -> float | None:
        """One number of a weight; None where the checkpoint lacks it or it is no number by itself."""
        try:
            return float(self[key].reshape(-1)[at])
        except (KeyError, ValueError):
            return None


def numbers(key: str, weight: Tensor) -> Tensor:
    """A weight of a live network as plain numbers: itself, or float32 where the host has quantised it.

    Raises ValueError where another node's layers turn it into numbers.
    """
    if isinstance(weight, QuantizedTensor):
        return weight.detach().dequantize().float()
    if type(weight) not in (Tensor, torch.nn.Parameter) or not weight.is_floating_point():
        raise ValueError(
            f"the weight {key} of this MODEL is held as {type(weight).__name__} ({weight.dtype}), which another "
            "node's layers turn into numbers, so nothing can be added to it. Load the checkpoint in fp16, bf16 or "
            "fp8 by the stock nodes."
        )
    return weight.detach()


def checkpoint_of(model, name: str) -> Checkpoint:
    """Which checkpoint a MODEL plays. name: of its file, for people."""
    return Checkpoint.read(name, Unpatched(model).number, architecture_of(model).config)


def plays(model, checkpoint: Checkpoint) -> bool:
    """Whether a MODEL's checkpoint is this one, as far as its dtype lets it be told."""
    rounded = COARSE if Unpatched(model).quantised else (0.0, 0.0)
    return not checkpoint.is_other(checkpoint_of(model, ""), rounded)
