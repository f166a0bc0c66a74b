"""Who plays which unit of a MODEL: the checkpoint, a pack, nobody; with experts and log gains that join a player.

The packs' patchers stand beside the MODEL as additional models, so that the host loads and moves them with it. The
LoRAs of the MODEL act on them too (see `pack_loras`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...asdm_core.addresses import unit
from ...asdm_core.architecture import Architecture
from ...asdm_core.assignment import Assignment, Override, Provider, Window, fingerprint
from ...asdm_core.measure import costs
from ...asdm_core.steps import Moment
from . import pack_loras, units
from .carried import Carried, overrides
from .network import architecture_of, clone_for, prediction_of
from .on_model import models_key, with_technique
from .patches import Patches
from .technique import (
    CUT,
    PLAYED,
    PLAYERS,
    AtUNet,
    Forward,
    InRun,
    Measured,
    Say,
    Start,
    Technique,
    UNetInRun,
    technique_of,
)


SETTINGS = ("stride", "padding", "dilation", "padding_mode")  # of convolutions, which some nodes change in a run
PREDICTED = {"eps": "the noise", "v": "v"}  # in words


@dataclass(frozen=True)
class Assigned(Technique):
    """An assignment, the ids of the packs in it, in the order of their patchers, and what is to be said in each run.

    trained_for: what the networks predict that packs were trained in, by the packs' names.
    """

    assignment: Assignment
    packs: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    trained_for: tuple[tuple[str, str], ...] = ()

    key: ClassVar[str] = "assignment"
    order: ClassVar[int] = PLAYERS
    role: ClassVar[str] = CUT

    def prepare(self, model, clone) -> None:
        pack_loras.sync(model, packs_of(clone).values())

    def bind(self, start: Start, say: Say) -> InRun:
        for text in self.words:
            say(text)
        predicted, _ = prediction_of(start.model)
        for name, wanted in self.trained_for:
            if predicted not in (None, wanted):
                say(
                    f"{name} was trained in a network that predicts {PREDICTED[wanted]}, and this MODEL's predicts "
                    f"{PREDICTED[predicted]}: its units do not fit. Use a pack that was trained for such checkpoints."
                )
        if pack_loras.merged(start.model, pack_patchers(start.model)):
            say(
                "the MODEL is merged with another one, also in layers that a pack plays. There the pack's own weights "
                "play, unmerged; the rest is merged.",
                report=True,
            )
        return _InRun(self, {window: start.stretch(window) for window in self.assignment.windows}, say)

    def label(self) -> str:
        return " + ".join(name_of(pack).removesuffix(".safetensors") for pack in self.packs)

    def left_out(self, architecture: Architecture, height: int, width: int) -> dict[str, float]:
        return {address: cost.total for address, cost in costs(architecture, height, width).items()}

    def saved(self, measured: Measured) -> list[tuple[str, float, str]]:
        names = self.label().replace(" + ", ", ") or "pruned UNet"
        saved = sum(
            measured.needed(address, calls * measured.left_out[CUT][address]) - seconds
            for (address, role), (seconds, calls) in measured.layers.items()
            if role == CUT
        )
        return [(f"layers cut ({names})", saved, "estimated")] if saved > 0 else []


# On a MODEL ------------------------------------------------------------------------------------------


def assigned_of(model) -> Assigned:
    """Who plays what on a MODEL; the checkpoint everything, where nothing else was said."""
    return technique_of(model, Assigned) or Assigned(Assignment(architecture_of(model).config))


def packs_of(model) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """Pack patchers of a MODEL by pack id."""
    return dict(zip(assigned_of(model).packs, pack_patchers(model), strict=True))


def pack_patchers(model) -> list[comfy.model_patcher.ModelPatcher]:
    return model.get_additional_models_with_key(models_key(Assigned))


def set_pack_patchers(model, patchers: list) -> None:
    """Give a MODEL other patchers for the same packs."""
    model.set_additional_models(models_key(Assigned), patchers)


def with_overrides(
    model,
    overrides: Iterable[Override],
    packs: Mapping[str, object] | None = None,
    words: Iterable[str] = (),
    trained_for: Iterable[tuple[str, str]] = (),
):
    """A clone of MODEL in which some units are played by others. The MODEL that came in is not altered.

    packs: patchers, by id, of the packs that the overrides name and the MODEL does not have yet. words: sentences to be
    said in each run. trained_for: see `Assigned`.
    """
    assigned, patchers = assigned_of(model), packs_of(model)
    for pack_id, patcher in (packs or {}).items():
        if pack_id not in patchers:
            patchers[pack_id] = clone_for(model, patcher)
    joined = replace(
        assigned,
        assignment=assigned.assignment.with_overrides(overrides),
        packs=tuple(patchers),
        words=tuple(dict.fromkeys((*assigned.words, *words))),
        trained_for=tuple(dict.fromkeys((*assigned.trained_for, *trained_for))),
    )
    clone = with_technique(model, joined)
    # Those that the clone has already are its own clones of the MODEL's.
    own = dict(zip(assigned.packs, pack_patchers(clone), strict=True))
    set_pack_patchers(clone, [own.get(pack_id, patcher) for pack_id, patcher in patchers.items()])
    return clone


def id_of(name: str, path: Path) -> str:
    """The id of a pack in an assignment: its name, and what tells the file from a later one of that name."""
    return f"{name}@{path.stat().st_mtime_ns}"


def name_of(pack_id: str) -> str:
    return pack_id.rpartition("@")[0]


def active_at(assignment: Assignment, percent: float) -> list[Window]:
    """The windows that are open at a point of the run (0..1)."""
    return [w for w in assignment.windows if w.start <= percent < w.end or w.end == percent == 1.0]


def providers_of(model, active: Sequence[Window] | None = None) -> dict[str, Provider]:
    """Unit address -> who plays it while these windows are open, for every unit but the checkpoint's own; cut ones are
    among them, also those that the loaded network lacks. None: those at every step.
    """
    cut = dict.fromkeys(architecture_of(model).cut_units, Provider(CUT))
    return cut | assigned_of(model).assignment.providers(active)


def network_of(model, active: Sequence[Window] | None = None) -> Architecture:
    """The network that plays on a MODEL while these windows are open: its kept units and transformer blocks. None: what
    plays at every step.
    """
    architecture, providers, packs = architecture_of(model), providers_of(model, active), packs_of(model)
    cut = {address for address, provider in providers.items() if provider.role == CUT}
    cut |= {a for a in architecture.cut if a not in providers and a.rpartition(".")[0] not in providers}
    for address, provider in providers.items():
        if provider.role == "pack":  # blocks that the pack's own transformer lacks
            blocks = packs[provider.source].model.architecture.cut
            cut |= {block for block in blocks if block.rpartition(".")[0] == address}
    return Architecture(architecture.config, frozenset(cut)).named()


# In a run ---------------------------------------------------------------------------------------------


class _InRun(InRun):
    def __init__(self, assigned: Assigned, stretches: dict[Window, tuple[float, float]], say: Say):
        self.assignment, self._stretches, self._say = assigned.assignment, stretches, say
        self.active: tuple[Window, ...] = ()

    def begin_evaluation(self, moment: Moment) -> None:
        self.circumstances = self.active = tuple(
            w for w, (high, low) in self._stretches.items() if low < moment.sigma <= high
        )

    def at(self, unet: UNetInRun, model) -> AtUNet:
        replaced = frozenset(path for path, value in model.object_patches.items() if isinstance(value, nn.Module))
        return Players(self, unet, packs_of(model), replaced, self._say)


class Players(AtUNet):
    """The players of one UNet object, and the experts and log gains that join them."""

    def __init__(
        self,
        run: _InRun,
        unet: UNetInRun,
        packs: Mapping[str, comfy.model_patcher.ModelPatcher],
        replaced: frozenset[str],
        say: Say,
    ):
        self._run, self._unet, self._replaced, self._say = run, unet, replaced, say
        self._packs = {pack_id: patcher.model for pack_id, patcher in packs.items()}
        self._serials = ",".join(str(patcher.model.serial) for patcher in packs.values())
        self._active: tuple[Window, ...] | None = None
        self._providers: dict[str, Provider] = {}
        self._log_gains: dict[str, Provider] = {}
        self._bare: dict[str, nn.Module] = {}  # players, without what others have put on the layers
        self._carried: dict[str, Carried] = {}
        self._players: dict[str, nn.Module] = {}
        self._everybody: dict[str, Provider] = {}
        self._watched: tuple[list[dict], list[dict], Any] = [], [], ([], [])
        self._patches: Patches | None = None  # of the players of now
        self._told: set[str] = set()

    def begin_evaluation(self, moment: Moment) -> None:
        if self._run.active == self._active:
            return
        self._active = self._run.active
        assignment, cut = self._run.assignment, self._unet.cut
        self._providers = providers = assignment.providers(self._active)
        self._log_gains = assignment.joining("log_gains", self._active)
        experts = assignment.joining("experts", self._active)
        experts = {a: provider for a, provider in experts.items() if a in providers or a not in cut}
        self._bare, self._carried, self._players, self._watched = {}, {}, {}, ([], [], ([], []))
        self._patches = None
        if not providers and not experts:
            self.name = ""
            return
        layers = self._unet.layers
        self._bare = {address: self._player(address, provider) for address, provider in providers.items()}
        for address, provider in experts.items():
            layer = self._bare.get(address, layers[address])
            self._bare[address] = self._packs[provider.source].with_experts(address, layer, provider.strength)
        self._everybody = providers | {f"{a}.experts": provider for a, provider in experts.items()}
        watched = [
            vars(module)
            for address, player in self._bare.items()
            for module in ([layers[address]] if units.passes_on(player) else layers[address].modules())
        ]
        self._watched = watched, [of for of in watched if SETTINGS[0] in of], None
        self._carry_over()

    def options(self, options: dict, x: Tensor) -> dict:
        self._carry_over()
        if self._patches is None:
            return options
        bound = self._patches.bound(options)
        self._tell_patches(self._patches.lost)
        return bound

    def begin_forward(self, forward: Forward) -> None:
        self._refresh(self._carried)

    def begin_layer(self, address: str, role: str) -> None:
        if not torch.compiler.is_compiling() and address in self._carried:
            self._refresh([address])

    def end_layer(self, address: str, current: nn.Module, x: Tensor, out: Tensor) -> None:
        if not torch.compiler.is_compiling() and address in self._carried:
            self._carried[address].hand_back()

    def _refresh(self, addresses: Iterable[str]) -> None:
        if any([self._carried[address].refresh() for address in addresses]):
            self._tell({address: carried.lost for address, carried in self._carried.items()})

    @property
    def players(self) -> Mapping[str, nn.Module]:  # type: ignore[override]
        self._carry_over()
        return self._players

    def _carry_over(self) -> None:
        """Give the players what others have put on their layers: by now, or at any time later."""
        watched, convolutions, seen = self._watched
        now = (
            [(len(of), id(of.get("forward")), id(of.get("_forward"))) for of in watched],
            [tuple(map(of.get, SETTINGS)) for of in convolutions],
        )
        if now == seen:
            return
        self._watched = watched, convolutions, now
        layers = self._unet.layers
        cut = {address for address, player in self._bare.items() if units.passes_on(player)}
        self._carried = found = {
            address: Carried(player, layers[address]) for address, player in self._bare.items() if address not in cut
        }
        playing = {address: carried.player for address, carried in found.items()}
        self._players = self._bare | playing
        self._patches = Patches(playing, layers)
        names = ";".join(f"{a}:{carried.name}" for a, carried in found.items() if carried.name)
        self.name = fingerprint(self._everybody, self._serials + names)
        self._tell(
            {address: list(overrides(layers[address])) for address in self._bare if address in cut}
            | {address: carried.lost for address, carried in found.items()}
        )

    def _tell(self, lost: Mapping[str, Sequence[str]]) -> None:
        """Say once which of the layers that others have changed play without that."""
        found = [f"{address} ({name})" for address, names in lost.items() for name in names]
        paths = {address: f"diffusion_model.{unit(self._unet.config, address).ldm}" for address in self._bare}
        found += [
            f"{address} ({type_of})"
            for address, path in paths.items()
            for type_of in (r.removeprefix(path).strip(".") or "the whole layer" for r in sorted(self._replaced))
            if any(r == path or r.startswith(f"{path}.") for r in self._replaced)
        ]
        self._tell_once(
            "another node has changed layers of the checkpoint that {packs} plays in its own way, and there that node "
            "has no effect",
            found,
        )

    def _tell_patches(self, lost: Mapping[str, Sequence[str]]) -> None:
        """Say once which of the checkpoint's layers patches of others go on computing with."""
        self._tell_once(
            "another node computes with layers of the checkpoint that {packs} plays in its own way, and there it goes "
            "on with the checkpoint's weights",
            [f"{address} ({place})" for address, places in lost.items() for place in places],
        )

    def _tell_once(self, what: str, found: Sequence[str]) -> None:
        if not found or what in self._told:
            return
        self._told.add(what)
        packs = ", ".join(sorted({name_of(pack_id) for pack_id in self._packs}))
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        self._say(
            f"{what.format(packs=packs)}: {', '.join(found[:3])}{more}. Take a pack that leaves these layers to the "
            "checkpoint, or bypass one of the two nodes."
        )

    def _player(self, address: str, provider: Provider) -> nn.Module:
        if provider.role == "pack":
            return self._packs[provider.source].layer(address)
        return units.shared_stand_in(unit(self._unet.config, address))

    def log_gains(self) -> tuple[str, dict[str, dict]]:
        """A name for them, and transformer address -> block -> log gains of its heads (see `PackModel.log_gains`)."""
        if not self._log_gains:
            return "", {}
        gains = {a: self._packs[p.source].log_gains(a, p.strength) for a, p in self._log_gains.items()}
        return fingerprint(self._log_gains, self._serials), gains

    def role(self, address: str, role: str) -> str:
        provider = self._providers.get(address)
        return role if provider is None else CUT if provider.role == CUT else PLAYED

    def close(self) -> None:
        self._bare, self._carried, self._players, self._watched = {}, {}, {}, ([], [], ([], []))
        self._patches = None


def _on_clone(old, new):
    # A non-dynamic delegate (hook LoRAs, compile) needs packs that can be patched the same way.
    if old.is_dynamic() and not new.is_dynamic():
        set_pack_patchers(new, [clone_for(new, pack) for pack in pack_patchers(old)])


Assigned.callbacks = (
    *pack_loras.callbacks(pack_patchers),
    (comfy.patcher_extension.CallbacksMP.ON_CLONE, _on_clone),
)
