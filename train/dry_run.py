"""What a run will do, without doing it: its settings, what it trains and what memory it takes.

Networks are built on the meta device, so the plan of a large run costs no memory.

    python -m train.dry_run

prints which recipe fits which card, the table in docs/training.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asdm_core.architecture import Architecture
from asdm_core.measure import costs, total
from asdm_core.surgery import cut_diffusers

from . import networks
from .attention import BmmAttention
from .config import Config
from .recipe import load
from .sections import PRECISIONS
from .losses import LOSSES
from .data import pooled_width
from .optimisation import KINDS
from .rollout import Course, few_steps
from .vgg import VGG16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process. Not counted: buffers of the libraries, a sharded run's layer at work, the classifier of the
    emoji family.

    copies: of weights, in the precision of the forward pass, which autocast keeps for the backward pass. compared: what
    the losses between both networks keep. perceptual: VGG16 and what it keeps. cpu: what lies in the memory of the
    machine instead, with run.offload: moments and average, and weights and gradients on their way.
    """

    teacher: int
    student: int
    gradients: int
    optimiser: int
    average: int
    activations: int
    copies: int
    compared: int
    perceptual: int
    cpu: int = 0

    @property
    def total(self) -> int:
        """Of the card."""
        return sum(vars(self).values()) - self.cpu


class Autocast(TorchFunctionMode):
    """What torch.autocast does, for tensors without numbers, which it leaves alone: products in `half`, and on a GPU
    norms and softmax in float32 (the lists of torch's documentation of autocast, as far as a UNet needs them).

    copies: storages that are copies of weights.
    """

    HALF = frozenset(
        {F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm}
    )
    FLOAT32 = frozenset({F.group_norm, F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.mse_loss})

    def __init__(self, half: torch.dtype, on_cpu: bool = False):
        super().__init__()
        self.half = half
        self.float32 = frozenset({F.mse_loss}) if on_cpu else self.FLOAT32
        self.copies: dict[int, object] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.HALF:
            args = tuple(self._cast(a, torch.float32, self.half) for a in args)
        elif func in self.float32:
            args = tuple(self._cast(a, self.half, torch.float32) for a in args)
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any, of: torch.dtype, to: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype != of or of == to:
            return value
        cast = value.to(to)
        if isinstance(value, nn.Parameter):
            self.copies[_id(cast)] = cast  # held, so that no storage of another comes to its place
        return cast


def _id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Kept:
    """Bytes that a forward pass on the meta device keeps for the backward pass, by the part of the network at work."""

    def __init__(self, module: nn.Module):
        self.own = {_id(p) for p in (*module.parameters(), *module.buffers())}
        self.tensors: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.seen: dict[int, object] = {}  # holds the storages, so that no id comes twice
        self.at = ""

    @contextmanager
    def counted(self, precision: torch.dtype, on_cpu: bool = False) -> Iterator[None]:
        mode = Autocast(precision, on_cpu)

        def pack(tensor: Tensor) -> Tensor:
            number = _id(tensor)
            if number not in self.own and number not in self.seen:
                self.seen[number] = tensor
                (self.copies if number in mode.copies else self.tensors)[self.at] += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mode:
            yield


class _CountedAttention(torch.autograd.Function):
    """Attention that computes nothing and keeps what fused attention keeps."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class _CountingProcessor:
    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return attn.to_out[0](_CountedAttention.apply(attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))


def carried(config: Config) -> list[tuple[int, ...]]:
    """Shapes of the matrices by which units take over what changes in others, where a recipe trains these."""
    return [slot.shape for slot in config.carry.keys(config.architecture).values()] if config.carry else []


def meta_student(config: Config) -> UNet2DConditionModel:
    """The student of a recipe without weights, with the trained units marked."""
    with torch.device("meta"):
        student = networks.build(config)
        teacher = networks.build(config) if config.experts.start == "clme" else student
    cut_diffusers(student, config.architecture)
    networks.give_experts(student, teacher, config)
    networks.give_gains(student, config.network.config, config.gains, config.gri)
    networks.give_lora(student, config, networks.without_lora(config))
    networks.freeze(student, config)
    half = PRECISIONS[config.run.precision]
    if half != torch.float32 and not config.run.shard:
        networks.hold_frozen(student, None, half)
    return student


def activations(student: UNet2DConditionModel, config: Config, on_cpu: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass of one micro batch keeps for the backward pass: activations, and copies of weights.

    Counted on the meta device. on_cpu: with the attention that trains there, which keeps its probabilities. With
    gradient checkpointing: the inputs of all checkpointed parts, what lies between them, and what the largest one keeps
    while it is computed again.
    """
    kept, inputs = Kept(student), 0
    handles = []
    for name, module in student.named_modules():
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):

            def enter(module, args, kwargs, name=name):
                nonlocal inputs
                inputs += (args[0] if args else kwargs["hidden_states"]).nbytes
                kept.at = name

            def leave(module, args, output):
                kept.at = ""

            handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    counting: Any = BmmAttention() if on_cpu else _CountingProcessor()
    student.set_attn_processor(counting)
    with kept.counted(PRECISIONS[config.run.precision], on_cpu):
        _forward(student, config)
    for handle in handles:
        handle.remove()
    if not config.run.checkpoint_gradients:
        return kept.tensors.total(), kept.copies.total()
    largest = max((name for name in kept.tensors if name), key=lambda name: kept.tensors[name] + kept.copies[name])
    return kept.tensors[""] + inputs + kept.tensors[largest], kept.copies[""] + kept.copies[largest]


def _forward(student: UNet2DConditionModel, config: Config) -> Tensor:
    """What a student predicts for one micro batch, all of it on the meta device."""
    unet, side, size = config.network.config, config.data.side, config.run.micro_batch
    # Gains are not seen here, because attention is only counted: with them everything keeps what its input's gradient
    # needs.
    x = torch.empty(size, unet.in_channels, side, side, device="meta", requires_grad=config.gains is not None)
    arguments = (x, torch.zeros(size, device="meta"), torch.empty(size, 77, unet.context_dim, device="meta"))
    pooled = pooled_width(unet)
    added = (
        {"text_embeds": torch.empty(size, pooled, device="meta"), "time_ids": torch.empty(size, 6, device="meta")}
        if pooled
        else None
    )
    return student(*arguments, added_cond_kwargs=added, return_dict=False)[0]


def compared(student: UNet2DConditionModel, config: Config) -> int:
    """Bytes that the losses between both networks keep of one micro batch: what the teacher gave. The student keeps its
    own features.
    """
    if not any(LOSSES[name] for name in config.loss.weights):
        return 0
    numbers = 0

    def count(module, args, output):
        nonlocal numbers
        numbers += (output[0] if isinstance(output, tuple) else output).numel()

    taps = {tap.student for kind in config.taps.values() for tap in kind}
    handles = [student.get_submodule(path).register_forward_hook(count) for path in taps]
    counting: Any = _CountingProcessor()
    student.set_attn_processor(counting)
    with torch.no_grad():
        predicted = _forward(student, config)
    for handle in handles:
        handle.remove()
    return (numbers + predicted.numel()) * PRECISIONS[config.run.precision].itemsize


def perceptual(config: Config) -> int:
    """Bytes of the perceptual loss's VGG16, of what it keeps of the student's pictures, and of the teacher's levels."""
    if not config.loss.perceptual or config.loss.classifier:
        return 0
    with torch.device("meta"):
        net = VGG16().requires_grad_(False)
        pictures = torch.empty(config.run.micro_batch, 3, config.data.side, config.data.side, requires_grad=True)
        kept = Kept(net)
        with kept.counted(torch.float32):  # the losses stand outside of autocast
            levels = net(pictures)
    return (
        sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
        + kept.tensors.total()
        + sum(level.nbytes for level in levels)
    )


def memory(student: UNet2DConditionModel, config: Config, processes: int, on_cpu: bool = False) -> MemoryEstimate:
    shared = processes if config.run.shard else 1
    units = [p.shape for p in student.parameters() if p.requires_grad]
    learns = carried(config) or units
    trained = sum(map(math.prod, learns))
    moments = KINDS[config.optimiser.kind].moments
    kept_moments = round(sum(math.prod(shape) * moments(shape) for shape in learns))
    half = PRECISIONS[config.run.precision].itemsize
    draws = config.data.source == "prompts" or config.rollout.steps
    needs_teacher = draws or any(LOSSES[name] for name in config.loss.weights)
    teacher = Architecture.full(config.network.config).params if needs_teacher else 0
    kept, copies = activations(student, config, on_cpu)
    # What is frozen and in half precision is the teacher's own, where there is one.
    held = sum(p.nbytes for p in student.parameters() if p.dtype != torch.float32) if teacher else 0
    # What a style adds to the trained weights, and the sums; what they take over, with the gradients of all of it.
    in_units = sum(map(math.prod, units))
    ridden = 8 * in_units if config.styles.many else 0
    ridden += 12 * in_units if config.carry else 0
    return MemoryEstimate(
        teacher=teacher * half,
        student=(sum(p.nbytes for p in student.parameters()) - held) // shared + ridden,
        gradients=4 * trained // shared,
        optimiser=0 if config.run.offload else kept_moments // shared,
        average=0 if config.run.offload else 4 * trained // shared,
        activations=kept,
        copies=copies,
        compared=compared(student, config),
        perceptual=perceptual(config),
        cpu=kept_moments + 12 * trained if config.run.offload else 0,
    )


def report(config: Config, processes: int, on_cpu: bool = False) -> str:
    """The whole plan as text. on_cpu: for a run on the CPU. Raises ValueError where the run could not start."""
    student = meta_student(config)
    accumulation = config.accumulation(processes)
    trained: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for unit in config.architecture.kept:
        block = unit.block
        # Not unit.params: a transformer may have lost some of its blocks.
        parameters = list(student.get_submodule(unit.diffusers).parameters())
        kept[block] += sum(p.numel() for p in parameters)
        trained[block] += 0 if config.carry else sum(p.numel() for p in parameters if p.requires_grad)
    lines = [config.to_text(), "", f"{'block':<8}{'M parameters':>14}{'M trained':>12}"]
    lines += [f"{block:<8}{kept[block] / 1e6:>14.3f}{trained[block] / 1e6:>12.3f}" for block in kept]
    lines += [f"{'all':<8}{kept.total() / 1e6:>14.3f}{trained.total() / 1e6:>12.3f}", ""]
    if shapes := carried(config):
        count = sum(map(math.prod, shapes))
        lines += [f"trained are {count / 1e6:.3f} M numbers by which units take over what changes in others", ""]
    lines += [f"taps of {kind}: {', '.join(tap.name for tap in found)}" for kind, found in config.taps.items()]
    need = memory(student, config, processes, on_cpu)
    lines += ["", "memory of one process, estimated:"]
    lines += [f"  {name:<12}{_size(value):>12}" for name, value in vars(need).items() if name != "cpu"]
    lines += [
        f"  {'all':<12}{_size(need.total):>12}",
        *([f"and {_size(need.cpu)} of the machine's memory for moments and average"] if need.cpu else []),
        "",
        f"{config.run.steps} steps of {config.run.batch} samples: {processes} x {accumulation} x "
        f"{config.run.micro_batch} "
        f"(processes, parts, micro batch)",
        *_rollout(config),
        f"ends in {_products(config)}",
    ]
    return "\n".join(lines)


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _products(config: Config) -> str:
    if not config.makes_network:
        return f"{config.lora_file} (LoRA)"
    product = networks.describe_product(config, {})
    further = [product.training["pack"]] if "pack" in product.training else []
    further += [f"{config.lora_file.name} (LoRA)"] if config.lora.rank and config.lora.trained else []
    return " and ".join([f"{config.product} ({product.kind})", *further])


def _rollout(config: Config) -> list[str]:
    """What the bank of a rollout run takes, and the work of both networks."""
    if not config.rollout.steps:
        return []
    course = Course(config)
    unet = config.network.config
    side = config.data.side
    numbers = {course.trajectory(course.place(config.run.steps - 1, i).walk) for i in range(config.run.batch)}
    window = config.rollout.window
    count = (max(numbers) // window + 1) * window
    points = len(config.rollout.teacher_times) + 1
    size = 2 * count * (points * unet.in_channels * side**2 + 77 * unet.context_dim + pooled_width(unet))
    each = len(config.rollout.teacher_times) * (1 if config.rollout.guidance == 1 else 2)
    whole, kept = (total(costs(a, side, side)).total for a in (Architecture.full(unet), config.architecture))
    bank = count * each * whole
    # A step forward and backward is three forwards; where weights are frozen, somewhat less.
    student = 3 * config.run.steps * config.run.batch * kept
    few = few_steps(config.rollout)
    return [
        f"{few.steps} steps without guidance at t = {', '.join(map(str, few.times))}; the host's sampler "
        f"{few.sampler}, scheduler {few.scheduler}",
        f"bank: {count} trajectories of {each} forwards, {_size(size)} on disk",
        f"work: {2 * (bank + student) / 1e15:.3g} PFLOP, {bank / (bank + student):.0%} of it the bank; "
        f"{2 * (bank + student) / 50e12 / 3600:.3g} hours for each 50 TFLOP/s that a machine sustains",
    ]


# Which recipe fits which card -----------------------------------------------------------------------

CARDS = {6: 5.5, 8: 7.0, 12: 11.0, 16: 15.0, 24: 22.5, 40: 38.0, 80: 76.0}  # GB as they are sold: GiB that are free
MICRO_BATCHES = (None, 4, 1)


def needs(recipe: Path) -> list[float]:
    """GiB of a recipe as it is and with smaller micro batches."""
    found = []
    for micro in MICRO_BATCHES:
        given = load(recipe, ["network.teacher=x", *([f"run.micro_batch={micro}"] if micro else [])])
        found.append(memory(meta_student(given), given, 1).total / 2**30)
    return found


def fits(gib: float) -> str:
    return next((f"{card} GB" for card, free in CARDS.items() if gib <= free), "none of these")


def table(recipes: Sequence[Path]) -> str:
    """A row for each recipe, in Markdown."""
    lines = [
        "| recipe | as it is | `run.micro_batch=4` | `=1` | of it trained | on the CPU | fits, as it is and with 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        config = load(recipe, ["network.teacher=x"])
        student = meta_student(config)
        units = sum(p.numel() for p in student.parameters() if p.requires_grad)
        trained = sum(map(math.prod, carried(config))) or units
        whole, four, one = needs(recipe)
        cpu = memory(student, config, 1).cpu / 2**30
        lines.append(
            f"| `{recipe.stem}` | {whole:.1f} | {four:.1f} | {one:.1f} | {trained / 1e6:.0f} M | "
            f"{f'{cpu:.0f}' if cpu else ''} | {fits(whole)}, {fits(one)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = sorted(Path(__file__).with_name("configs").glob("sd*.toml"))
    print(table(found))
