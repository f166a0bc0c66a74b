"""LoRAs of a MODEL on its packs: whatever patches a unit of the checkpoint patches the pack's in its place as well."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable

import comfy.hooks
from comfy.patcher_extension import CallbacksMP


def _acts(patch) -> bool:
    """Whether a patch is for whatever weights a layer has: LoRAs, factors, differences between models."""
    # Merges are patches too, and blending a foreign model into trained units would be wrong.
    strength, value, strength_model = patch[:3]
    if isinstance(
        value, list
    ):  # a model's weights, with the patches on them; subtracted from one another by Merge Subtract
        return strength_model == 1.0 and any(inner[0] < 0 for inner in value[1:])
    return strength_model == 1.0 or strength == 0.0


def sync(model, pack_patchers: Iterable) -> None:
    """Give packs the patches of their MODEL that are for any weights, as far as they concern units the packs have.

    Runs before loading, so LoRAs that were added after the pack count as well. The same stack gives the
    same uuid, so nothing is patched again on a rerun.
    """
    for patcher in pack_patchers:
        known = patcher.model.state_dict()
        patcher.patches = {k: [p for p in v if _acts(p)] for k, v in model.patches.items() if k in known}
        patcher.weight_wrapper_patches = {k: v for k, v in model.weight_wrapper_patches.items() if k in known}
        patcher.patches_uuid = uuid.uuid5(model.patches_uuid, "asdm")


def merged(model, pack_patchers: Iterable) -> bool:
    """Whether a MODEL is merged with another one in layers that packs play, which keep their own weights."""
    return any(
        not _acts(patch)
        for patcher in pack_patchers
        for key in model.patches.keys() & patcher.model.state_dict().keys()
        for patch in model.patches[key]
    )


def callbacks(packs_of: Callable) -> tuple[tuple[str, Callable], ...]:
    """The host's callbacks by which hook LoRAs reach the packs of a MODEL; packs_of: its pack patchers."""

    def register_hook_patches(model, hooks, target_dict, model_options, registered):
        for patcher in packs_of(model):
            known = patcher.model.state_dict()
            patcher.hook_patches = {
                ref: {k: v for k, v in patches.items() if k in known} for ref, patches in model.hook_patches.items()
            }
            # The other mode caches weights per hook group and would serve those of an earlier keyframe.
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram

    def apply_hooks(model, hooks):
        for patcher in packs_of(model):
            patcher.patch_hooks(hooks)

    def cleanup(model):
        for patcher in packs_of(model):
            patcher.clean_hooks()

    return (
        (CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, register_hook_patches),
        (CallbacksMP.ON_APPLY_HOOKS, apply_hooks),
        (CallbacksMP.ON_CLEANUP, cleanup),
    )
