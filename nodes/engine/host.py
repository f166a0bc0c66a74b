"""Everything asdm knows about the host's ModelPatcher: how a assignment gets onto a MODEL and into a run.

A node stores plain data on a clone (a `Setup`) and appends the pack's patcher to its additional models.
Nothing is bound to modules then, because the host makes new UNet objects behind everybody's back
(compile, hook LoRAs, other devices). Binding happens per run: the OUTER_SAMPLE wrapper builds a `Run`
for the very model being sampled, PREDICT_NOISE tells it the sigma once per evaluation, and the end of
the run drops it. The wrappers are plain functions without closures, so clones and branches share no state.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import comfy.hooks
import comfy.model_patcher
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, forward_timestep_embed
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...asdm_core.addresses import UNetConfig, unit
from ...asdm_core.architecture import FAMILIES, Architecture
from ...asdm_core.assignment import Assignment, Override, Provider, fingerprint
from ...asdm_core.inheritance import Plan
from . import units
from .forecasts import Forecasts
from .regional import Attention, Regional
from .feature_cache import COMPUTE, PROBE, REPLAY, Inheritance, Log, Misfit, Report, step_of
from .timing import Laps, Record, Recorder

KEY = "asdm"
DOOR = "forward_timestep_embed_patch"  # the host's hook for single layers
OTHERS = f"{KEY}_others"  # in transformer_options during a forward: the patches without our entry
MEMORY, HELD = f"{KEY}_memory", f"{KEY}_held"  # there, and among the network's arguments: see `_diffusion_model`


# What a MODEL is ------------------------------------------------------------------------------------


def architecture_of(model) -> Architecture:
    """The skeleton and the cut units of the UNet of a MODEL.

    Raises ValueError for a MODEL whose network is not a UNet of the LDM kind.
    """
    config = model.model.model_config
    known = vars(config).get("asdm_architecture")  # plain getattr on a host config warns and gives None
    if known is not None:
        return known
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            f"asdm works on Stable Diffusion UNets (SD1.x, SD2.x, SDXL); this MODEL is a "
            f"{type(model.model.diffusion_model).__name__}."
        )
    unet = UNetConfig.from_host(config.unet_config)
    return Architecture.full(replace(unet, family=family_of(unet)))


def family_of(config: UNetConfig) -> str:
    """Name of the known family with this skeleton, whatever its input and output channels; "" for none."""
    for family in FAMILIES.values():
        if same_skeleton(family, config):
            return family.family
    return ""


def same_skeleton(a: UNetConfig, b: UNetConfig) -> bool:
    """Whether two UNets have the same units (inpainting models have more input channels, no other units)."""
    return replace(a, family="", in_channels=4, out_channels=4) == replace(b, family="", in_channels=4, out_channels=4)


# What a MODEL carries -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """The data asdm keeps on a MODEL: its assignment, the ids of its packs in the order of their patchers, its feature
    inheritance, its GRI attention, where the times of its runs go if they are measured, and its forecasts of whole
    evaluations."""

    assignment: Assignment
    packs: tuple[str, ...] = ()
    inheritance: Inheritance | None = None
    regional: Regional | None = None
    speed: Log | None = None
    forecasts: Forecasts | None = None


def setup_of(model) -> Setup:
    return model.get_attachment(KEY) or Setup(Assignment(architecture_of(model).config))


def packs_of(model) -> dict[str, comfy.model_patcher.ModelPatcher]:
    """Pack patchers of a MODEL by pack id."""
    return dict(zip(setup_of(model).packs, model.get_additional_models_with_key(KEY), strict=True))


def clone_for(model, patcher):
    """A clone of a patcher that is to play beside MODEL: an ordinary one where MODEL is (it is compiled, or has hook
    LoRAs).

    Its weights are read once and kept by `patcher`, which should outlive the run therefore. One whose loader does not
    say how to read it again stays as it is.
    """
    if patcher.is_dynamic() and not model.is_dynamic() and patcher.cached_patcher_init is not None:
        return patcher.get_non_dynamic_delegate()
    return patcher.clone()


def pack_architecture(model, pack_id: str) -> Architecture:
    return packs_of(model)[pack_id].model.architecture


def with_pack(model, pack_id: str, patcher, lines: Iterable[Override]):
    """A clone of MODEL in which a pack plays some lines. The MODEL that came in is not altered."""
    clone = model.clone()
    setup, packs = setup_of(model), packs_of(clone)
    if pack_id not in packs:
        packs[pack_id] = clone_for(clone, patcher)
    clone.set_additional_models(KEY, list(packs.values()))
    return _set_up(clone, replace(setup, assignment=setup.assignment.with_overrides(lines), packs=tuple(packs)))


def with_plan(model, plan: Plan | None, **keeping):
    """A clone of MODEL that inherits features as the plan says. The MODEL that came in is not altered.

    keeping: see `Inheritance`. Raises ValueError for a plan that names units this UNet does not have.
    """
    architecture = architecture_of(model)
    if plan is not None:
        plan.reuse(architecture.config, architecture.cut)
    return _set_up(model.clone(), replace(setup_of(model), inheritance=plan and Inheritance(plan, **keeping)))


def with_regional(model, regional: Regional | None):
    """A clone of MODEL with GRI attention in the shallow levels. The MODEL that came in is not altered."""
    return _set_up(model.clone(), replace(setup_of(model), regional=regional))


def with_forecasts(model, forecasts: Forecasts | None):
    """A clone of MODEL that leaves out evaluations of the network. The MODEL that came in is not altered."""
    return _set_up(model.clone(), replace(setup_of(model), forecasts=forecasts))


def with_survey(model, survey):
    """A clone of MODEL whose next run is measured by a survey (see `calibrate.Survey`) instead of inheriting."""
    return _set_up(model.clone(), replace(setup_of(model), inheritance=survey))


def with_speed(model):
    """A clone of MODEL whose runs are timed, layer by layer. The MODEL that came in is not altered."""
    return _set_up(model.clone(), replace(setup_of(model), speed=Log()))


def without_setup(model):
    """A clone of MODEL that carries nothing of this module's: the checkpoint plays everything itself."""
    clone = model.clone()
    clone.remove_attachments(KEY)
    clone.remove_additional_models(KEY)
    for kind, _ in _WRAPPERS:
        clone.remove_wrappers_with_key(kind, KEY)
    for kind, _ in _CALLBACKS:
        clone.remove_callbacks_with_key(kind, KEY)
    return clone


def cache_bytes(model, shape, conds: int) -> int:
    """Bytes that feature inheritance remembers in a run on latents of a shape (B, C, H, W), with so many
    conditionings.
    """
    inheritance = setup_of(model).inheritance
    if inheritance is None:
        return 0
    itemsize = torch.empty((), dtype=model.model.get_dtype_inference()).element_size()
    return inheritance.bytes(architecture_of(model), shape, conds, itemsize)


def _set_up(clone, setup: Setup):
    clone.set_attachments(KEY, setup)
    for kind, wrapper in _WRAPPERS:
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    for kind, callback in _CALLBACKS:
        clone.remove_callbacks_with_key(kind, KEY)
        clone.add_callback_with_key(kind, KEY, callback)
    return clone


# One sampling run -----------------------------------------------------------------------------------


class Run:
    """The assignment of one sampling run, bound to the modules of the model being sampled.

    Holds modules, never a ModelPatcher, and is dropped when the run ends.
    """

    def __init__(self, model, sigmas=(), cache: int = 0, shape=()):
        setup = setup_of(model)
        self.assignment, self._inheritance, self._regional = setup.assignment, setup.inheritance, setup.regional
        self._speed, self._recorder = setup.speed, Recorder(model.load_device) if setup.speed else None
        self._nodes, self._step, self._shape = sigmas, 0, shape
        self._laps = Laps(model.load_device) if self._inheritance else None
        sampling = model.get_model_object("model_sampling")
        # The last window also holds sigma 0, where some samplers ask once more.
        self._sigmas = {
            w: (sampling.percent_to_sigma(w.start), sampling.percent_to_sigma(w.end) if w.end < 1 else -1.0)
            for w in (*self.assignment.windows, *([self._regional.when] if self._regional else []))
        }
        self.forecaster = None
        # One stage per UNet object: multi-GPU clones have their own modules and their own packs.
        self._stages = {
            id(m.model): Stage(m, sigmas, cache, self._recorder)
            for m in (model, *model.get_additional_models_with_key("multigpu"))
        }

    def set_sigma(self, sigma: float) -> None:
        """Decide who plays at this noise level. Called once per evaluation."""
        active = tuple(w for w, (high, low) in self._sigmas.items() if low < sigma <= high)
        parts, experts = self.assignment.providers(active), self.assignment.joining("experts", active)
        regional = self._regional is not None and self._regional.when in active
        log_gains = self.assignment.joining("log_gains", active) if regional else {}
        for stage in self._stages.values():
            stage.assign(parts, experts, log_gains, regional)
            if stage.memory is not None:
                stage.memory.begin_evaluation(sigma)
        if self.forecaster is not None:
            self.forecaster.begin_evaluation(sigma)
        memory = self._memory()
        if memory is not None:
            self._laps.begin(memory.step)

    def evaluated(self) -> None:
        """The evaluation that set_sigma began is over."""
        if self._memory() is not None:
            self._laps.end()

    def timed(self, sigma: float):
        """A context for one evaluation at this noise level, which is timed if that was asked for."""
        if self._recorder is None:
            return nullcontext()
        self._step = step_of(sigma, self._nodes, self._step)
        return self._recorder.evaluation(self._step)

    def _memory(self):
        return next((stage.memory for stage in self._stages.values() if stage.memory is not None), None)

    def stage(self, base_model) -> Stage | None:
        """The stage of a model of this run; None for any other (guiders can sample two models)."""
        return self._stages.get(id(base_model))

    def close(self) -> None:
        if self.forecaster is not None:
            self.forecaster.close()
        memory = self._memory()
        if self._inheritance is not None:  # without a memory it was off in this run
            self._inheritance.log.last = memory and Report(
                memory.steps, memory.counts, memory.replayed(), self._laps.seconds(), memory.peak
            )
        if self._recorder is not None:
            self._speed.last = Record(
                self._shape, self._recorder.evaluations(), memory.replayed() if memory else [], self._recorder.layers()
            )
        for stage in self._stages.values():
            if stage.memory is not None:
                stage.memory.close()
        self._stages.clear()


class Stage:
    """The layers of one UNet object, the packs that stand beside it, and who plays at the moment."""

    def __init__(self, model, sigmas, cache: int, recorder: Recorder | None):
        setup = setup_of(model)
        architecture, inheritance = architecture_of(model), setup.inheritance
        self._config = architecture.config
        self._layers = units.layers(model.model.diffusion_model, self._config)
        packs = packs_of(model)
        self._cut = architecture.cut
        self._packs = {pack_id: patcher.model for pack_id, patcher in packs.items()}
        self._serials = ",".join(str(patcher.model.serial) for patcher in packs.values())
        self._assigned: tuple[dict[str, Provider], dict[str, Provider], dict[str, Provider], bool] = {}, {}, {}, False
        self._players: dict[int, torch.nn.Module] = {}
        self._playing = self._layers
        self._addresses = {id(layer): address for address, layer in self._layers.items()}
        self.memory = inheritance.memory(architecture, sigmas, cache) if inheritance else None
        self._attention = Attention(setup.regional, self._config) if setup.regional else None
        self._recorder = recorder
        self.name = ""
        self.entry = (units.LAYER_CLASSES, self._dispatch)

    @property
    def remembers(self) -> bool:
        """Whether the running forward has to do with memory."""
        return self.memory is not None and self.memory.mode != COMPUTE

    @property
    def probes(self) -> bool:
        """Whether the running forward decides on its way what it inherits. No graph can do that."""
        return self.memory is not None and self.memory.mode == PROBE

    def defies_graphs(self, patches: dict) -> bool:
        """Whether the running forward cannot be one compiled graph. Deep shrink reads the noise level at the end of a
        block, which breaks a graph there, and TorchCompileModel leaves out the guards by which the second piece would
        notice whether it is to inherit. What then computes in full is not worth the many graphs of its pieces.
        """
        return (
            self.probes
            or self.memory is not None
            and any(patches.get(name) for name in ("input_block_patch", "input_block_patch_after_skip"))
        )

    def enter_attention(self, transformer_options: dict) -> dict:
        """The options of a forward with GRI attention in them, if it plays at the moment."""
        return self._attention.enter(transformer_options) if self._assigned[-1] else transformer_options

    def begin_forward(self, x, control, transformer_options, hooks) -> str:
        """Name of what is about to be played; "" if the checkpoint plays everything itself, unrecorded."""
        if self.memory is None:
            return self._named(COMPUTE)
        assignment = self.name, _circumstances(control, transformer_options, hooks)
        return self._named(self.memory.begin_forward(x, transformer_options, assignment, self._playing))

    def begin_again(self) -> str:
        """The same for a forward that inherited what did not fit."""
        return self._named(self.memory.begin_again())

    def _named(self, mode: str) -> str:
        name = self.name if mode == COMPUTE else f"{self.name}_{mode}_{self.memory.name}"
        return f"{name}_timed" if self._recorder else name  # layers are seen by the dispatcher alone

    def _timed(self, address: str | None, inherits: bool):
        if self._recorder is None or address is None or torch.compiler.is_compiling():  # a compiled graph has no layers
            return nullcontext()
        parts = self._assigned[0]
        cut = parts[address].role == "cut" if address in parts else address in self._cut
        regional = self._assigned[-1] and address in self._attention.blocks.values()
        return self._recorder.layer(
            address, "inherited" if inherits else "cut" if cut else "regional" if regional else "played"
        )

    def trials(self):
        """What a survey wants played again in this forward: (name, what to call with both outputs)."""
        for compare in self.memory.trials() if self.memory else ():
            yield self._named(REPLAY), compare

    def assign(
        self, parts: dict[str, Provider], experts: dict[str, Provider], log_gains: dict[str, Provider], regional: bool
    ) -> None:
        if (parts, experts, log_gains, regional) == self._assigned:
            return
        self._assigned = parts, experts, log_gains, regional
        experts = {a: part for a, part in experts.items() if a in parts or a not in self._cut}
        players = {address: self._player(address, part) for address, part in parts.items()}
        for address, part in experts.items():
            layer = players.get(address, self._layers[address])
            players[address] = self._packs[part.source].with_experts(address, layer, part.strength)
        bypassed = {address: units.with_bypass(player, self._layers[address]) for address, player in players.items()}
        self._players = {id(self._layers[address]): player for address, (player, _) in bypassed.items()}
        self._playing = {address: self._players.get(id(layer), layer) for address, layer in self._layers.items()}
        bypass = ";".join(f"{id(hook.adapter)}*{hook.multiplier}" for _, hooks in bypassed.values() for hook in hooks)
        everybody = parts | {f"{a}.{p.role}": p for joining in (experts, log_gains) for a, p in joining.items()}
        self.name = fingerprint(everybody, self._serials + bypass) if everybody else ""
        if regional:
            self._attention.log_gains = {
                address: self._packs[part.source].log_gains(address, part.strength)
                for address, part in log_gains.items()
            }
            self.name += self._attention.name

    def _player(self, address: str, part: Provider) -> torch.nn.Module:
        if part.role == "pack":
            return self._packs[part.source].layer(address)
        return units.shared_stand_in(unit(self._config, address))

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
        remembers = self.remembers and address is not None
        if remembers:
            player = self.memory.player(address, current)
        # With our entry in place the host's function would come straight back to us. It also advances
        # counters in transformer_options, so it must get this very dict, not a copy.
        ours = transformer_options["patches"]
        transformer_options["patches"] = transformer_options[OTHERS]
        inherits = remembers and self.memory.mode == REPLAY and player is not current
        try:
            with self._timed(address, inherits):
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
        if remembers:
            self.memory.after(address, current, x, out)
        return out


def _circumstances(control, transformer_options, hooks) -> tuple:
    """What must be as it was, beside the assignment, for features to be inherited: where control acts and others
    replace attention, the strengths of hook LoRAs, the window of frames."""
    window = transformer_options.get("context_window")
    return (
        frozenset(
            (kind, i) for kind, residuals in (control or {}).items() for i, r in enumerate(residuals) if r is not None
        ),
        frozenset(
            (kind, place) for kind, places in transformer_options.get("patches_replace", {}).items() for place in places
        ),
        tuple(hook.strength for hook in hooks.hooks) if hooks else (),
        tuple(window.index_list) if window else (),
    )


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    # The host's own next step: a pack that was applied after the work was split has no units there yet.
    guider.model_patcher.match_multigpu_clones()
    cache = cache_bytes(guider.model_patcher, noise.shape, sum(map(len, guider.conds.values())))
    run = Run(guider.model_patcher, sigmas.tolist(), cache, tuple(noise.shape))
    forecasts = setup_of(guider.model_patcher).forecasts
    if forecasts is not None:
        run.forecaster = forecasts.begin_run(sigmas, guider, sampler)
    guider.model_options["transformer_options"][KEY] = run  # the run's own copy; the guider restores the original
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        run.close()


def _predict_noise(executor, x, timestep, model_options={}, seed=None):
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    sigma = float(timestep.flatten()[0])
    run.set_sigma(sigma)
    with run.timed(sigma):
        out = executor(x, timestep, model_options, seed)
    run.evaluated()
    return out


def _calc_cond_batch(executor, model, conds, x, timestep, model_options):
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is None or run.forecaster is None:
        return executor(model, conds, x, timestep, model_options)
    return run.forecaster.calc_cond_batch(executor, model, conds, x, timestep, model_options)


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    run = transformer_options.get(KEY)
    stage = run and run.stage(executor.class_obj)
    if stage is not None:
        transformer_options = stage.enter_attention(transformer_options)

    def forward(name: str):
        options, named = transformer_options, {}
        if name:
            patches = options.get("patches", {})
            entries = [stage.entry, *patches.get(DOOR, [])]
            options = {**options, OTHERS: patches, "patches": {**patches, DOOR: entries}}
            # The host's TorchCompileModel keeps no guard on transformer_options, so a compiled graph would go
            # on playing the assignment of its first trace. It does guard the names of keyword arguments, which the
            # UNet ignores: one name per assignment makes one graph per assignment.
            named[f"{KEY}_{name}"] = None
            if stage.remembers and not stage.probes:
                options[MEMORY], named[HELD] = stage.memory, stage.memory.held
        # The UNet pops residuals off these lists, and a survey goes through it more than once.
        residuals = control and {k: list(v) for k, v in control.items()}
        with (
            torch.compiler.set_stance("force_eager")
            if stage and stage.defies_graphs(options.get("patches", {}))
            else nullcontext()
        ):
            return executor(x, t, c_concat, c_crossattn, residuals, options, **kwargs, **named)

    if stage is None:
        return forward("")
    try:
        out = forward(
            stage.begin_forward(x, control, transformer_options, executor.class_obj.current_patcher.current_hooks)
        )
    except Misfit:
        out = forward(stage.begin_again())
    for name, compare in stage.trials():
        with suppress(Misfit):
            compare(out, forward(name))
    return out


def _diffusion_model(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):
    # This is inside of what gets compiled. Taken from its arguments, remembered tensors are inputs of a graph, and the
    # compiler guards their form as that of x; what it finds by way of transformer_options it takes to be for ever as it
    # first was.
    if HELD in kwargs:
        transformer_options[MEMORY].held = kwargs.pop(HELD)
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def _prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    for base in (model, *model.get_additional_models_with_key("multigpu")):
        sync_patches(model, base.get_additional_models_with_key(KEY))
    setup, extra = setup_of(model), 0
    if setup.inheritance is not None and not setup.inheritance.on_cpu:
        extra += cache_bytes(model, noise_shape, sum(map(len, conds.values())))
    if setup.forecasts is not None:
        extra += setup.forecasts.bytes(noise_shape, len(conds))
    if extra:
        # The host plans memory by the shape of the latents alone and knows nothing of what is remembered:
        # a batch that is larger by as much makes it leave room for it.
        planned = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        noise_shape = [noise_shape[0] * (1 + extra / planned), *noise_shape[1:]]
    return executor(model, noise_shape, conds, *args, **kwargs)


# LoRA on packs --------------------------------------------------------------------------------------


def _is_lora(patch) -> bool:
    # Merges are patches too; they scale the model's own weight or bring another model's. Blending a
    # foreign model into trained units would be wrong.
    _, value, strength_model = patch[:3]
    return strength_model == 1.0 and not isinstance(value, list)


def sync_patches(model, pack_patchers) -> None:
    """Give packs the LoRA patches of their MODEL, as far as they concern units the packs have.

    Runs before loading, so LoRAs that were added after the pack count as well. The same stack gives the
    same uuid, so nothing is patched again on a rerun.
    """
    for patcher in pack_patchers:
        known = patcher.model.state_dict()
        patcher.patches = {k: [p for p in v if _is_lora(p)] for k, v in model.patches.items() if k in known}
        patcher.patches_uuid = uuid.uuid5(model.patches_uuid, KEY)


def _register_hook_patches(model, hooks, target_dict, model_options, registered):
    for patcher in model.get_additional_models_with_key(KEY):
        known = patcher.model.state_dict()
        patcher.hook_patches = {
            ref: {k: v for k, v in patches.items() if k in known} for ref, patches in model.hook_patches.items()
        }
        # The other mode caches weights per hook group and would serve those of an earlier keyframe.
        patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram


def _apply_hooks(model, hooks):
    for patcher in model.get_additional_models_with_key(KEY):
        patcher.patch_hooks(hooks)


def _cleanup(model):
    for patcher in model.get_additional_models_with_key(KEY):
        patcher.clean_hooks()


def _on_clone(old, new):
    # A non-dynamic delegate (hook LoRAs, compile) needs packs that can be patched the same way.
    if old.is_dynamic() and not new.is_dynamic():
        new.set_additional_models(KEY, [clone_for(new, pack) for pack in old.get_additional_models_with_key(KEY)])


_WRAPPERS = (
    (WrappersMP.OUTER_SAMPLE, _outer_sample),
    (WrappersMP.PREDICT_NOISE, _predict_noise),
    (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
    (WrappersMP.APPLY_MODEL, _apply_model),
    (WrappersMP.DIFFUSION_MODEL, _diffusion_model),
    (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
)
_CALLBACKS = (
    (CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, _register_hook_patches),
    (CallbacksMP.ON_APPLY_HOOKS, _apply_hooks),
    (CallbacksMP.ON_CLEANUP, _cleanup),
    (CallbacksMP.ON_CLONE, _on_clone),
)
