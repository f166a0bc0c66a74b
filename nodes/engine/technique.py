"""What a technique is: the one protocol by which everything that changes a run gets onto a MODEL and into its runs.

A technique is three small classes, of which only the first is needed always:

- `Technique`: plain data on a MODEL, put there by a node. It lives as long as the MODEL and its clones and never
  touches a module, because the host makes new UNet objects behind everybody's back (compile, hook LoRAs, devices).
- `InRun`: bound when a sampling run begins, dropped when it ends. Whatever is counted or remembered in a run lies here.
- `AtUNet`: the same at one UNet object of the run; made at the first evaluation, when the host has loaded and patched
  the network. A run has several of them where the work is split over devices.

Every method has a default that does nothing, so that a technique says only what it does. `run.Run` carries them out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from ...asdm_core.addresses import UNetConfig
from ...asdm_core.architecture import Architecture
from ...asdm_core.assignment import Window
from ...asdm_core.steps import Moment
from .circumstances import Content, Gates

KEY = "asdm"


class Say(Protocol):
    """Tells the person something about this run, on the technique's node and in the log; there as a warning, unless it
    is no more than a report."""

    def __call__(self, text: str, report: bool = False) -> None: ...


# What `Technique.order` says, in this order: who plays, how it computes, what is remembered of it, what is measured.
PLAYERS, COMPUTING, REMEMBERING, MEASURING = 10, 50, 80, 90

PLAYED, CUT = "played", "cut"  # roles of layers that no technique changes, in measurements
LEFT_OUT = "left out"  # role of an evaluation or a step in which others kept the network from playing


class Misfit(Exception):
    """Raised by a technique while layers run, where what it began turns out to be impossible in this forward.

    The forward is then made once more, after `AtUNet.begin_again` of all techniques.
    """


@dataclass(frozen=True)
class Start:
    """What is known when a run begins. Holds the MODEL: to be read in `bind` and not to be kept.

    sigmas: noise levels, one more than the run has steps. shape: of the latents, (B, C, H, W). args, given: all that
    the host hands to the run (its OUTER_SAMPLE), by place and by name.
    """

    guider: Any
    sampler: Any
    sigmas: Tensor
    shape: tuple[int, ...]
    args: tuple
    given: Mapping[str, Any]

    @property
    def model(self):
        """The MODEL that is sampled."""
        return self.guider.model_patcher

    @property
    def conds(self) -> Mapping[str, list]:
        """The lists of conditionings, by name ("positive")."""
        return self.guider.conds

    def stretch(self, window: Window) -> tuple[float, float]:
        """A window as noise levels: it holds sigma where low < sigma <= high. The last one also holds sigma 0, where
        some samplers ask once more.
        """
        to_sigma = self.model.get_model_object("model_sampling").percent_to_sigma
        return to_sigma(window.start), to_sigma(window.end) if window.end < 1 else -1.0


Report = TypeVar("Report")


@dataclass
class Log(Generic[Report]):
    """The report of the last run of a MODEL and its clones. Numbers and words only, so that it may outlive the run."""

    last: Report | None = None


class Technique:
    """Data on a MODEL. Subclasses are frozen dataclasses: two MODELs with equal techniques play the same.

    key: one technique of each key is on a MODEL; a later one takes the place of an earlier one.
    order: of acting in a forward, from PLAYERS to MEASURING; equal ones act by key.
    outermost: whether its runs lie round all that other packs do, and its MODEL may be exchanged (Switch UNet).
    role: of the layers that it changes, in measurements; "" where it changes none.
    callbacks: (kind, function) of the host's patcher callbacks that it needs while it is on a MODEL.
    speaks_only: it changes and measures nothing, so nobody misses it in a run that it is out of.
    """

    key: ClassVar[str]
    order: ClassVar[int] = COMPUTING
    outermost: ClassVar[bool] = False
    role: ClassVar[str] = ""
    callbacks: ClassVar[tuple[tuple[str, Callable], ...]] = ()
    speaks_only: ClassVar[bool] = False

    def check(self, model) -> None:
        """Raise ValueError, for a person to read, where it cannot be on this MODEL."""

    # in runs ------------------------------------------------------------------------------------------

    def prepare(self, model, clone) -> None:
        """The host is about to load a MODEL for a run. clone: itself, or its clone for another device."""

    def device_bytes(self, model, shape: Sequence[int], conds: Mapping[str, list]) -> int:
        """Bytes that it will hold at most on the device in a run on latents of a shape (B, C, H, W)."""
        return 0

    def bind(self, start: Start, say: Say) -> InRun | None:
        """Its part in the run that begins; None where it has none."""
        return None

    # what it says -------------------------------------------------------------------------------------

    def label(self) -> str:
        """What it is in a word or two, for titles ("fast inheritance"); "" for what changes no picture."""
        return ""

    def tells(self, model) -> list[str]:
        """Sentences for Inspect Model: what is on, and what to do to change it."""
        return []

    def left_out(self, architecture: Architecture, height: int, width: int) -> dict[str, float]:
        """Unit address -> multiplications that a layer in its role does not do, of those it has in an architecture, for
        latents of height x width and one picture.
        """
        return {}

    def saved(self, measured: Measured) -> list[tuple[str, float, str]]:
        """(what, seconds saved in a measured run, how that is known) for Speed Readout."""
        return []


@dataclass
class Around:
    """What a technique in a run may know of it. circumstances: those of the others in this evaluation, see `InRun`.
    passed_by: once it has been sampled, whether the network was run past all of them, which has been said.
    """

    gates: Gates
    content: Content
    circumstances: tuple = ()
    passed_by: bool = False

    def close(self) -> None:
        self.gates.close()
        self.content.close()


class InRun:
    """A technique in one sampling run.

    circumstances: what of it must be as it was for the results of one evaluation to stand for those of another (who
        plays); told when an evaluation has begun.
    around: what it may know of the run; given by the run before it begins.
    brings: techniques that are not on the MODEL and act in this run because of it; known when it is bound.
    """

    circumstances: Any = None
    around: Around
    brings: Sequence[Technique] = ()

    def at(self, unet: UNetInRun, model) -> AtUNet | None:
        """Its part at one UNet object, whose MODEL is given to be read and not to be kept; None where it has none."""
        return None

    def sample(self, call: Callable):
        """The whole run: `call()` samples."""
        return call()

    def load(self, call: Callable, model, noise_shape, conds, **given):
        """The host's loading of all models of the run (its PREPARE_SAMPLING), of a technique that is outermost."""
        return call(model, noise_shape, conds, **given)

    def begin_sampling(self, extra_args: dict, sigmas: Tensor, **inputs) -> None:
        """The models are loaded, and the sampler is about to start (the host's SAMPLER_SAMPLE); outermost ones only."""

    def begin_evaluation(self, moment: Moment) -> None:
        """An evaluation of the network begins; it may come in several calls and forwards."""

    def predict(self, call: Callable, x: Tensor, timestep: Tensor, options: dict, seed):
        """That evaluation, guidance included (the host's PREDICT_NOISE)."""
        return call(x, timestep, options, seed)

    def evaluation_role(self) -> str:
        """What the evaluation that just ended was, in measurements ("inherited"); "" for an ordinary one."""
        return ""

    def end_evaluation(self, roles: frozenset[str]) -> None:
        """That evaluation is over. roles: what it was to the techniques of the run."""

    def calc_cond_batch(self, call: Callable, model, conds, x: Tensor, timestep: Tensor, options: dict) -> list[Tensor]:
        """The results of some lists of conds (the host's calc_cond_batch), one for each."""
        return call(model, conds, x, timestep, options)

    def close(self) -> None:
        """The run is over, however it ended. What it did goes into a Log, what it held is let go."""


class AtUNet:
    """A technique at one UNet object of a run.

    name: its share of the name of what is about to be played, "" for none. Whatever changes the operations of a forward
        must change the name: compiled graphs are told apart by it, and features are inherited under the same name only.
    players: the modules that play units in place of the network's own, by address; the same mapping while they stay.
    held: tensors (or dataclasses and tuples of them) that layers read in this forward. A compiled graph takes them as
        its inputs; whatever else it finds it takes to be for ever as it was.
    """

    name: str = ""
    players: Mapping[str, nn.Module] = {}
    held: Any = None

    def begin_evaluation(self, moment: Moment) -> None:
        """An evaluation of the network begins."""

    def options(self, options: dict, x: Tensor) -> dict:
        """The host's transformer_options of a forward on x, or changed ones: a copy, never this very dict changed."""
        return options

    def begin_forward(self, forward: Forward) -> None:
        """A forward of the network begins. From here on `name` is that of this forward."""

    def begin_pass(self, number: int) -> None:
        """The first layer plays for the time `number` in this forward: more than once where another node runs the
        network on something else as well. Not called in compiled networks.
        """

    def begin_again(self) -> None:
        """The forward ended in a Misfit and is made once more."""

    def defies_graphs(self, patches: Mapping[str, list]) -> bool:
        """Whether the running forward cannot be one compiled graph. patches: of other packs, by the host's names."""
        return False

    def player(self, address: str, current: nn.Module) -> nn.Module:
        """Who plays a unit in the running forward: `current`, or another in its place."""
        return current

    def begin_layer(self, address: str, role: str) -> None:
        """A unit is about to play; role: see `Technique.role`."""

    def end_layer(self, address: str, current: nn.Module, x: Tensor, out: Tensor) -> None:
        """A unit has played. current: who would have, but for this technique. x, out: its input and output; whoever
        keeps them copies them, because the host writes into both.
        """

    def role(self, address: str, role: str) -> str:
        """The role of a unit in the running forward; given what those before say."""
        return role

    def close(self) -> None:
        """The run is over."""


@dataclass(frozen=True)
class Forward:
    """One forward of the network. x: its input. options: transformer_options. circumstances: all that must be as it was
    for what one forward made to be right in another: who plays, where control acts, what others patch. playing: the
    module that plays each unit, always the same mapping while they are the same.
    """

    x: Tensor
    options: Mapping[str, Any]
    circumstances: Any
    playing: Mapping[str, nn.Module]


class UNetInRun:
    """What a technique may ask of the UNet it stands at (see `run.BoundUNet`)."""

    config: UNetConfig
    cut: frozenset[str]

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The network's own layers, by address."""
        raise NotImplementedError

    def find(self, kind: type[Part]) -> Part | None:
        """Another technique's part at this UNet; those that act before the one that asks."""
        raise NotImplementedError


Part = TypeVar("Part", bound=AtUNet)


def spared(ordinary: Sequence[float], short: Sequence[float]) -> float | None:
    """What short evaluations took less than as many ordinary ones, of which the median counts; None without some of
    both.
    """
    return statistics.median(ordinary) * len(short) - sum(short) if ordinary and short else None


class Measured:
    """What Speed Readout knows of a measured run (see `layer_times.MeasuredRun`).

    evaluations: (step, seconds, roles) of each. layers: (address, role) -> seconds in all and calls. left_out: role ->
    `Technique.left_out` of the technique of that role.
    """

    evaluations: Sequence[tuple[int, float, frozenset[str]]]
    layers: Mapping[tuple[str, str], tuple[float, int]]
    left_out: Mapping[str, Mapping[str, float]]

    def shorter(self, role: str) -> float | None:
        """Seconds that the evaluations of a role took less than as many ordinary ones; None without some of both. The
        first one, in which the host still moves weights, is left out.
        """
        timed = self.evaluations[1:]
        return spared(
            [seconds for _, seconds, roles in timed if not roles],
            [seconds for _, seconds, roles in timed if roles == {role}],
        )

    def needed(self, address: str, multiplications: float) -> float:
        """Seconds that a layer of this kind needed for so many multiplications in this run."""
        raise NotImplementedError


# Reading what is on a MODEL ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A technique on a MODEL, with the id of the node that put it there, to which its words go."""

    technique: Technique
    node_id: str = ""


def placed_on(model) -> tuple[Placed, ...]:
    """What is on a MODEL, in the order of acting."""
    return model.get_attachment(KEY) or ()


def named_by_node(placed: Iterable[Placed]) -> Iterator[tuple[str, list[str]]]:
    """The id of each node, and what that which it put on a MODEL is called; what no node put there stands alone."""
    nodes: dict[str | int, tuple[str, list[str]]] = {}
    for p in placed:
        _, names = nodes.setdefault(p.node_id or id(p), (p.node_id, []))
        names.append(p.technique.label() or p.technique.key)
    return iter(nodes.values())


def techniques_of(model) -> tuple[Technique, ...]:
    """The techniques on a MODEL, in the order of acting."""
    return tuple(placed.technique for placed in placed_on(model))


Kind = TypeVar("Kind", bound=Technique)


def technique_of(model, kind: type[Kind]) -> Kind | None:
    """The technique of a kind on a MODEL."""
    return next((technique for technique in techniques_of(model) if isinstance(technique, kind)), None)
