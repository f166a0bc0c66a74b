"""Where runs meet the host: its wrappers round sampling, evaluations and forwards of the network.

They are plain functions without closures, so that clones and branches of a MODEL share no state; what belongs to a run
is in its transformer_options, which the host copies for each run.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...asdm_core.frames import with_room
from . import notes
from .run import OTHERS, Run
from .technique import KEY, Misfit, Start, named_by_node, placed_on, techniques_of

OUTER_KEY = f"{KEY}_outer"
DOOR = "forward_timestep_embed_patch"  # the host's hook for single layers
HOLDING, HELD = f"{KEY}_holding", f"{KEY}_held"  # in transformer_options, and among the network's arguments


# The runs under way, one within the other: their keys and the MODELs that are sampled.
_RUNNING: ContextVar[tuple] = ContextVar("asdm_running", default=())


def _outer_sample(key, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    # The host's own next step: a pack that was applied after the work was split has no units there yet.
    guider.model_patcher.match_multigpu_clones()
    placed = [p for p in placed_on(guider.model_patcher) if p.technique.outermost == (key == OUTER_KEY)]
    given = noise, latent_image, sampler, sigmas, *args
    running = _RUNNING.get()
    # In a switched run a model may never come to its turn.
    waits = any(of == OUTER_KEY for of, _ in running)
    run = Run(placed, Start(guider, sampler, sigmas, tuple(noise.shape), given, kwargs), waits)
    guider.model_options["transformer_options"][key] = run  # the run's own copy; the guider restores the original
    token = _RUNNING.set((*running, (key, guider.model_patcher)))
    try:
        return run.sample(partial(executor, *given, **kwargs))
    finally:
        _RUNNING.reset(token)
        run.close()


def _run_of(key: str, options: dict) -> Run | None:
    return options.get("transformer_options", {}).get(key)


def _predict_noise(key, executor, x, timestep, model_options={}, seed=None):
    run = _run_of(key, model_options)
    if run is None:
        return executor(x, timestep, model_options, seed)
    return run.predict(executor, executor.class_obj.model_patcher, x, timestep, model_options, seed)


def _calc_cond_batch(executor, model, conds, x, timestep, model_options):
    run = _run_of(KEY, model_options)
    if run is None:
        return executor(model, conds, x, timestep, model_options)
    return run.calc_cond_batch(executor, model, conds, x, timestep, model_options)


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    run = transformer_options.get(KEY)
    unet = run and run.unet(executor.class_obj)
    if run is not None and unet is None:
        run.passed(executor.class_obj)
    if unet is not None:
        transformer_options = unet.options(transformer_options, x)

    def forward(name: str):
        options = transformer_options
        named: dict[str, Any] = {}
        if name:
            patches = options.get("patches", {})
            entries = [unet.entry, *patches.get(DOOR, [])]
            options = {**options, OTHERS: patches, "patches": {**patches, DOOR: entries}}
            # The host's TorchCompileModel keeps no guard on transformer_options, so a compiled graph would go
            # on playing what it played in its first trace. It does guard the names of keyword arguments, which the
            # UNet ignores: one name for each way of playing makes one graph for each.
            named[f"{KEY}_{name}"] = None
            holding = unet.holding
            if holding:
                options[HOLDING], named[HELD] = holding, tuple(technique.held for technique in holding)
        # The UNet pops residuals off these lists, and after a Misfit it goes through them once more.
        residuals = control and {k: list(v) for k, v in control.items()}
        with (
            torch.compiler.set_stance("force_eager")
            if unet and unet.defies_graphs(options.get("patches", {}))
            else nullcontext()
        ):
            return with_room(executor, x, t, c_concat, c_crossattn, residuals, options, **kwargs, **named)

    if unet is None:
        return forward("")
    try:
        return forward(
            unet.begin_forward(x, control, transformer_options, executor.class_obj.current_patcher.current_hooks)
        )
    except Misfit:
        return forward(unet.begin_again())


def _diffusion_model(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):
    # This is inside of what gets compiled. Taken from its arguments, remembered tensors are inputs of a graph, and the
    # compiler guards their form as that of x; what it finds by way of transformer_options it takes to be for ever as it
    # first was.
    if HELD in kwargs:
        for technique, held in zip(transformer_options[HOLDING], kwargs.pop(HELD), strict=True):
            technique.held = held
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def _prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    for clone in (model, *model.get_additional_models_with_key("multigpu")):
        for technique in techniques_of(model):
            technique.prepare(model, clone)
    extra = sum(technique.device_bytes(model, noise_shape, conds) for technique in techniques_of(model))
    if extra:
        # The host plans memory by the shape of the latents alone and knows nothing of what is remembered:
        # a batch that is larger by as much makes it leave room for it.
        planned = model.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        noise_shape = [noise_shape[0] * (1 + extra / planned), *noise_shape[1:]]
    return executor(model, noise_shape, conds, *args, **kwargs)


def _load_outer(executor, model, noise_shape, conds, model_options=None, **kwargs):
    run = _run_of(OUTER_KEY, model_options or {})
    if run is None:
        return executor(model, noise_shape, conds, model_options=model_options, **kwargs)
    return run.load(executor, model, noise_shape, conds, model_options=model_options, **kwargs)


def _sampler_sample(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
):
    run = _run_of(OUTER_KEY, extra_args["model_options"])
    if run is not None:
        run.begin_sampling(
            extra_args, sigmas, noise=noise, latent_image=latent_image, denoise_mask=denoise_mask, device=noise.device
        )
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)


def check_in_place(model) -> None:
    """Before each run of a MODEL (the host's ON_PRE_RUN): say so where ours does not lie round it."""
    for key, wrappers, outermost in ((KEY, INNER, False), (OUTER_KEY, OUTER, True)):
        placed = [p for p in placed_on(model) if p.technique.outermost == outermost]
        lost = [kind for kind, _ in wrappers if key not in model.wrappers.get(kind, {})]
        if lost:
            why = (
                f"a node behind it writes the wrappers of the MODEL anew ({', '.join(lost)} are gone). Put that node "
                "before this one."
            )
        elif model.is_multigpu_base_clone or any(
            k == key and m.model is model.model and placed_on(m) == placed_on(model) for k, m in _RUNNING.get()
        ):
            continue
        else:
            why = (
                "its MODEL is a further one of a guider that samples all its models in the run of the first (as Dual "
                "Model CFG Guider does with model_negative). Connect this MODEL as the first one, or leave this node "
                "out."
            )
        for node_id, names in named_by_node(p for p in placed if not p.technique.speaks_only):
            verb = "are" if len(names) > 1 else "is"
            notes.speaker(node_id)(f"{' and '.join(names)} {verb} out of this run: {why}")


INNER = (
    (WrappersMP.OUTER_SAMPLE, partial(_outer_sample, KEY)),
    (WrappersMP.PREDICT_NOISE, partial(_predict_noise, KEY)),
    (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
    (WrappersMP.APPLY_MODEL, _apply_model),
    (WrappersMP.DIFFUSION_MODEL, _diffusion_model),
    (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
)
OUTER = (
    (WrappersMP.OUTER_SAMPLE, partial(_outer_sample, OUTER_KEY)),
    (WrappersMP.PREPARE_SAMPLING, _load_outer),
    (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
    (WrappersMP.PREDICT_NOISE, partial(_predict_noise, OUTER_KEY)),
)
