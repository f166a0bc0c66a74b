"""The weights of a MODEL's checkpoint itself, without the LoRAs, merges and hooks that lie in the live ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import comfy.model_management
import torch
from torch import Tensor

from ...asdm_core.identity import COARSE, Checkpoint
from .network import architecture_of

_PREFIX = "diffusion_model."


class Unpatched(Mapping[str, Tensor]):
    """By addressed LDM name, on the CPU: as they are held, or float32 where the host has quantised them.

    Refers to the live weights, so it is not to be kept. Raises ValueError for weights that are no numbers by themselves
    (blocks of GGUF), when they are asked for.
    """

    def __init__(self, model):
        # The host's own answer to this question, with which it merges models.
        self._found = {key.removeprefix(_PREFIX): patches[0] for key, patches in model.get_key_patches(_PREFIX).items()}
        self.shapes = {key: tuple(weight.shape) for key, (weight, _) in self._found.items() if weight is not None}
        self.quantised = any(key.endswith(".comfy_quant") for key in self._found)

    def __getitem__(self, key: str) -> Tensor:
        weight, convert = self._found[key]
        plain = type(weight) in (Tensor, torch.nn.Parameter)
        if not plain and not self.quantised or not weight.is_floating_point():
            raise ValueError(
                f"the weight {key} of this MODEL is held as {type(weight).__name__} ({weight.dtype}), which another "
                "node's layers turn into numbers, so nothing can be added to it. Load the checkpoint in fp16, bf16 or "
                "fp8 by the stock nodes."
            )
        dtype = weight.dtype if plain and not self.quantised else torch.float32
        copy = comfy.model_management.cast_to_device(weight.detach(), torch.device("cpu"), dtype, copy=True)
        return convert(copy, inplace=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def plays(model, checkpoint: Checkpoint) -> bool:
    """Whether a MODEL's checkpoint is this one, as far as its dtype lets it be told."""
    weights = Unpatched(model)
    mine = Checkpoint.of("", weights, architecture_of(model).config)
    return not checkpoint.is_other(mine, COARSE if weights.quantised else (0.0, 0.0))
