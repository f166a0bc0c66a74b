"""Several UNets in one sampling run: how the host is made to sample with another MODEL from a step on.

Much of what a MODEL brings acts above its network: guidance functions, prediction type, ControlNet mapping, encoded
conditionings. So the turn changes in PREDICT_NOISE, where one evaluation of the guider begins: the guider gets the
other MODEL's network, conditionings and options, and the other MODEL's own wrappers are called as the host would.
The sampler sees one model function and keeps its history.
"""

from __future__ import annotations

import inspect
import operator
from contextlib import ExitStack, contextmanager

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.weight_adapter import BypassInjectionManager
from ...asdm_core.switching import Switch, SwitchPoint, shares
from . import host
from .feature_cache import step_of

KEY = "asdm_switch"
POST_CFG = "sampler_post_cfg_function"


# What a switched MODEL carries: its Switches as an attachment, the MODELs they bring in as additional models ------


def switches_of(model) -> tuple[Switch, ...]:
    return model.get_attachment(KEY) or ()


def others_of(model) -> list:
    return model.get_additional_models_with_key(KEY)


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
    for model in others:
        _set_up(model, (), [])
    return _set_up(clone, switches, others)


def beside(first, second):
    """A clone of MODEL `second` that can take turns with `first`: what the two want in different states, it has a copy
    of its own of.

    Who switches between the same two many times calls this once, and so copies once. Raises ValueError.
    """
    clone = host.clone_for(first, second)
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
        clone.set_additional_models(KEY, [change(other) for other in others])
    return clone


def without_switches(model):
    """A clone of MODEL that samples alone, with what it carries besides."""
    return _set_up(model.clone(), (), [])


def _set_up(model, switches: tuple[Switch, ...], others: list):
    """Make a MODEL carry these switches and no others; the MODEL itself is changed and returned."""
    model.remove_attachments(KEY)
    model.remove_additional_models(KEY)
    for kind, wrapper in _WRAPPERS:
        model.remove_wrappers_with_key(kind, KEY)
        if switches:
            # Before all others: what wraps the first model's evaluations must not wrap those of the second.
            model.wrappers[kind] = {KEY: [wrapper], **model.wrappers.get(kind, {})}
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    if switches:
        model.set_attachments(KEY, switches)
        model.set_additional_models(KEY, others)
        model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _on_clone)
    return model


def _check_fit(first, second) -> None:
    a, b = (host.architecture_of(model).config for model in (first, second))
    same_latents = type(first.model.latent_format) is type(second.model.latent_format)
    if not same_latents or (a.context_dim, a.adm_channels) != (b.context_dim, b.adm_channels):
        names = [config.family or f"of an unknown family (text width {config.context_dim})" for config in (a, b)]
        raise ValueError(
            f"Switch UNet: model_first is {names[0]}, model_second is {names[1]}. Models that take turns need the "
            "same kind of "
            "latents and of text conditioning. Choose two of one family, or sample one after the other with a VAE in "
            "between."
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
    return [(model, model), *((pack, model) for pack in model.get_additional_models_with_key(host.KEY))]


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
        copy.set_additional_models(
            host.KEY, [pack.clone(force_deepcopy=True) for pack in model.get_additional_models_with_key(host.KEY)]
        )
        copy.is_injected = False  # as the original may be at the moment
        copy.injections = {k: [_bound_to(copy, injection) for injection in v] for k, v in copy.injections.items()}
    except RuntimeError as error:
        raise ValueError(
            "Switch UNet: both models are one UNet with different LoRAs or patches, and this UNet cannot be loaded a "
            "second "
            "time because its loader does not say how. Load it with a stock loader or one of asdm's."
        ) from error
    return copy


def _bound_to(model, injection):
    """An injection as it is; of a bypass LoRA, which holds the modules of the UNet it was made for, one for the UNet of
    MODEL.
    """
    manager = inspect.getclosurevars(injection.inject).nonlocals.get("self")
    if not isinstance(manager, BypassInjectionManager):
        return injection
    anew = BypassInjectionManager()
    anew.adapters = manager.adapters
    return anew.create_injections(model.model)[0]


@contextmanager
def _each_module_once(model):
    """Let the host see every UNet and every pack of a switched MODEL once while it loads: who shares one needs no
    second.
    """
    others = others_of(model)
    seen, load = {id(m.model) for m in (model, *model.get_additional_models_with_key(host.KEY))}, []
    for patcher in others:
        for part in (patcher, *patcher.get_nested_additional_models()):
            if id(part.model) not in seen:
                seen.add(id(part.model))
                load.append(part)
    kept = [(other, other.additional_models) for other in others]
    model.set_additional_models(KEY, load)
    for other in others:
        other.additional_models = {}
    try:
        yield
    finally:
        model.set_additional_models(KEY, others)
        for other, additional in kept:
            other.additional_models = additional


def _on_clone(old, new):
    # A clone for compiling or hook LoRAs may have got a UNet object of its own: who shared the old one shares the new.
    fixed = []
    undynamic = old.is_dynamic() and not new.is_dynamic()
    for was, other in zip(others_of(old), others_of(new), strict=True):
        if was.model is old.model and new.model is not old.model:
            other = was.clone(disable_dynamic=undynamic, model_override=new.get_clone_model_override())
        elif undynamic:
            other = host.clone_for(new, was)
        fixed.append(other)
    new.set_additional_models(KEY, fixed)


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

    def wrappers(self, kind: str) -> list:
        return get_all_wrappers(kind, self.options, is_model_options=True)


class Run:
    """Who plays when in one sampling run. Dropped, with all it prepared, when the run ends."""

    def __init__(self, guider, sigmas, latent_shapes):
        model = guider.model_patcher
        sampling = model.get_model_object("model_sampling")
        self._sigmas = sigmas.tolist()
        self._switches = [(s, s.sigma(self._sigmas, sampling.percent_to_sigma)) for s in switches_of(model)]
        self._guider, self._first = guider, Player(model, guider.conds, guider.model_options)
        self.others = [Player(patcher, {}, {}) for patcher in others_of(model)]
        self._now, self._step, self._inputs = self._first, 0, {"latent_shapes": latent_shapes}

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

    def sample(self, call, args, kwargs):
        """The run, within the OUTER_SAMPLE wrappers of the other models: they bind their packs, caches and so on."""

        def onward(*_, **__):
            with self._first.acting(self._guider):
                return call(*args, **kwargs)

        for player in self.others:
            onward = self._within(player, onward)
        return onward(*args, **kwargs)

    def _within(self, player: Player, onward):
        def inside(*args, **kwargs):
            player.options = (
                self._guider.model_options
            )  # a wrapper may have put a copy of its own there, as EasyCache does
            return onward(*args, **kwargs)

        def call(*args, **kwargs):
            with player.acting(self._guider):
                return WrapperExecutor.new_class_executor(
                    inside, self._guider, player.wrappers(WrappersMP.OUTER_SAMPLE)
                ).execute(*args, **kwargs)

        return call

    def load(self, executor, model, noise_shape, conds, model_options, **kwargs):
        """Load all models, with as much memory left as the one that needs most will use."""
        needs = []

        def note(patcher, shape, *_, **__):
            needs.append(patcher.model.memory_required([2 * shape[0], *shape[1:]]))
            return patcher.model, conds, []

        for player in self.others:
            WrapperExecutor.new_executor(note, player.wrappers(WrappersMP.PREPARE_SAMPLING)).execute(
                player.patcher, noise_shape, player.conds, model_options=player.options, **kwargs
            )
        factor = max(needs) / model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        shape = [noise_shape[0] * max(1, factor), *noise_shape[1:]]
        with _each_module_once(model):  # not before: the wrappers above look for packs
            return executor(model, shape, conds, model_options=model_options, **kwargs)

    def begin(self, extra_args: dict, sigmas, **inputs) -> None:
        """All models are loaded and the sampler is about to start. inputs: of `process_conds`."""
        self._before = len(extra_args["model_options"].get(POST_CFG, []))
        self._inputs.update(inputs, seed=extra_args.get("seed"))
        for player in self.others:
            patcher, base = player.patcher, player.patcher.model
            player.options["transformer_options"]["sample_sigmas"] = sigmas
            comfy.samplers.cast_to_load_options(player.options, device=patcher.load_device, dtype=patcher.model_dtype())
            holder = getattr(
                base, "current_patcher", None
            )  # of a UNet that is shared, which stays its until the turn changes
            patcher.pre_run()
            base.current_patcher = holder or patcher

    def predict(self, executor, x, timestep, options: dict, seed):
        sigma = float(timestep.flatten()[0])
        self._step = step_of(sigma, self._sigmas, self._step)
        weights = [switch.weight(sigma, self._step, threshold, self._sigmas) for switch, threshold in self._switches]
        players, playing = (self._first, *self.others), shares(weights)
        if len(playing) > 1:
            return self._mixed(players, playing, executor, x, timestep, options, seed)
        (number,) = playing
        return self._evaluate(players[number], executor, x, timestep, options, seed)

    def _mixed(self, players, playing: dict[int, float], executor, x, timestep, options: dict, seed):
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
            out = out + share * self._evaluate(players[number], executor, x, timestep, options, seed)
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

    def _evaluate(self, player: Player, executor, x, timestep, options: dict, seed):
        self._turn_to(player)
        if player is self._first:
            return executor(x, timestep, options, seed)
        options = self._with_sampler_functions(player.options, options)
        with player.acting(self._guider, inner_model=player.patcher.model):
            return WrapperExecutor.new_class_executor(
                executor.original,
                self._guider,
                get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True),
            ).execute(x, timestep, options, seed)

    def _turn_to(self, player: Player) -> None:
        if player is self._now:
            return
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


@contextmanager
def _with_attributes(thing, **attributes):
    before = {name: getattr(thing, name) for name in attributes}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        vars(thing).update(before)


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    model = guider.model_patcher
    present = [model, *others_of(model)]
    if any(_clash(other, present[:i]) for i, other in enumerate(present)):
        raise ValueError(
            "The MODEL got a LoRA or another patch after Switch UNet, and both of its models are one UNet. Put the "
            "node before "
            "Switch UNet, on the model it is meant for; with different patches on each, the second gets its own copy."
        )
    run = Run(guider, sigmas, kwargs.get("latent_shapes"))
    guider.model_options["transformer_options"][KEY] = run
    with run.prepared():
        return run.sample(executor, (noise, latent_image, sampler, sigmas, *args), kwargs)


def _prepare_sampling(executor, model, noise_shape, conds, model_options=None, **kwargs):
    run = model_options["transformer_options"].get(KEY)
    if run is None:
        return executor(model, noise_shape, conds, model_options=model_options, **kwargs)
    return run.load(executor, model, noise_shape, conds, model_options, **kwargs)


def _sampler_sample(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
):
    run = extra_args["model_options"]["transformer_options"].get(KEY)
    if run is not None:
        run.begin(
            extra_args, sigmas, noise=noise, latent_image=latent_image, denoise_mask=denoise_mask, device=noise.device
        )
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)


def _predict_noise(executor, x, timestep, model_options={}, seed=None):
    run = model_options["transformer_options"].get(KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    return run.predict(executor, x, timestep, model_options, seed)


_WRAPPERS = (
    (WrappersMP.OUTER_SAMPLE, _outer_sample),
    (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
    (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
    (WrappersMP.PREDICT_NOISE, _predict_noise),
)
