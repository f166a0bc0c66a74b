"""Several UNets in one sampling run: how the host is made to sample with another MODEL from a step on.

Much of what a MODEL brings acts above its network: guidance functions, prediction type, ControlNet mapping, encoded
conditionings. So the turn changes in PREDICT_NOISE, where one evaluation of the guider begins: the guider gets the
other MODEL's network, conditionings and options, and the other MODEL's own wrappers are called as the host would.
The sampler sees one model function and keeps its history.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...asdm_core.steps import Moment, Steps
from ...asdm_core.switching import Switch, SwitchPoint, shares
from ...asdm_core.text import printable
from .assigned import pack_patchers, set_pack_patchers
from .deep_copy import bind_to_copy
from .network import architecture_of, blends, clone_for
from .on_model import models_key, with_technique, without_technique
from .technique import KEY, InRun, Say, Start, Technique, technique_of

POST_CFG = "sampler_post_cfg_function"
MASK = "denoise_mask_function"
_HOSTS = ("patches", "patches_replace", "wrappers", "callbacks", "sample_sigmas")  # in the options of each run


# What a switched MODEL carries: its Switches, and the MODELs they bring in as additional models ---------------


@dataclass(frozen=True)
class Switching(Technique):
    """When a run is given over to each of the other models of a MODEL."""

    switches: tuple[Switch, ...]

    key: ClassVar[str] = "switch"
    outermost: ClassVar[bool] = True

    def bind(self, start: Start, say: Say) -> InRun:
        model = start.model
        present = [model, *others_of(model)]
        _check_noise(present)  # the MODEL may have got another sampling since, or another device
        _check_devices(present)
        if any(_clash(other, present[:i]) for i, other in enumerate(present)):
            raise ValueError(
                "The MODEL got a LoRA or another patch after Switch UNet, and both of its models are one UNet. Put the "
                "node before Switch UNet, on the model it is meant for; with different patches on each, the second "
                "gets its own copy."
            )
        turns = Turns(start)
        for text in turns.left_out():
            say(text)
        return turns

    def label(self) -> str:
        return "switched"

    def tells(self, model) -> list[str]:
        points = ", ".join(f"{point.at:g} ({point.unit})" for one in self.switches for point in one.points)
        return [f"Switch UNet: another model takes over at {points}; connect its MODEL here to inspect it."]


MODELS = models_key(Switching)


def switches_of(model) -> tuple[Switch, ...]:
    switching = technique_of(model, Switching)
    return switching.switches if switching else ()


def others_of(model) -> list:
    return model.get_additional_models_with_key(MODELS)


def with_switch(first, second, point: SwitchPoint, crossfade: int = 0):
    """A clone of MODEL `first` that gives over to MODEL `second` at a point of each run. Neither is altered.

    Either may be switched itself. Raises ValueError if one conditioning and one latent cannot serve both.
    """
    _check_fit(first, second)
    if point.before_all:
        return second
    if point.after_all:
        return first
    clone, joining = first.clone(), beside(first, second)
    switches = (
        *switches_of(first),
        Switch((point,), crossfade),
        *(switch.within(point) for switch in switches_of(second)),
    )
    others = [*others_of(clone), joining, *others_of(joining)]
    return _set_up(clone, switches, [_set_up(model, (), []) for model in others])


def beside(first, second):
    """A clone of MODEL `second` that can take turns with `first`: what the two want in different states, it has a copy
    of its own of.

    Who switches between the same two many times calls this once, and so copies once. Raises ValueError.
    """
    clone = clone_for(first, second)
    present, joining = [first, *others_of(first)], [clone, *others_of(clone)]
    for number, model in enumerate(joining):
        joining[number] = _apart(model, present)
        present.append(joining[number])
    return _set_up(joining[0], switches_of(second), joining[1:])


def on_each(model, change):
    """A clone of MODEL with `change` (MODEL -> a changed clone) made to it and to every model that it switches to."""
    clone = change(model)
    others = others_of(clone)
    if others:
        clone.set_additional_models(MODELS, [change(other) for other in others])
    return clone


def _set_up(model, switches: tuple[Switch, ...], others: list):
    """A clone of MODEL that carries these switches and no others."""
    clone = with_technique(model, Switching(switches)) if switches else without_technique(model, Switching)
    clone.remove_additional_models(MODELS)
    if switches:
        clone.set_additional_models(MODELS, others)
    return clone


def _check_fit(first, second) -> None:
    a, b = (architecture_of(model).config for model in (first, second))
    same_latents = type(first.model.latent_format) is type(second.model.latent_format)
    if not same_latents or (a.context_dim, a.adm_channels) != (b.context_dim, b.adm_channels):
        names = [config.family or f"of an unknown family (text width {config.context_dim})" for config in (a, b)]
        raise ValueError(
            f"Switch UNet: model_first is {names[0]}, model_second is {names[1]}. Models that take turns need the "
            "same kind of "
            "latents and of text conditioning. Choose two of one family, or sample one after the other with a VAE in "
            "between."
        )
    _check_noise([first, second])
    _check_devices([first, second])


def _check_noise(models: Sequence) -> None:
    if len({blends(model) for model in models}) > 1:
        which = next(i for i, model in enumerate(models) if blends(model))
        raise ValueError(
            f"Switch UNet: of the models that take turns number {which + 1} blends its noise with the picture (flow "
            "matching, as ModelSamplingSD3 has it) and another lays it on top, so none can go on with a latent of the "
            "other kind. Choose models of one kind, or sample with one to the end, and then with the other as image to "
            "image."
        )


def _check_devices(models: Sequence) -> None:
    devices = list(dict.fromkeys((model.load_device.type, model.load_device.index or 0) for model in models))
    if len(devices) > 1:
        one, another = (kind if kind == "cpu" else f"{kind}:{index}" for kind, index in devices[:2])
        raise ValueError(
            f"Switch UNet: the models that take turns are on different devices ({one}, {another}), and a run stays on "
            "one: choose the same device for each by Select Model Device, before Switch UNet."
        )


# Who shares a UNet ----------------------------------------------------------------------------------


def _same_weights(a, b) -> bool:
    """Whether two patchers round one module leave it in the same state."""
    # Not by patches_uuid: the host gives a new one in each run with hook LoRAs.
    patched_alike = a.patches.keys() == b.patches.keys() and all(
        len(v) == len(b.patches[k]) and all(x is y for x, y in zip(v, b.patches[k], strict=True))
        for k, v in a.patches.items()
    )
    injections = (
        {k: tuple(map(id, v)) for k, v in m.injections.items()} for m in (a, b)
    )  # a clone has the same, in lists of its own
    return (
        patched_alike
        and operator.eq(*injections)
        and all(
            x.keys() == y.keys() and all(x[k] is y[k] for k in x)
            for x, y in ((a.object_patches, b.object_patches), (a.weight_wrapper_patches, b.weight_wrapper_patches))
        )
    )


def _parts(model) -> list[tuple]:
    """(patcher, patcher whose patches it gets) of a MODEL's UNet and of its packs."""
    return [(model, model), *((pack, model) for pack in pack_patchers(model))]


def _clash(model, others) -> bool:
    """Whether a MODEL shares a UNet or a pack with one of the others, and the two want it in different states."""
    return any(
        part.model is another.model and not _same_weights(owner, its_owner)
        for part, owner in _parts(model)
        for other in others
        for another, its_owner in _parts(other)
    )


def _apart(model, others):
    """The MODEL itself where it may share modules with the others, else a copy with modules of its own. Raises
    ValueError.
    """
    if not _clash(model, others):
        return model
    try:
        copy = model.clone(force_deepcopy=True)
        set_pack_patchers(copy, [pack.clone(force_deepcopy=True) for pack in pack_patchers(model)])
    except RuntimeError as error:
        raise ValueError(
            "Switch UNet: both models are one UNet with different LoRAs or patches, and this UNet cannot be loaded a "
            "second time because its loader does not say how. Load it with a stock loader or one of asdm's, or for the "
            "second model with a loader node of its own."
        ) from error
    if lost := bind_to_copy(copy, model):
        raise ValueError(
            "Switch UNet: both models are one UNet with different LoRAs or patches, so one of them needs a network of "
            f"its own, and another node on it holds the layers of the other's ({lost[0]}). Save that model as a file "
            "(Save UNet, Save Checkpoint), load the file, and put the other node on it then."
        )
    return copy


@contextmanager
def _each_module_once(model):
    """Let the host see every UNet and every pack of a switched MODEL once while it loads: who shares one needs no
    second.
    """
    seen, load = {id(model.model)}, []
    for part in model.get_nested_additional_models():
        if id(part.model) not in seen:
            seen.add(id(part.model))
            load.append(part)
    # Not by taking models away from the others: as they are loaded, other packs look there for what they insert.
    model.get_nested_additional_models = lambda: load
    try:
        yield
    finally:
        del model.get_nested_additional_models


def _on_clone(old, new):
    # A clone for compiling or hook LoRAs may have got a UNet object of its own: who shared the old one shares the new.
    fixed = []
    undynamic = old.is_dynamic() and not new.is_dynamic()
    for was, other in zip(others_of(old), others_of(new), strict=True):
        if was.model is old.model and new.model is not old.model:
            other = was.clone(disable_dynamic=undynamic, model_override=new.get_clone_model_override())
        elif undynamic:
            other = clone_for(new, was)
        fixed.append(other)
    new.set_additional_models(MODELS, fixed)


Switching.callbacks = ((CallbacksMP.ON_CLONE, _on_clone),)


# One sampling run -----------------------------------------------------------------------------------


class Player:
    """One MODEL of a run, with what a guider needs to sample with it."""

    def __init__(self, patcher, conds: dict, options: dict):
        self.patcher, self.conds, self.options = patcher, conds, options
        self.processed = False  # conds are encoded for the model at its first evaluation

    def acting(self, guider, **more):
        return _with_attributes(
            guider, model_patcher=self.patcher, model_options=self.options, conds=self.conds, **more
        )

    def wrappers(self, kind: str, others: Sequence[Player] = ()) -> list:
        """Its wrappers of a kind round the whole run. Without those that come from the conditionings, which all have in
        common, where its UNet is also that of one of the others, whose run they are round.
        """
        found = get_all_wrappers(kind, self.options, is_model_options=True)
        if self.sharing(others) is None:
            return found
        own = [
            *get_all_wrappers(kind, {"wrappers": self.patcher.wrappers}),
            *get_all_wrappers(kind, self.patcher.model_options, is_model_options=True),
        ]
        return [wrapper for wrapper in found if any(wrapper is one for one in own)]

    def sharing(self, others: Sequence[Player]) -> Player | None:
        """The first of the others with the same UNet object."""
        return next((other for other in others if other.patcher.model is self.patcher.model), None)

    @property
    def given(self) -> dict:
        """What is in its run's options for the network."""
        return self.options.get("transformer_options", {})


class Turns(InRun):
    """Who plays when in one sampling run. Dropped, with all it prepared, when the run ends."""

    def __init__(self, start: Start):
        guider, model = start.guider, start.model
        sampling = model.get_model_object("model_sampling")
        self._start, self._sigmas = start, start.sigmas.tolist()
        self._switches = [(s, s.sigma(self._sigmas, sampling.percent_to_sigma)) for s in switches_of(model)]
        self._guider, self._first = guider, Player(model, guider.conds, guider.model_options)
        self.others = [Player(patcher, {}, {}) for patcher in others_of(model)]
        self._known: set = set()  # what is in the options of the first one's run when its sampler begins
        self._now, self._inputs = self._first, {"latent_shapes": start.given.get("latent_shapes")}

    def left_out(self) -> list[str]:
        """A sentence for each model that no step of the run comes to."""
        steps, count = self._sigmas[:-1], len(self.others) + 1
        playing = {player for step, sigma in enumerate(steps) for player in self._shares(sigma, step)}
        return [
            f"Switch UNet: model {player + 1} of {count} plays in none of the {len(steps)} steps of this run: "
            + ("another takes over before the first" if player == 0 else "its turn would come after the last")
            + ". Move switch_at, or leave the node out."
            for player in range(count)
            if steps and player not in playing
        ]

    def _shares(self, sigma: float, step: int) -> dict[int, float]:
        return shares([s.weight(sigma, step, threshold, self._sigmas) for s, threshold in self._switches])

    @contextmanager
    def prepared(self):
        """Do for the other models what the guider has done for its own, and undo it."""
        with ExitStack() as stack:
            for player in self.others:
                stack.enter_context(self._prepared(player))
            yield

    @contextmanager
    def _prepared(self, player: Player):
        patcher, hook_mode = player.patcher, player.patcher.hook_mode
        player.conds = {k: [cond.copy() for cond in conds] for k, conds in self._guider.original_conds.items()}
        player.options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        comfy.samplers.preprocess_conds_hooks(player.conds)
        try:
            if comfy.samplers.get_total_hook_groups_in_conds(player.conds) <= 1:
                patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
            comfy.sampler_helpers.prepare_model_patcher(patcher, player.conds, player.options)
            comfy.samplers.filter_registered_hooks_on_conds(player.conds, player.options)
            yield
        finally:
            comfy.samplers.cast_to_load_options(player.options, device=patcher.offload_device)
            patcher.hook_mode = hook_mode
            patcher.restore_hook_patches()
            patcher.cleanup()

    def sample(self, call):
        """The run, within the OUTER_SAMPLE wrappers of the other models: they bind their packs, caches and so on."""

        def onward(*_, **__):
            with self._first.acting(self._guider):
                return call()

        for number, player in enumerate(self.others):
            onward = self._within(player, onward, (self._first, *self.others[:number]))
        with self.prepared():
            # What the other models' wrappers are given is what the first one's are.
            return onward(*self._start.args, **self._start.given)

    def _within(self, player: Player, onward, before: Sequence[Player]):
        def inside(*args, **kwargs):
            player.options = (
                self._guider.model_options
            )  # a wrapper may have put a copy of its own there, as EasyCache does
            return onward(*args, **kwargs)

        def call(*args, **kwargs):
            with player.acting(self._guider):
                return WrapperExecutor.new_class_executor(
                    inside, self._guider, player.wrappers(WrappersMP.OUTER_SAMPLE, before)
                ).execute(*args, **kwargs)

        return call

    def load(self, call, model, noise_shape, conds, model_options=None, **kwargs):
        """Load all models, with as much memory left as the one that needs most will use."""
        needs = []

        def note(patcher, shape, *_, **__):
            needs.append(patcher.model.memory_required([2 * shape[0], *shape[1:]]))
            return patcher.model, conds, []

        for number, player in enumerate(self.others):
            wrappers = player.wrappers(WrappersMP.PREPARE_SAMPLING, (self._first, *self.others[:number]))
            WrapperExecutor.new_executor(note, wrappers).execute(
                player.patcher, noise_shape, player.conds, model_options=player.options, **kwargs
            )
        factor = max(needs) / model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        shape = [noise_shape[0] * max(1, factor), *noise_shape[1:]]
        with _each_module_once(model):  # not before: the wrappers above look for packs
            return call(model, shape, conds, model_options=model_options, **kwargs)

    def begin_sampling(self, extra_args: dict, sigmas, **inputs) -> None:
        """All models are loaded and the sampler is about to start. inputs: of `process_conds`."""
        self._before = len(extra_args["model_options"].get(POST_CFG, []))
        self._inputs.update(inputs, seed=extra_args.get("seed"))
        self._first.options = extra_args["model_options"]
        self._take_masks()
        self._known = set(self._first.given)
        for number, player in enumerate(self.others):
            patcher, base = player.patcher, player.patcher.model
            sharing = player.sharing((self._first, *self.others[:number]))
            if sharing is not None:  # what the wrappers that went round both have put there
                player.given.update(_lacking(player, sharing.given))
            player.options["transformer_options"]["sample_sigmas"] = sigmas
            comfy.samplers.cast_to_load_options(player.options, device=patcher.load_device, dtype=patcher.model_dtype())
            holder = getattr(
                base, "current_patcher", None
            )  # of a UNet that is shared, which stays its until the turn changes
            patcher.pre_run()
            base.current_patcher = holder or patcher

    def _take_masks(self) -> None:
        """What Differential Diffusion puts on a MODEL changes the mask of an evaluation before its guider is asked, so
        the host reads it from the first model's options alone.
        """
        players = (self._first, *self.others)
        functions = [player.options.get(MASK) for player in players]
        if all(function is functions[0] for function in functions):
            return
        steps = Steps(self._sigmas)

        def mask_of(sigma: Tensor, mask: Tensor, extra_options: dict) -> Tensor:
            at, found = steps.at(float(sigma.flatten()[0])), torch.zeros_like(mask)
            for number, share in self._shares(at.sigma, at.step).items():
                player, function = players[number], functions[number]
                own = player.acting(self._guider, inner_model=player.patcher.model) if number else nullcontext()
                with own:
                    found = found + share * (function(sigma, mask, extra_options=extra_options) if function else mask)
            return found

        self._first.options[MASK] = mask_of

    def begin_evaluation(self, moment: Moment) -> None:
        self._playing = self._shares(moment.sigma, moment.step)

    def predict(self, call, x, timestep, options: dict, seed):
        players, playing = (self._first, *self.others), self._playing
        if len(playing) > 1:
            return self._mixed(players, playing, call, x, timestep, options, seed)
        (number,) = playing
        return self._evaluate(players[number], call, x, timestep, options, seed)

    def _mixed(self, players, playing: dict[int, float], call, x, timestep, options: dict, seed):
        """An evaluation in which several play. The sampler's own functions look into the guidance once, of
        all of them.
        """
        added, seen, out = self._added(options), [], 0.0
        if added:

            def look(args):
                seen.append((share, args))
                return args["denoised"]

            options = {**options, POST_CFG: [*options[POST_CFG][: self._before], look]}
        for number, share in playing.items():
            out = out + share * self._evaluate(players[number], call, x, timestep, options, seed)
        for function in added if seen else ():  # a cache can keep a guider from evaluating
            whole = sum(share for share, _ in seen)
            guidance = {
                name: sum(share / whole * args[name] for share, args in seen)
                for name in ("cond_denoised", "uncond_denoised")
            }
            out = function({**seen[0][1], **guidance, "denoised": out})
        return out

    def _added(self, given: dict) -> list:
        """The functions that the sampler added to the first model's (CFG++ looks into guidance so)."""
        return given.get(POST_CFG, [])[self._before :]

    def _evaluate(self, player: Player, call, x, timestep, options: dict, seed):
        self._turn_to(player)
        try:
            return self._evaluated(player, call, x, timestep, options, seed)
        except (AttributeError, KeyError, TypeError) as error:
            players = [one for one in (self._first, *self.others) if one is not player]
            missing = {key for one in players for key in _lacking(player, one.given)}
            if not missing:
                raise
            turn = "model_first" if player is self._first else "model_second"
            raise ValueError(
                f"Switch UNet: in the turn of {turn} another node failed "
                f"({type(error).__name__}: {printable(error)}). What it needs in the options of a run "
                f"({', '.join(sorted(map(printable, missing)))}) is there for the other model only. Put that node on "
                "both models, before Switch UNet."
            ) from error

    def _evaluated(self, player: Player, call, x, timestep, options: dict, seed):
        given = options.get("transformer_options", {})
        if player is self._first:
            return call(x, timestep, options, seed)
        # What the sampler has put there since the run began is for whoever plays.
        player.given.update({k: v for k, v in given.items() if not (k in self._known or k in _HOSTS or _is_ours(k))})
        options = self._with_sampler_functions(player.options, options)
        with player.acting(self._guider, inner_model=player.patcher.model):
            return WrapperExecutor.new_class_executor(
                self._guider.predict_noise,
                self._guider,
                get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True),
            ).execute(x, timestep, options, seed)

    def _turn_to(self, player: Player) -> None:
        if player is self._now:
            return
        # What the other has hooked lies in weights that both may have: of the UNet, or of a pack beside two UNets.
        for part in (self._now.patcher, *pack_patchers(self._now.patcher)):
            part.clean_hooks()
        base, patcher = player.patcher.model, player.patcher
        if base.current_patcher is not patcher:
            base.current_patcher.clean_hooks()
            base.current_patcher = patcher
        conds = self._guider.conds if player is self._first else player.conds
        if player is not self._first and not player.processed:
            # Only now: it also maps ControlNets to this model's noise levels.
            player.conds = comfy.samplers.process_conds(base, conds=conds, **self._inputs)
            player.processed = True
        else:
            for cond in conds.values():
                comfy.samplers.pre_run_control(base, cond)
        self._now = player

    def _with_sampler_functions(self, own: dict, given: dict) -> dict:
        """A player's options with those functions."""
        added = self._added(given)
        if not added:
            return own
        options = comfy.model_patcher.create_model_options_clone(own)
        for function in added:
            comfy.model_patcher.set_model_options_post_cfg_function(
                options, function, given.get("disable_cfg1_optimization", False)
            )
        return options


def _lacking(player: Player, given: dict) -> dict:
    """What others have put into the options of another's run and not into those of this player."""
    return {k: v for k, v in given.items() if not (k in player.given or k in _HOSTS or _is_ours(k))}


def _is_ours(key: object) -> bool:
    return str(key).startswith(KEY)


@contextmanager
def _with_attributes(thing, **attributes):
    before = {name: getattr(thing, name) for name in attributes}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        vars(thing).update(before)
