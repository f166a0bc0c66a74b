"""One sampling run: the techniques on the MODEL, bound to the networks that are sampled, and called in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed

from ...asdm_core.steps import Moment, Steps
from . import circumstances, notes, units
from .network import architecture_of
from .technique import (
    CUT,
    PLAYED,
    Around,
    AtUNet,
    Forward,
    InRun,
    Part,
    Placed,
    Say,
    Start,
    Technique,
    UNetInRun,
    named_by_node,
)

OTHERS = "asdm_others"  # in transformer_options during a forward: the patches without our entry


class Run:
    """What is on a MODEL, in one run of it. Dropped when the run ends.

    waits: whether it samples in turns with others, so that it may never come to its own.
    """

    def __init__(self, placed: Sequence[Placed], start: Start, waits: bool = False):
        self._waits, self._model = waits, start.model.model
        self._passes = 0
        self._steps = Steps(start.sigmas.tolist())
        self.techniques: list[InRun] = []
        self._around = Around(
            circumstances.Gates(), circumstances.Content(circumstances.keeps_its_noise(start.sampler))
        )
        parts = [(p, list(_bound(p.technique, start, notes.speaker(p.node_id)))) for p in placed]
        self._placed = [p for p, its in parts if its]
        for _, part in sorted((b for _, its in parts for b in its), key=lambda b: b[0].order):
            part.around = self._around
            self.techniques.append(part)
        self._evaluations = 0
        self._unets: dict[int, BoundUNet] | None = None

    def __deepcopy__(self, memo) -> Run:
        return self  # in the options of the run, which others copy whole

    def sample(self, call: Callable):
        """The run itself: `call()` samples."""

        def checked():
            out = call()
            self._around.passed_by = self._passed_by()
            return out

        way: Callable = checked
        for technique in self.techniques:
            way = partial(technique.sample, way)
        return way()

    def _passed_by(self) -> bool:
        """Whether the network was run past all techniques, which is said: nothing may silently do nothing, and other
        nodes can run the network by ways of their own.
        """
        unets = (self._unets or {}).values()
        if not self._evaluations:
            if len(self._steps.sigmas) < 2 or self._waits and not self._passes:
                return False  # nothing to act in
            why = (
                "the guider of this run evaluates the network by a way of its own, past ComfyUI's. Take another guider"
            )
        elif not unets or any(unet.forwards for unet in unets):
            return False
        else:
            why = "another node on this MODEL runs the network by a way of its own, past ComfyUI's. Bypass that node"
        for node_id, names in named_by_node(self._placed):
            notes.speaker(node_id)(f"{' and '.join(names)} did not act in this run: {why}, or leave this one out.")
        return True

    def passed(self, base_model) -> None:
        """The network of a model runs, and no evaluation of this run has begun."""
        self._passes += not self._evaluations and base_model is self._model

    def load(self, call: Callable, model, noise_shape, conds, **given):
        for technique in self.techniques:
            call = partial(technique.load, call)
        return call(model, noise_shape, conds, **given)

    def begin_sampling(self, extra_args: dict, sigmas, **inputs) -> None:
        for technique in self.techniques:
            technique.begin_sampling(extra_args, sigmas, **inputs)

    def predict(self, call: Callable, model, x, timestep, options: dict, seed):
        """One evaluation, at the noise level of `timestep`. model: the MODEL that is sampled, loaded and patched."""
        self._evaluations += 1
        moment = self._steps.at(float(timestep.flatten()[0]))
        self._around.content.begin_evaluation(x, moment.sigma)
        for technique in self.techniques:
            technique.begin_evaluation(moment)
        self._around.circumstances = tuple(technique.circumstances for technique in self.techniques)
        for unet in self._bound_to(model).values():
            unet.begin_evaluation(moment)
        for technique in self.techniques:
            call = partial(technique.predict, call)
        out = call(x, timestep, options, seed)
        self._around.content.end_evaluation(out)
        roles = frozenset(role for technique in self.techniques if (role := technique.evaluation_role()))
        for technique in self.techniques:
            technique.end_evaluation(roles)
        return out

    def calc_cond_batch(self, call: Callable, model, conds, x, timestep, options: dict):
        for technique in self.techniques:
            call = partial(technique.calc_cond_batch, call)
        return call(model, conds, x, timestep, options)

    def _bound_to(self, model) -> dict[int, BoundUNet]:
        # Not when the run begins: the host changes layers while it loads a model, and others do.
        if self._unets is None:
            # One for each UNet object: multi-GPU clones have their own modules and their own packs.
            found = {
                id(m.model): BoundUNet(m, self.techniques, self._around)
                for m in (model, *model.get_additional_models_with_key("multigpu"))
            }
            self._unets = {key: unet for key, unet in found.items() if unet.techniques}
        return self._unets

    def unet(self, base_model) -> BoundUNet | None:
        """The UNet of a model of this run; None for any other (guiders can sample two models)."""
        return (self._unets or {}).get(id(base_model))

    def close(self) -> None:
        for technique in self.techniques:
            technique.close()
        for unet in (self._unets or {}).values():
            unet.close()
        self._unets, self.techniques = {}, []  # of a switch they know the MODELs, whose options know this run
        self._model = None
        self._around.close()


def _bound(technique: Technique, start: Start, say: Say) -> Iterator[tuple[Technique, InRun]]:
    """The part of a technique in a run, if it has one, and what that brings along."""
    part = technique.bind(start, say)
    if part is not None:
        yield technique, part
        for other in part.brings:
            yield from _bound(other, start, say)


class BoundUNet(UNetInRun):
    """The layers of one UNet object in a run, and the techniques that act on them."""

    def __init__(self, model, techniques: Sequence[InRun], around: Around):
        self._around, self._sigma = around, 0.0
        architecture = architecture_of(model)
        self.config, self.cut = architecture.config, architecture.cut
        self._unet = model.model.diffusion_model
        self._layers: dict[str, torch.nn.Module] | None = None
        self._addresses: dict[int, str] = {}
        self._players: dict[int, torch.nn.Module] = {}
        self._playing: Mapping[str, torch.nn.Module] = {}
        self._given: tuple[Mapping[str, torch.nn.Module], ...] = ()
        self.forwards = 0
        self._first, self._passes = "", 0  # the first layer, and how often it has played in this forward
        self.techniques: list[AtUNet] = []
        for technique in techniques:
            part = technique.at(self, model)
            if part is not None:
                self.techniques.append(part)
        self.entry = (units.LAYER_CLASSES, self._dispatch)

    def __deepcopy__(self, memo) -> BoundUNet:
        return self

    @property
    def layers(self) -> Mapping[str, torch.nn.Module]:
        if self._layers is None:
            self._layers = units.layers(self._unet, self.config)
            self._addresses = {id(layer): address for address, layer in self._layers.items()}
            self._playing, self._first = self._layers, next(iter(self._layers))
        return self._layers

    def find(self, kind: type[Part]) -> Part | None:
        return next((technique for technique in self.techniques if isinstance(technique, kind)), None)

    # once per evaluation, once per forward ----------------------------------------------------------

    def begin_evaluation(self, moment: Moment) -> None:
        self._sigma = moment.sigma
        for technique in self.techniques:
            technique.begin_evaluation(moment)
        self._settle()

    def _settle(self) -> None:
        """Who plays: asked again in each forward, because others may change layers at any time."""
        given = tuple(technique.players for technique in self.techniques)
        if len(given) == len(self._given) and all(a is b for a, b in zip(given, self._given, strict=True)):
            return
        self._given = given
        players = {address: player for mapping in given for address, player in mapping.items()}
        self._players = {id(self.layers[address]): player for address, player in players.items()}
        self._playing = {address: players.get(address, layer) for address, layer in self.layers.items()}

    def options(self, options: dict, x: torch.Tensor) -> dict:
        """The options of a forward, with what the techniques put in."""
        for technique in self.techniques:
            options = technique.options(options, x)
        return options

    def begin_forward(self, x, control, options: dict, hooks) -> str:
        """Name of what is about to be played; "" if the checkpoint plays everything itself, unnoticed."""
        self.forwards += 1
        self._passes = 0
        self._settle()
        playing = self._playing or self.layers
        around = circumstances.of_forward(control, hooks, options, self._around.gates, self._sigma)
        for i, technique in enumerate(self.techniques):
            before = tuple(earlier.name for earlier in self.techniques[:i])
            technique.begin_forward(Forward(x, options, (before, around), playing))
        return self.name

    def begin_again(self) -> str:
        """The same for a forward that ended in a Misfit."""
        self._passes = 0
        for technique in self.techniques:
            technique.begin_again()
        return self.name

    @property
    def name(self) -> str:
        return "_".join(technique.name for technique in self.techniques if technique.name)

    @property
    def holding(self) -> list[AtUNet]:
        """Those whose layers read tensors in the running forward."""
        return [technique for technique in self.techniques if technique.held is not None]

    def defies_graphs(self, patches: Mapping[str, list]) -> bool:
        return any(technique.defies_graphs(patches) for technique in self.techniques)

    def close(self) -> None:
        for technique in self.techniques:
            technique.close()
        self.techniques = []
        self._players, self._playing, self._given = {}, {}, ()
        # Nothing may keep the network: `entry` is bound to this, which would stay until Python looks for circles.
        del self.entry, self._unet
        self._layers, self._addresses = None, {}

    # while layers run -------------------------------------------------------------------------------

    def _dispatch(
        self,
        layer,
        x,
        emb,
        context,
        transformer_options,
        output_shape,
        time_context,
        num_video_frames,
        image_only_indicator,
    ):
        """Let the layer's player play it, in the host's own way.

        Layers nobody stands in for are their own players, so this is the one path for all.
        """
        current = player = self._players.get(id(layer), layer)
        address = self._addresses.get(id(layer))
        if not torch.compiler.is_compiling() and address == self._first:
            self._passes += 1
            for technique in self.techniques:
                technique.begin_pass(self._passes)
        if address is not None:
            role = CUT if address in self.cut else PLAYED
            for technique in self.techniques:
                player = technique.player(address, player)
                role = technique.role(address, role)
            for technique in self.techniques:
                technique.begin_layer(address, role)
        # With our entry in place the host's function would come straight back to us. It also advances
        # counters in transformer_options, so it must get this very dict, not a copy.
        ours = transformer_options["patches"]
        transformer_options["patches"] = transformer_options[OTHERS]
        try:
            out = forward_timestep_embed(
                [player],
                x,
                emb,
                context,
                transformer_options,
                output_shape,
                time_context,
                num_video_frames,
                image_only_indicator,
            )
        finally:
            transformer_options["patches"] = ours
        if address is not None:
            for technique in self.techniques:
                technique.end_layer(address, current, x, out)
        return out
