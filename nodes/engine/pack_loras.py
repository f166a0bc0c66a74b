"""LoRAs of a MODEL on its packs: whatever patches a unit of the checkpoint patches the pack's in its place as well.

Of a unit that is the checkpoint's own and a difference, merges are patches too: they act on the checkpoint's weights,
as do all others, and the difference comes on top. Where it takes over what changes in other units (asdm_core/carry.py),
it takes over what patches change there as well.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping

import comfy.hooks
import comfy.lora
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from .unpatched import Unpatched


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
        wanted = uuid.uuid5(model.patches_uuid, "asdm")
        known = patcher.model.state_dict()
        if not patcher.model.own:
            patcher.patches = {k: [p for p in v if _acts(p)] for k, v in model.patches.items() if k in known}
        elif patcher.patches_uuid != wanted:
            patcher.patches = _round_differences(patcher, model.patches)
        patcher.weight_wrapper_patches = {k: v for k, v in model.weight_wrapper_patches.items() if k in known}
        patcher.patches_uuid = wanted


def _round_differences(patcher, patches: Mapping[str, list]) -> dict[str, list]:
    """All patches of a MODEL for a pack of differences: each weight starts as the checkpoint's own, and its difference
    follows the patches.
    """
    own, carried = patcher.model.own, patcher.model.carried
    played = patcher.get_key_patches()
    changes = _changes(patcher, patches)
    rounded = {}
    for key in played:
        taken = carried.taken_over(key, changes)
        if key in own and key in patches:
            difference = played[key][0][0].float() - own[key].to(played[key][0][0].device).float()
            rounded[key] = [_patch("set", own[key]), *patches[key], _patch("diff", difference)]
        if taken is not None:
            rounded.setdefault(key, []).append(_patch("diff", taken))
    return rounded


def _changes(patcher, patches: Mapping[str, list]) -> dict[str, Tensor]:
    """What patches change in the weights of the checkpoint from which a pack takes something over, by parameter."""
    changes = {}
    for key in patcher.model.carried.sources.intersection(patches):
        before = patcher.model.own[key].float()
        changes[key] = comfy.lora.calculate_weight(patches[key], before.clone(), key) - before
    return changes


def _carried_by_hooks(patcher, patches: Mapping[str, list]) -> dict[str, list]:
    """What a pack takes over of the LoRAs of a hook, each at the strength that it has there."""
    found: dict[str, list] = {}
    turns = max(map(len, patches.values()), default=0)
    for turn in range(turns):
        at = {key: its[turn] for key, its in patches.items() if turn < len(its)}
        # A LoRA has one strength in all layers of a hook; what is no LoRA is no multiple of its strength.
        for strength in {patch[0] for patch in at.values() if patch[2] == 1.0}:
            whole = {k: [(1.0, *patch[1:])] for k, patch in at.items() if patch[0] == strength and patch[2] == 1.0}
            changes = _changes(patcher, whole)
            for key in patcher.model.carried.links if changes else ():
                if (taken := patcher.model.carried.taken_over(key, changes)) is not None:
                    found.setdefault(key, []).append((strength, *_patch("diff", taken)[1:]))
    return found


def _as_differences(weights: Unpatched, key: str, patches: list) -> list:
    """Patches of a hook for a unit of a pack. A checkpoint as LoRA is the difference of its weights from those that are
    patched, which the host would take from the pack's: it is meant to be that from the MODEL's.
    """
    return [
        (strength, ("diff", (_changed(weights, key, value[1][0]),)), *more)
        if isinstance(value, tuple) and value[0] == "model_as_lora"
        else (strength, value, *more)
        for strength, value, *more in patches
    ]


def _changed(weights: Unpatched, key: str, to: Tensor) -> Tensor:
    return to.float().cpu() - weights[key.removeprefix("diffusion_model.")].float().cpu()


def _patch(kind: str, tensor: Tensor) -> tuple:
    """In the host's form: strength, value, strength of the weight itself, part of the weight, function."""
    return 1.0, (kind, (tensor,)), 1.0, None, None


def merged(model, pack_patchers: Iterable) -> bool:
    """Whether a MODEL is merged with another one in layers that packs play, which keep their own weights. Of packs of
    differences the checkpoint's weights are merged.
    """
    return any(
        not _acts(patch)
        for patcher in pack_patchers
        if not patcher.model.own
        for key in model.patches.keys() & patcher.model.state_dict().keys()
        for patch in model.patches[key]
    )


def callbacks(packs_of: Callable) -> tuple[tuple[str, Callable], ...]:
    """The host's callbacks by which hook LoRAs reach the packs of a MODEL; packs_of: its pack patchers."""

    def register_hook_patches(model, hooks, target_dict, model_options, registered):
        weights = Unpatched(model)
        for patcher in packs_of(model):
            known = patcher.model.state_dict()
            concerned = {*known, *patcher.model.carried.sources}
            patcher.hook_patches = {}
            for ref, patches in model.hook_patches.items():
                found = {k: _as_differences(weights, k, v) for k, v in patches.items() if k in concerned}
                mine = {k: v for k, v in found.items() if k in known}
                for key, more in _carried_by_hooks(patcher, found).items():
                    mine[key] = [*mine.get(key, []), *more]
                patcher.hook_patches[ref] = mine
            # The other mode caches weights per hook group and would serve those of an earlier keyframe.
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram

    def apply_hooks(model, hooks):
        for patcher in packs_of(model):
            patcher.patch_hooks(hooks)

    def follow(model, timestep, options):
        # As a keyframe changes, the host takes the hooks off the MODEL and says so to nobody.
        for patcher in packs_of(model) if model.current_hooks is None else ():
            if patcher.current_hooks is not None:
                patcher.patch_hooks(None)

    def cleanup(model):
        for patcher in packs_of(model):
            patcher.clean_hooks()

    return (
        (CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, register_hook_patches),
        (CallbacksMP.ON_PREPARE_STATE, follow),
        (CallbacksMP.ON_APPLY_HOOKS, apply_hooks),
        (CallbacksMP.ON_CLEANUP, cleanup),
    )
