"""Feature inheritance inside a run: what is remembered, and who plays from memory.

A `FeatureCache` belongs to one UNet object in one run. Per evaluation it learns the step; per forward it
decides whether this forward computes, computes and records, or replays. It replays only if for every
chunk of the batch it holds features of exactly the step the plan names as source, recorded under the
same circumstances; in any other case the forward computes in full. Where a feature turns out not to fit
while layers already run, `Misfit` ends that forward, and it is computed again in full.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...asdm_core.addresses import Unit, UNetConfig, walk
from ...asdm_core.architecture import first_resnet
from ...asdm_core.forecast import relative_change
from ...asdm_core.inheritance import INHERITED, InheritedStep, Plan
from ...asdm_core.measure import output_size
from ...asdm_core.steps import Moment
from . import units
from .carried import overrides
from .circumstances import Content
from .technique import AtUNet, Forward, Misfit

COMPUTE, RECORD, REPLAY, PROBE = "compute", "record", "replay", "probe"

_PROBE = "probe"  # name of the first layer's output among the remembered tensors

# Anything here changes what a transformer block computes between its parts, so parts cannot be reused.
_BLOCK_PATCHES = ("attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch", "middle_patch")


@dataclass
class Entry:
    """Features of one chunk: the step they are from (and where within it), the circumstances they were made under,
    what the call showed, tensors by address.

    shapes: (C, H, W) of what every unit made that is not to compute on inherited steps.
    earlier, weight: for forecasts of the running forward, the features of the step before, and where it lies on the
    line from there (0) through this step (1).
    """

    step: int
    position: float
    circumstances: Hashable
    shown: Hashable = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    before: Entry | None = None  # the full step before, for forecasts
    earlier: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


class FeatureCache(AtUNet):
    """Features of one UNet object during one run."""

    def __init__(
        self,
        plan: Plan,
        config: UNetConfig,
        cut: frozenset[str],
        sigmas: Sequence[float],
        on_cpu: bool = False,
        content: Content | None = None,
    ):
        self.plan, self.config, self._on_cpu, self._content = plan, config, on_cpu, content
        self.inherited = InheritedStep.of(plan, config, cut)
        self.reuse = self.inherited.reuse
        self._sigmas = list(sigmas)
        self.steps = max(len(self._sigmas) - 1, 1)
        self._sources = plan.sources(self.steps)
        self._units = {u.address: u for u in walk(config)}
        self._forecasts = "forecast" in self.reuse.values()
        self._entries: dict[tuple, Entry] = {}
        self._playing: Mapping[str, nn.Module] = {}
        self._stand_ins: dict[str, nn.Module] = {}
        self._twins: dict[str, nn.Module] = {}
        # Adaptive plans look at the first layer's output, before anything could have been inherited.
        self._probe = first_resnet(config, cut).address if plan.schedule.mode == "adaptive" else None
        # For compiled graphs: tells what layers do in each mode from what they do under other plans.
        self.plan_name = hashlib.sha256(repr((sorted(self.reuse.items()), self._probe, on_cpu)).encode()).hexdigest()[
            :12
        ]
        self.step, self.position = 0, 0.0
        self._repeating = plan.schedule.repeating(self.steps)
        self._begun = self._repeats = self._returns = False
        self.entries: tuple[Any, ...] = ()  # of the chunks of the running forward
        self._device: torch.device | None = None  # of the running forward
        self._ordinals: Counter = Counter()
        self._whole: dict[tuple, int] = {}  # the most tensors that an entry had, by its key and circumstances
        # For the report: (step, mode) -> forwards, and the modes of each evaluation.
        self.counts: Counter = Counter()
        self.evaluations: list[Counter] = []
        # For each evaluation, whether the network was seen to play (True), another node answered in its place (False),
        # or neither can be told: compiled layers are not seen, nor any where nothing is asked of them.
        self.played: list[bool | None] = []
        self._passes = 0  # seen in this evaluation
        self._sees = False  # whether a pass was seen in this run
        self.peak = 0
        self.acts: bool | None = None  # whether replaying leaves out anything; None until a forward records or replays
        self._elsewhere = False
        self.moved = 0  # forwards that computed because they showed another part of the picture than before
        self.several = False  # whether the network is run more than once in a forward
        self.mode = COMPUTE

    # once per evaluation, once per forward ----------------------------------------------------------

    @property
    def name(self) -> str:  # type: ignore[override]  # never written here
        return "" if self.mode == COMPUTE else f"{self.mode}_{self.plan_name}"

    @property
    def held(self):
        # A probing forward is no graph, and what it holds is decided on its way.
        return None if self.mode in (COMPUTE, PROBE) else self.entries

    @held.setter
    def held(self, entries) -> None:
        self.entries = entries

    def begin_evaluation(self, moment: Moment) -> None:
        step, position = moment.step, moment.position
        self._repeats = self._begun and step == self.step and position is not None and self._repeating[step]
        if self._repeats and not self._returns:
            self._returns = True
            self._sources = self.plan.sources(self.steps, returns=True)
        self.step, self.position, self._begun = step, moment.place, True
        self._ordinals.clear()
        self.evaluations.append(Counter())
        self._passes = 0
        self.peak = max(self.peak, self.size())

    def begin_forward(self, forward: Forward) -> None:
        """Decide the mode of the forward that is about to run."""
        x, options = forward.x, forward.options
        uuids, conds = options.get("uuids"), options.get("cond_or_uncond")
        self.mode, self._elsewhere = COMPUTE, False
        patched = self.inherited.in_parts and self._blocks_patched(options)
        if uuids and conds and x.shape[0] % len(conds) == 0 and not patched and not self.several:
            self._keys = [self._key(u, c, x, len(conds)) for u, c in zip(uuids, conds, strict=True)]
            self.entries, self._circumstances, self._device = (
                tuple(self._entries.get(k) for k in self._keys),
                forward.circumstances,
                x.device,
            )
            for key, entry in zip(self._keys, self.entries, strict=True):
                if entry is not None:
                    made = key, entry.circumstances
                    self._whole[made] = max(self._whole.get(made, 1), len(entry.tensors))
            self._shown = self._what_is_shown(x)
            self.mode = self._adaptive_mode() if self._probe else self._planned_mode()
            self.moved += self._elsewhere and self.mode in (COMPUTE, RECORD)
            if self.mode != COMPUTE:
                self._make_players(forward.playing)
            if self.mode == RECORD:
                self._start_recording()
            if self.mode == REPLAY:
                self._aim()
        if self.mode != PROBE:
            self._count()

    def end_evaluation(self) -> None:
        """All forwards of the evaluation are over. Those in which another cache left out the network count for none."""
        modes = self.evaluations[-1]
        # A probing plan is seen where it probes, in compiled networks as well, so that not seeing it says nothing.
        if self._sees and not self._probe and not self._passes and not modes[COMPUTE]:
            self.counts.subtract({(self.step, mode): forwards for mode, forwards in modes.items()})
            modes.clear()
        self.played.append(False if not +modes else True if self._passes else None)

    def _count(self, forwards: int = 1) -> None:
        self.counts[self.step, self.mode] += forwards
        self.evaluations[-1][self.mode] += forwards

    def begin_pass(self, number: int) -> None:
        """Two passes would write over each other's features, and nobody says which of them the picture is."""
        self._passes, self._sees = self._passes + 1, True
        if number > 1 and self.mode != COMPUTE and not self.several:
            self.several = True
            raise Misfit("a second pass")

    def begin_again(self) -> None:
        """The running forward ended in a `Misfit`: its features are of no use, and it is to compute in full."""
        if self.mode == COMPUTE:  # the misfit was another's
            return
        self._count(-1)
        for key in self._keys:
            self._entries.pop(key, None)
        self.entries = (None,) * len(self._keys)
        self.mode = COMPUTE
        if self._probe and not self.several:
            self._start_recording()
        self._count()

    def _planned_mode(self) -> str:
        source = self._sources[self.step]
        if self._repeats and self._holds(lambda entry: entry.step == self.step):
            return REPLAY  # the sampler has come back to a step that computed
        if source < self.step:
            return REPLAY if self._holds(lambda entry: entry.step == source) else COMPUTE
        # Record what somebody will inherit. The last full steps record as well: compiled, they need no graph of their
        # own then.
        inheriting = [step for step, source in enumerate(self._sources) if source < step]
        needed = source in self._sources[self.step + 1 :] or inheriting and self.step > inheriting[-1]
        return RECORD if self._returns or needed else COMPUTE

    def _adaptive_mode(self) -> str:
        pinned = self.plan.schedule.computed(self.steps)[self.step]
        return (
            RECORD
            if pinned or not self._holds(lambda entry: entry.step < self.step and _PROBE in entry.tensors)
            else PROBE
        )

    def _holds(self, fits: Callable[[Entry], object]) -> bool:
        """Whether for every chunk something fitting is remembered, made under the circumstances of now and of the same
        part of the picture.
        """
        for key, entry in zip(self._keys, self.entries, strict=True):
            if entry is None or entry.circumstances != self._circumstances or not fits(entry):
                return False
            # Empty, or half full, where another cache kept the network, or most of it, from running on the step that
            # was to record.
            if len(entry.tensors) < self._whole[key, entry.circumstances]:
                return False
        if all(e.shown == shown for e, shown in zip(self.entries, self._shown, strict=True)):
            return True
        self._elsewhere = True
        return False

    def _what_is_shown(self, x: Tensor) -> tuple[Hashable, ...]:
        if self._content is None:
            return (None,) * len(self._keys)
        chunks = x.chunk(len(self._keys))
        return tuple(self._content.shown(key, chunk) for key, chunk in zip(self._keys, chunks, strict=True))

    def _start_recording(self) -> None:
        self.mode = RECORD
        entries = tuple(
            Entry(self.step, self.position, self._circumstances, shown, before=self._earlier(e, shown))
            for e, shown in zip(self.entries, self._shown, strict=True)
        )
        self._entries.update(zip(self._keys, entries, strict=True))
        self.entries = entries

    def _decide(self, probe: Tensor) -> None:
        """Adaptive: compare the first layer's output with the one of the last full step; each picture counts."""
        chunks = probe.chunk(len(self.entries))
        changes = [relative_change(now, e.tensors[_PROBE]) for now, e in zip(chunks, self.entries, strict=True)]
        change = float(torch.tensor(changes).max())  # no number where one of them is none: that is no small change
        if self.plan.schedule.inherits(self.steps, self.step, min(e.step for e in self.entries), change):
            self.mode = REPLAY
            self._aim()
        else:
            self._start_recording()
        self._count()

    def _aim(self) -> None:
        """Lay the line of each forecast."""
        for entry in self.entries if self._forecasts else ():
            # From a single step the line starts where it ends, so that compiled forecasts from one and from two steps
            # are the same graph. Views, because a graph would take notice of inputs that are one tensor.
            entry.earlier = (
                entry.before.tensors if entry.before else {a: t.view_as(t) for a, t in entry.tensors.items()}
            )
            entry.weight = torch.full((), self._weight(entry), device=self._device)

    def _weight(self, entry: Entry) -> float:
        if entry.before is None:
            return 1.0
        return 1 + (self.position - entry.position) / (entry.position - entry.before.position)

    def _key(self, uuid, cond, x: Tensor, chunks: int) -> tuple:
        # A uuid alone is not unique: area prompts copy it, extra guidance passes and tiles reuse it. The
        # ordinal tells the calls within one evaluation apart.
        base = (uuid, cond, x.shape[0] // chunks, *x.shape[1:], x.dtype)
        self._ordinals[base] += 1
        return (*base, self._ordinals[base])

    def _earlier(self, entry: Entry | None, shown: Hashable) -> Entry | None:
        if entry is None or not self._forecasts or entry.step > self.step:
            return None
        # A line from there would go through features of another cast, or of another part of the picture.
        if entry.circumstances != self._circumstances or entry.shown != shown:
            return None
        if entry.step == self.step:  # the step was evaluated before; two points so close give no direction
            return entry.before
        entry.before, entry.earlier = None, {}  # no more than two steps are remembered
        return entry

    @staticmethod
    def _blocks_patched(options: Mapping) -> bool:
        patches = options.get("patches", {})
        return any(patches.get(name) for name in _BLOCK_PATCHES) or any(options.get("patches_replace", {}).values())

    def defies_graphs(self, patches: Mapping[str, list]) -> bool:
        """Where a forward decides on its way what it inherits, and beside deep shrink, which reads the noise level at
        the end of a block: that breaks a graph there, and TorchCompileModel leaves out the guards by which the second
        piece would notice whether it is to inherit. What then computes in full is not worth the many graphs of its
        pieces.
        """
        return self.mode == PROBE or any(patches.get(n) for n in ("input_block_patch", "input_block_patch_after_skip"))

    # while layers run -------------------------------------------------------------------------------

    def player(self, address: str, current: nn.Module) -> nn.Module:
        """Who plays this unit in the running forward: `current`, or a stand-in that plays from memory."""
        if self.mode == COMPUTE:
            return current
        if self.mode == REPLAY and address in self._stand_ins:
            return self._stand_ins[address]
        return self._twins.get(address, current)

    def role(self, address: str, role: str) -> str:
        replays = self.mode == REPLAY and (address in self._stand_ins or address in self._twins)
        return INHERITED if replays else role

    def _make_players(self, playing: Mapping[str, nn.Module]) -> None:
        # Before layers run: compiled code makes no modules.
        if playing is not self._playing:
            self._playing = playing
            plays = {a: self._play(self._units[a], layer) for a, layer in playing.items()}
            self._stand_ins = {a: units.player(self._units[a], play) for a, play in plays.items() if play}
            self._twins = {
                a: self._twin(a, layer)
                for a, layer in playing.items()
                if a in self.inherited.in_parts and isinstance(layer, units.attention.SpatialTransformer)
            }
            twins = (module for twin in self._twins.values() for module in twin.modules())
            found = bool(self._stand_ins) or any(isinstance(module, _PartsBlock) for module in twins)
            self.acts = found or bool(self.acts)

    def _play(self, u: Unit, layer: nn.Module) -> Callable | None:
        """How a unit plays from memory; None if it computes."""
        cut = units.passes_on(layer)
        if u.address in self.inherited.recalls:
            return lambda x, shape=None: self.recall(u.address, self._shape(u, cut, x, shape))
        if u.address not in self.inherited.computes:
            # Zeros, not the input: the host writes into some of these, and the input may be somebody's skip.
            return lambda x, shape=None: x.new_zeros(self._shape(u, cut, x, shape))
        if u.address in self.inherited.residuals:
            return lambda x, shape=None: self.onto(self._shortcut(u, layer, x), u.address)
        return None

    def end_layer(self, address: str, current: nn.Module, x: Tensor, out: Tensor) -> None:
        """Record what a unit made of its input x, if somebody will need it."""
        if address == self._probe:
            if self.mode == PROBE:
                self._decide(out)
            if self.mode == RECORD:
                self.store(_PROBE, out.clone())
        if self.mode == RECORD and address not in self.inherited.computes:
            for entry in self.entries:
                entry.shapes[address] = tuple(out.shape[1:])
        if self.mode != RECORD or address not in self.inherited.kept:
            return
        if address in self.inherited.residuals:
            self.store(address, out - self._shortcut(self._units[address], current, x))
        else:
            # A copy: the host adds control residuals to this very tensor, FreeU writes into it.
            self.store(address, out.clone())

    @staticmethod
    def _shortcut(u: Unit, layer: Any, x: Tensor) -> Tensor:
        """The part of a unit's output that is never reused: its shortcut."""
        return layer.skip_connection(x) if u.kind == "resnet" and hasattr(layer, "skip_connection") else x

    def store(self, address: str, value: Tensor) -> None:
        if self._on_cpu and address != _PROBE:
            value = value.cpu()
        for entry, chunk in zip(self.entries, value.chunk(len(self.entries)), strict=True):
            entry.tensors[address] = chunk

    def recall(self, address: str, shape: Sequence[int]) -> Tensor:
        """The remembered feature for the whole batch, in memory of its own. Raises Misfit if it has another shape than
        wanted.
        """
        values = [self._value(entry, address, shape[1:]) for entry in self.entries]
        if sum(len(v) for v in values) != shape[0]:
            raise Misfit(address)
        return torch.cat(values).to(self._device)

    def onto(self, x: Tensor, address: str) -> Tensor:
        """A remembered residual on top of a fresh shortcut x. Raises Misfit."""
        return self.recall(address, x.shape) + x

    def _value(self, entry: Entry, address: str, shape: Sequence[int]) -> Tensor:
        value = entry.tensors.get(address)
        if value is None or value.shape[1:] != shape:
            raise Misfit(address)
        earlier = entry.earlier.get(address)
        if self.reuse.get(address) == "forecast" and earlier is not None and earlier.shape == value.shape:
            # A number of Python's would become part of a compiled graph.
            line = entry.weight if torch.compiler.is_compiling() else None
            value = torch.lerp(earlier, value, self._weight(entry) if line is None else line.to(value))
        return value

    def _shape(self, u: Unit, cut: bool, x: Tensor, output_shape: Sequence[int] | None) -> tuple[int, ...]:
        """Shape (B, C, H, W) of what a unit would make of its input x; output_shape: what the host wants of an
        upsampler.

        Raises Misfit if it was another one when features were recorded: then everything beneath belongs to another
        size.
        """
        size = output_size(u, cut, x.shape[2:], None if output_shape is None else output_shape[2:])
        shape = u.channels_out, *size
        if any(entry.shapes.get(u.address) != shape for entry in self.entries):
            raise Misfit(u.address)
        return x.shape[0], *shape

    def _twin(self, address: str, layer: Any) -> nn.Module:
        """The same transformer with blocks that can inherit their parts; shares all weights."""
        # Only the host's own blocks: cut ones have no parts, and a patched one may do anything.
        blocks = [
            _PartsBlock(block, f"{address}.{i}", self) if _is_plain(block) else block
            for i, block in enumerate(layer.transformer_blocks)
        ]
        return units.with_submodules(layer, {"transformer_blocks": nn.ModuleList(blocks)})

    # the sheet ---------------------------------------------------------------------------------------

    def replays(self) -> bool:
        """Whether all forwards of this evaluation so far played from memory."""
        return set(+self.evaluations[-1]) == {REPLAY}

    def replayed(self) -> list[bool]:
        """For each evaluation, whether all its forwards played from memory."""
        return [set(+modes) == {REPLAY} for modes in self.evaluations]

    def size(self) -> int:
        """Bytes held at the moment."""
        entries = list(self._entries.values())
        entries += [e.before for e in entries if e.before is not None]
        return bytes_of(t for e in entries for t in (*e.tensors.values(), *e.earlier.values()))

    def close(self) -> None:
        self._entries.clear()
        self.entries, self._playing, self._stand_ins, self._twins = (), {}, {}, {}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each place in memory once."""
    found = {}
    for t in tensors:
        try:
            found[t.data_ptr()] = t.nbytes
        except RuntimeError:  # of a kind without memory of its own, in samplers that take derivatives
            found[id(t)] = t.nbytes
    return sum(found.values())


def _is_plain(block: nn.Module) -> bool:
    """Whether a transformer block is the host's, with the methods of its class and a self-attention."""
    if type(block) is not units.attention.BasicTransformerBlock or overrides(block):
        return False
    return not block.disable_self_attn


class _PartsBlock(nn.Module):
    """A transformer block whose attn1, attn2 and ff each compute, record or inherit their residual.

    The one place where asdm has a forward of its own (the host has no door between these parts); used
    only when nobody patches the block. Same operations in the same order as the host's.
    """

    def __init__(self, block: nn.Module, address: str, memory: FeatureCache):
        super().__init__()
        self.block, self.address = block, address
        self._memory = [memory]  # in a list: not a submodule, and no cycle through nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options={}) -> Tensor:
        block: Any = self.block
        memory = self._memory[0]
        for part in ("attn1", "attn2", "ff"):
            address = f"{self.address}.{part}"
            inherits = address in memory.reuse
            if inherits and memory.mode == REPLAY:
                x = memory.onto(x, address)
                continue
            if part == "attn1":
                n = block.attn1(block.norm1(x), context=None, value=None, transformer_options=transformer_options)
            elif part == "attn2":
                n = block.attn2(block.norm2(x), context=context, value=None, transformer_options=transformer_options)
            else:
                n = block.ff(block.norm3(x))
            if inherits:
                memory.store(address, n)
            x = n + x
        return x
