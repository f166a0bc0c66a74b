"""The networks of a run: teacher, student, what of it is trained, and the file it ends in.

Stage 1 trains a cut copy of the teacher; stage 2 puts units of its product into the teacher again and
trains those alone. Both are the same code: names are shared, so a stage is an architecture, a start and
a set of trained units.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from asdm_core import condconv, few_step
from asdm_core.addresses import UNetConfig, in_order
from asdm_core.architecture import Architecture
from asdm_core.differences import played_in, to_difference
from asdm_core.gri import LogGains, gri_attention
from asdm_core.identity import Checkpoint
from asdm_core.packs import (
    Description,
    Loaded,
    ZERO_SNR_MARKER,
    carried_dtype,
    open_model,
    open_pack,
    open_unet,
    write_pack,
    write_unet,
)
from asdm_core.surgery import ADDRESSED, Form, convert, cut_diffusers, extract, load_units, modules
from asdm_core.tensor_file import rounded

from . import lora, schedules
from .config import Config
from .sections import Regional
from .lora import give_lora, write_lora
from .rollout import few_steps

OWN_STEM = ("stem.conv_in", "stem.norm_out", "stem.conv_out")
DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": "int8",
}


def build(config: Config) -> UNet2DConditionModel:
    """The unpruned network with fresh weights, on torch's current default device."""
    return UNet2DConditionModel.from_config(config.network.config.to_diffusers() | {"sample_size": config.data.side})


def load_teacher(config: Config) -> UNet2DConditionModel:
    """The teacher, float32 and frozen. Raises ValueError (BadFile) where the file is not the network the
    recipe names.
    """
    if config.network.teacher == "random":
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            return build(config).requires_grad_(False).eval()
    if not config.network.teacher:
        raise ValueError("network.teacher: give the file or the diffusers folder of the original UNet")
    found = open_unet(config.network.teacher)
    name, wanted = found.path.name, config.network
    architecture = found.description.architecture
    if architecture.config != wanted.config or architecture.cut:
        raise ValueError(
            f"network.teacher: {name} is a UNet of {architecture.config.family}"
            f"{', cut to ' + (architecture.name or 'a part of it') if architecture.cut else ''}; "
            f"wanted an unpruned one of {wanted.family}"
        )
    if found.description.prediction not in (None, wanted.prediction):
        raise ValueError(
            f"network.teacher: {name} predicts {found.description.prediction}, the recipe says "
            f"network.prediction = {wanted.prediction!r}"
        )
    teacher = build(config)
    sd = convert(dict(found.tensors), architecture, ADDRESSED, Form("diffusers", "addressed"))
    teacher.load_state_dict({k: v.float() for k, v in sd.items()})
    return teacher.requires_grad_(False).eval()


def teachers_weights(config: Config) -> Mapping[str, Tensor]:
    """network.teacher's weights by addressed LDM name, read when they are asked for."""
    if config.network.teacher == "random":
        return _weights(load_teacher(config), config.network.config)
    return open_unet(config.network.teacher).tensors


def trained_units(config: Config) -> tuple[str, ...]:
    """Addresses of the units that are trained, in the order of execution."""
    architecture = config.architecture
    if config.student.trained == "all":
        return tuple(u.address for u in architecture.kept)
    own = architecture.own if config.student.trained == "own" else ()
    return in_order(architecture.config, {*own, *(OWN_STEM if config.student.stem else ())})


def without_lora(config: Config) -> set[str]:
    """Addresses of the units that a LoRA leaves alone: one that is trained those that are trained themselves."""
    return set(trained_units(config)) if config.lora.trained else set()


def make_student(teacher: UNet2DConditionModel, config: Config) -> UNet2DConditionModel:
    """A cut copy of the teacher, with the units of the stage before where the recipe names one; frozen but for the
    trained units.
    """
    architecture = config.architecture
    student = copy.deepcopy(teacher)
    cut_diffusers(student, architecture)
    if config.student.start:
        load_units(student, "diffusers", architecture, _started(config, teacher))
    give_experts(student, teacher, config)
    give_gains(student, config.network.config, config.gains, config.gri)
    give_lora(student, config, without_lora(config))
    freeze(student, config)
    return student


def give_experts(student: nn.Module, teacher: nn.Module, config: Config) -> None:
    """Give a live student the further experts its recipe asks for, if any, in place."""
    settings, unet = config.condconv, config.network.config
    if settings is None:
        return
    if config.experts.start == "clme":
        whole = addressed(teacher, Architecture.full(unet))
        mine = addressed(student, config.architecture)
        _, tensors, _ = condconv.clme(whole, mine, unet, settings.experts, settings.form)
    else:
        tensors = condconv.start(unet, settings, config.experts.start, config.seed)
    condconv.install(student, "diffusers", unet, settings, tensors)


class RegionalAttention(nn.Module):
    """GRI self-attention for a diffusers UNet on square maps, with a trainable log gain for each head, (heads,)."""

    def __init__(self, heads: int, settings: Regional, device: torch.device | None = None):
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(heads, device=device))
        self.settings = settings

    def forward(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states: (B, N, C)."""
        side = math.isqrt(hidden_states.shape[1])
        q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](
            gri_attention(q, k, v, side, side, self.settings.sized(side), log_gain=self.log_gain).flatten(2)
        )


def give_gains(student: nn.Module, config: UNetConfig, gains: LogGains | None, settings: Regional) -> None:
    """Let self-attentions of a live student be GRI with gains of 0, in place."""
    for attn in regional(student, config, gains).values():
        processor: Any = RegionalAttention(attn.heads, settings, attn.to_q.weight.device)
        attn.set_processor(processor)


def regional(student: nn.Module, config: UNetConfig, gains: LogGains | None) -> dict[str, Attention]:
    """The self-attentions that gains are for, by the log gain's name in a pack file."""
    found = {}
    for key, slot in gains.keys(config).items() if gains else ():
        attn = student.get_submodule(slot.unit.key(slot.tensor, "diffusers").removesuffix(".log_gain"))
        assert isinstance(attn, Attention)
        found[key] = attn
    return found


def set_attention(unet: UNet2DConditionModel, processor: Any) -> None:
    """Let a diffusers UNet compute its attention with a processor, but where it is GRI."""
    unet.set_attn_processor(
        {name: p if isinstance(p, RegionalAttention) else processor for name, p in unet.attn_processors.items()}
    )


def compile_parts(unet: nn.Module, backend: str) -> None:
    """Let torch.compile have the resnets and transformer blocks of a diffusers UNet, in place, by one of its backends.

    Not the whole: these few kinds of parts are compiled once each, and features are caught between them.
    """
    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
            module.compile(backend=backend)


def freeze(student: nn.Module, config: Config) -> None:
    """Let only the trained units, all further experts and all gains have gradients. The others stay in the graph: what
    lies before them needs theirs.
    """
    student.requires_grad_(False)
    parts = modules(student, config.architecture, "diffusers")
    for address in trained_units(config):
        parts[address].requires_grad_(True)
    for layer in student.modules():
        if isinstance(layer, condconv.CondConv2d):
            layer.experts.requires_grad_(True)
            layer.router.requires_grad_(config.experts.router)
        elif isinstance(layer, RegionalAttention):
            layer.log_gain.requires_grad_(True)
        elif isinstance(layer, lora.Change):
            layer.requires_grad_(config.lora.trained)


def hold_frozen(student: nn.Module, teacher: nn.Module | None, half: torch.dtype) -> set[str]:
    """Hold the frozen weights of a live student in the precision of the forward pass, in place: the teacher's own ones
    where it has them in that precision. Returns the names of those that are now one with the teacher's.

    Autocast would make such a copy for every step, so nothing that is computed changes. Norms and biases stay: what
    they weigh is computed in float32. So do convolutions with further experts, whose weights are summed.
    """
    mixed = tuple(f"{name}." for name, m in student.named_modules() if isinstance(m, condconv.CondConv2d))
    its = dict(teacher.named_parameters()) if teacher is not None else {}
    shared = set()
    for name, p in student.named_parameters():
        if p.requires_grad or p.dim() < 2 or name.startswith(mixed):
            continue
        source = its.get(name.replace(f"{lora.MERGED}.original", "weight"))
        if source is not None and source.dtype == half:
            p.data = source.data
            shared.add(name)
        else:
            p.data = p.data.to(half)
    return shared


def _started(config: Config, teacher: nn.Module) -> dict[str, Tensor]:
    """The tensors of this stage's own units in the product of the stage before; differences are the teacher's."""
    architecture = config.architecture
    try:
        opened = open_model(config.student.start)
    except ValueError as e:
        raise ValueError(f"student.start: {e} Train the stage before this one first.") from None
    if opened.description.family != architecture.config.family:
        raise ValueError(
            f"student.start: {opened.path.name} belongs to {opened.description.family}, this recipe to "
            f"{architecture.config.family}"
        )
    if opened.description.condconv or opened.description.gri or "pack" in opened.description.training:
        raise ValueError(
            f"student.start: {opened.path.name} has further experts or gains, which the next stage would lose; start "
            "from a student without"
        )
    own = set(architecture.own) | (set(OWN_STEM) if config.student.stem else set())
    missing = own - {slot.unit.address for key, slot in architecture.keys().items() if key in opened.tensors}
    if missing:
        raise ValueError(
            f"student.start: {opened.path.name} does not have {in_order(architecture.config, missing)[0]}, "
            f"which {config.name} trains"
        )
    opened = played_in(opened, _weights(teacher, architecture.config), "network.teacher")
    return {k: v.float() for k, v in extract(opened.tensors, architecture, own).items()}


def _weights(whole: nn.Module, config: UNetConfig) -> dict[str, Tensor]:
    """The weights of an unpruned live network by addressed LDM name."""
    return {key: p.detach() for key, p in addressed(whole, Architecture.full(config)).items()}


def assembled(whole: UNet2DConditionModel, path: str | os.PathLike) -> UNet2DConditionModel:
    """A copy of an unpruned UNet with a product in it: its units cut, those the product has replaced, further experts
    added.
    """
    opened = open_model(path)
    architecture = opened.description.architecture
    opened = played_in(opened, _weights(whole, architecture.config), "this UNet")
    result = copy.deepcopy(whole)
    cut_diffusers(result, architecture)
    load_units(
        result,
        "diffusers",
        architecture,
        {k: opened.tensors[k].float() for k in opened.tensors if k in architecture.keys()},
    )
    _join(result, open_pack(joining(opened.path)) if "pack" in opened.description.training else opened)
    result.eval()
    return result


def _join(unet: nn.Module, opened: Loaded) -> None:
    """Give a live UNet the further experts and the gains of a pack, in place."""
    description, config = opened.description, opened.description.architecture.config
    if description.condconv is not None:
        condconv.install(
            unet,
            "diffusers",
            config,
            description.condconv,
            {k: opened.tensors[k].float() for k in description.expert_keys},
        )
    give_gains(unet, config, description.gri, Regional(**description.training.get("gri", {})))
    for key, attn in regional(unet, config, description.gri).items():
        attn.get_parameter("processor.log_gain").data.copy_(opened.tensors[key])


def addressed(student: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of a live student under addressed LDM names, without its further experts."""
    # A convolution with further experts holds its own weights, expert 1, one level deeper.
    deeper = {f"{name}.conv.": f"{name}." for name, m in student.named_modules() if isinstance(m, condconv.CondConv2d)}
    live = {}
    for key, p in student.named_parameters():
        key = key.replace(f"{lora.MERGED}.original", "weight")
        path = key[: key.rindex(".") + 1]
        live[deeper.get(path, path) + key[len(path) :]] = p
    return {slot.unit.key(slot.tensor): live[key] for key, slot in architecture.keys("diffusers").items()}


def full_training(config: Config, training: Mapping) -> dict:
    """What the metadata of a product say of its training."""
    training = dict(training) | {"recipe": config.name, "seed": config.seed}
    if not config.network.noise.standard:
        training[schedules.KEY] = dict(config.network.noise.settings)
    if config.rollout.steps:
        training[few_step.KEY] = few_steps(config.rollout).to_dict()
    if config.lora.rank and config.makes_network:
        training["lora"] = (config.lora_file if config.lora.trained else Path(config.lora.start)).name
    if config.gains:
        training["gri"] = {"window": config.gri.window, "pool": config.gri.pool}
    return training


def describe_product(config: Config, training: Mapping) -> Description:
    """A pack where something is frozen, else a pruned UNet. Only a pack can hold further experts and gains itself."""
    architecture = config.architecture
    units = trained_units(config)
    training = full_training(config, training)
    if len(units) < len(architecture.kept):
        return Description(
            "pack",
            architecture,
            units,
            prediction=config.network.prediction,
            training=training,
            condconv=config.condconv,
            gri=config.gains,
        )
    if config.condconv or config.gains:
        training["pack"] = joining(config.product).name
    return Description("unet", architecture, prediction=config.network.prediction, training=training)


def joining(product: Path) -> Path:
    """The pack of experts and gains that belongs to a pruned UNet."""
    return product.with_name(f"{product.stem}-pack.safetensors")


def check_finite(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> None:
    """Raise ValueError where a number is not finite, or would not be in the dtype it is stored in."""
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name}: {key} holds numbers that are not finite, so nothing was written. The training diverged: "
                "lower optimiser.lr and begin anew in another run.folder"
            )
        if isinstance(dtype, torch.dtype) and not tensor.to(dtype).isfinite().all():
            raise ValueError(
                f"{name}: {key} is too large for {str(dtype).removeprefix('torch.')}, so nothing was written. Its "
                "checkpoint is whole: the same command with --set run.stored=bfloat16 writes it"
            )


def write_product(
    student: nn.Module, config: Config, training: Mapping, matrices: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Write the pack, or the pruned UNet and the pack of its experts and gains, and the LoRA of a finished run, under
    the teacher's licence. matrices: those of config.carry.
    """
    unet = config.network.config
    dtype = DTYPES[config.run.stored]
    teacher = None
    kept: dict[str, Tensor] = {ZERO_SNR_MARKER: torch.zeros(0)} if config.network.noise.zero_snr else {}
    if config.network.teacher != "random":
        opened = open_unet(config.network.teacher)
        teacher = opened.description
        kept |= {k: v for k, v in opened.markers.items() if k != ZERO_SNR_MARKER}

    def write_its_lora() -> None:
        few = few_steps(config.rollout) if config.rollout.steps else None
        licence = teacher.licence if teacher else None
        write_lora(config.lora_file, student, config, full_training(config, training), few, licence)

    if not config.makes_network:
        write_its_lora()
        return
    description = describe_product(config, training)
    if teacher:
        # A UNet of the embedded family goes with the teacher's text encoder and VAE.
        description = replace(
            description, licence=teacher.licence, companions=teacher.companions if description.kind == "unet" else {}
        )
    tensors = {k: v.detach().float() for k, v in addressed(student, config.architecture).items()}
    further = {
        k: attn.get_parameter("processor.log_gain").float() for k, attn in regional(student, unet, config.gains).items()
    }
    if config.condconv:
        further |= {k: v.float() for k, v in condconv.extract(student, "diffusers", unet, config.condconv).items()}
    if description.kind == "pack":
        tensors = extract(tensors, config.architecture, description.units)
    if description.kind == "pack" and config.styles.many:
        # What rounding them changes is in the differences, so nothing is carried over in the teacher.
        carried = rounded({k: m.detach().float().cpu() for k, m in matrices.items()}, carried_dtype(dtype))
        whole = Loaded(config.product, description, {k: t.cpu() for k, t in tensors.items()} | carried)
        name = Path(config.network.teacher).name
        description, changes = to_difference(whole, teachers_weights(config), name, config.carry)
        tensors = dict(changes)
    check_finite(config.product.name, tensors | further, dtype)  # before the first file is written
    if config.lora.rank and config.lora.trained:
        write_its_lora()
    if description.kind == "pack":
        write_pack(config.product, tensors | further, description, dtype)
        return
    write_unet(config.product, tensors, description, dtype, kept)
    if further:
        written = open_unet(config.product)
        joined = Description(
            "pack",
            Architecture.full(unet),
            prediction=description.prediction,
            training=description.training,
            condconv=config.condconv,
            gri=config.gains,
            licence=description.licence,
            made_for=Checkpoint.of(config.product.name, written.tensors, unet),
        )
        write_pack(joining(config.product), further, joined, dtype)
