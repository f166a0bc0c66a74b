"""LoRAs: low-rank changes of linear layers and convolutions, trained through the merged weights.

    W = W_0 + (alpha / rank) up down        down: (rank, in * k * k), up: (out, rank), up = 0 at the start

The layer computes with W, so a step costs what one of the network alone costs, and the gradients of both factors come
from that of W. Files have kohya's names (LoCon where a convolution has one), which ComfyUI's Load LoRA reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from asdm_core import few_step
from asdm_core.addresses import UNetConfig, keys, lora_names, peft_names, select
from asdm_core.few_step import FewStep
from asdm_core.lora import Factors, factors_of, of_text_encoder
from asdm_core.tensor_file import TensorFile, write_file

from .config import Config
from .seeds import seeded

BASES = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}  # kohya's names of the families
MERGED = "parametrizations.weight"  # how the names of a layer with a LoRA go on


class Change(nn.Module):
    """The low-rank change of one weight."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator | None):
        super().__init__()
        outputs = weight.shape[0]
        inputs = weight[0].numel()
        self.scale = scale
        at = weight.device
        # The scale of down's start is free (up starts at 0): 1 / rank, and 1 / (rank k) for a convolution.
        std = 1 / (rank * (weight.shape[-1] if weight.dim() == 4 else 1))
        down = torch.empty(rank, inputs, device=at)
        if generator is not None:
            down = torch.randn(rank, inputs, generator=generator).to(at)
        self.down = nn.Parameter(down * std)
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=at))

    def forward(self, weight: Tensor) -> Tensor:
        # In float32, so that many small steps add up. What the layer computes with is rounded all the same, to the
        # precision of the run: a change of less than half a step of a bfloat16 weight (.2%) shows in the loss in part.
        return weight.float() + (self.scale * (self.up @ self.down)).float().view_as(weight)


def targets(student: nn.Module, config: Config, taken: set[str]) -> dict[str, nn.Module]:
    """The layers that get a LoRA, by name in a diffusers UNet: linears and, where the recipe asks, convolutions.

    taken: addresses of units that are trained themselves.
    """
    unet, architecture = config.network.config, config.architecture
    units = set(select(unet, config.lora.on)) - set(taken)
    found = {}
    for slot in architecture.keys("diffusers").values():
        name = slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight")
        if slot.unit.address not in units or len(slot.shape) < 2:
            continue
        layer = student.get_submodule(name)
        if len(slot.shape) == 2 or config.lora.convolutions:
            found[name] = layer
    if not found:
        raise ValueError(f"lora.on: {config.lora.on!r} holds no layer that {config.name} does not train already")
    return found


def rank_of(weight: Tensor, rank: int) -> int:
    """More than the rank of the weight itself would be of no use."""
    return min(rank, weight.shape[0], weight[0].numel())


def give_lora(student: nn.Module, config: Config, taken: set[str]) -> None:
    """Give layers of a live student their changes, in place: those of lora.start, else changes that do nothing yet."""
    if not config.lora.rank:
        return
    for number, layer in enumerate(targets(student, config, taken).values()):
        weight = layer.get_parameter("weight")
        rank = rank_of(weight, config.lora.rank)
        generator = None if weight.is_meta else seeded(config.seed, 11, number)
        scale = (config.lora.alpha or rank) / rank
        parametrize.register_parametrization(layer, "weight", Change(weight, rank, scale, generator), unsafe=True)
    if config.lora.start:
        _take(student, config)


def changes(student: nn.Module) -> dict[str, Change]:
    """The LoRA of a live student by the name of its layer."""
    ending = f".{MERGED}.0"
    return {n.removesuffix(ending): m for n, m in student.named_modules() if isinstance(m, Change)}


@torch.no_grad()
def _take(student: nn.Module, config: Config) -> None:
    try:
        file = TensorFile(config.lora.start)
    except (ValueError, OSError) as e:
        raise ValueError(f"lora.start: {e} Train the stage before this one first.") from None
    names = file_names(config.network.config)
    for name, change in changes(student).items():
        module = names[name]
        wanted = {"lora_down": tuple(change.down.shape), "lora_up": tuple(change.up.shape)}
        rank = file.shapes.get(f"{module}.lora_down.weight", (0,))[0]
        for (kind, shape), of_rank in zip(wanted.items(), (0, 1), strict=True):
            key = f"{module}.{kind}.weight"
            its = file.shapes.get(key)
            flat = [its[0], math.prod(its[1:])] if its else []
            fits = its and flat[of_rank] == rank and flat[1 - of_rank] == shape[1 - of_rank]
            if not fits or not 0 < rank <= shape[of_rank]:
                raise ValueError(
                    f"lora.start: {file.path.name} does not fit at {key}: wanted {list(shape)} or a smaller rank, got "
                    f"{list(its) if its else 'none'}; lora.on and lora.convolutions must be those it was trained with, "
                    "and lora.rank no smaller"
                )
        # What the file's rank leaves free does nothing yet, as in a LoRA without a start.
        change.down[:rank].copy_(file[f"{module}.lora_down.weight"].flatten(1))
        change.up.zero_()
        change.up[:, :rank].copy_(file[f"{module}.lora_up.weight"].flatten(1))
        alpha = float(file[f"{module}.alpha"]) if f"{module}.alpha" in file else rank
        change.up.mul_(alpha / rank / change.scale)


def file_names(config: UNetConfig) -> dict[str, str]:
    """Layer of a diffusers UNet -> its name in a kohya file: over diffusers names, for SDXL over LDM names."""
    names = {}
    for slot in keys(config, "diffusers").values():
        spelled = slot.unit.key(slot.tensor, "ldm" if config.adm_channels else "diffusers").removesuffix(".weight")
        names[slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight")] = (
            f"lora_unet_{spelled.replace('.', '_')}"
        )
    return names


def tensors_of(student: nn.Module, config: UNetConfig, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The LoRA of a live student as a file holds it."""
    names = file_names(config)
    found = {}
    for name, change in changes(student).items():
        shape = student.get_parameter(f"{name}.{MERGED}.original").shape
        down, up = change.down.detach(), change.up.detach()
        if len(shape) == 4:
            down = down.view(len(down), *shape[1:])
            up = up[..., None, None]
        module = names[name]
        found[f"{module}.lora_down.weight"] = down.to(dtype)
        found[f"{module}.lora_up.weight"] = up.to(dtype)
        found[f"{module}.alpha"] = torch.tensor(change.scale * change.down.shape[0], dtype=dtype)
    return found


def write_lora(
    path: Path, student: nn.Module, config: Config, training: Mapping, few: FewStep | None, licence: str | None
) -> None:
    """Write the LoRA of a live student, float16."""
    tensors = tensors_of(student, config.network.config)
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{path.name}: {key} is not finite, or too large for float16, so nothing was written. The training "
                "diverged: lower optimiser.lr and begin anew in another run.folder"
            )
    metadata = {
        "format": "pt",
        "ss_network_module": "lycoris.kohya" if config.lora.convolutions else "networks.lora",
        "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.alpha or config.lora.rank),
        "ss_base_model_version": BASES.get(config.network.family, config.network.family),
        "ss_v2": "False",
        "ss_output_name": path.stem,
        "asdm_training": json.dumps(dict(training)),
    }
    if config.lora.convolutions:
        metadata["ss_network_args"] = json.dumps({"algo": "locon", "conv_dim": str(config.lora.rank)})
    if licence:
        metadata["modelspec.license"] = licence
    if few is not None:
        metadata[few_step.METADATA_KEY] = json.dumps(few.to_dict())
    write_file(path, tensors, metadata)


class LoraFile(Mapping[str, Tensor]):
    """What a LoRA file adds to the weights of a UNet, float32, by their addressed LDM names, lazily.

    Names are those of `addresses.lora_names` and PEFT's. text: modules that are for text encoders. Raises ValueError
    for layers of another network, and for what is no LoRA (LoHa, LoKr and the like).
    """

    def __init__(self, path: str | os.PathLike[str], config: UNetConfig):
        file = TensorFile(path)
        self.path, self.text = file.path, 0
        self._file = file
        layers = {**lora_names(config), **peft_names(config)}
        self._factors: dict[str, Factors] = {}
        self._shapes = {key: slot.shape for key, slot in keys(config).items()}
        for module, factors in factors_of(file).items():
            if module not in layers:
                if not of_text_encoder(module):
                    raise ValueError(f"{file.path.name}: {module} is no layer of a UNet of {config.family}")
                self.text += 1
                continue
            if factors is None:
                raise ValueError(
                    f"{file.path.name}: {module} is changed otherwise than by a LoRA's two factors; give a LoRA, or "
                    "LoCon"
                )
            key = f"{layers[module]}.weight"
            sizes = file.shapes[factors.up][0], math.prod(file.shapes[factors.down][1:])
            wanted = self._shapes[key]
            if sizes != (wanted[0], math.prod(wanted[1:])):
                raise ValueError(
                    f"{file.path.name}: {module} changes a layer of {sizes[0]} outputs and {sizes[1]} inputs; in a "
                    f"UNet of {config.family} it has {wanted[0]} and {math.prod(wanted[1:])}"
                )
            self._factors[key] = factors

    @torch.no_grad()
    def __getitem__(self, key: str) -> Tensor:
        factors = self._factors[key]
        down, up = self._file[factors.down].float(), self._file[factors.up].float()
        scale = float(self._file[factors.alpha]) / len(down) if factors.alpha else 1.0
        return scale * (up.flatten(1) @ down.flatten(1)).view(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


@torch.no_grad()
def merge_file(unet: nn.Module, config: UNetConfig, path: Path) -> None:
    """Merge a LoRA file into a live diffusers UNet, in place; layers that are cut from it are left out. Raises
    ValueError for another's names.
    """
    names = {key: slot.unit.key(slot.tensor, "diffusers") for key, slot in keys(config).items()}
    live = dict(unet.named_parameters())
    for key, change in LoraFile(path, config).items():
        if names[key] in live:
            live[names[key]].add_(change)
