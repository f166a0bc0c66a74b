"""LoRAs of a MODEL on its packs: whatever patches a unit of the checkpoint patches the pack's in its place as well.

Of a unit that is the checkpoint's own and a difference, merges are patches too: they act on the checkpoint's weights,
as do all others, and the difference comes on top. Where it takes over what changes in other units (asdm_core/carry.py),
it takes over what patches change there as well.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial

import comfy.hooks
import comfy.lora
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...asdm_core.carry import sources, taken_over
from .unpatched import Unpatched

_PREFIX = "diffusion_model."


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
    model = patcher.model
    played = patcher.get_key_patches()
    changes = {
        source: _changed_by(patcher, source, its)
        for source in sources(model.links)
        if (its := patches.get(f"{_PREFIX}{source}"))
    }
    rounded = {}
    for key in played:
        if key in model.own and any(map(_is_foreign, patches.get(key, ()))):
            rounded[key] = [_patch("diff", _changed_by(patcher, key.removeprefix(_PREFIX), patches[key]))]
        elif key in model.own and key in patches:
            difference = played[key][0][0].float() - model.own[key].to(played[key][0][0].device).float()
            rounded[key] = [_patch("set", model.own[key]), *patches[key], _patch("diff", difference)]
        taken = taken_over(model.links.get(key.removeprefix(_PREFIX), ()), changes, model.matrices)
        if taken is not None:
            rounded.setdefault(key, []).append(_patch("diff", taken))
    return rounded


def _is_foreign(patch) -> bool:
    """Whether a patch is of a kind that the host does not know: another node reads it in the host's place, before all
    others (Fooocus inpaint), so it cannot stand between two of ours.
    """
    value = patch[1]
    return isinstance(value, tuple) and len(value) == 2 and value[0] not in ("diff", "set", "model_as_lora")


def _changed_by(patcher, source: str, patches: list) -> Tensor:
    """What patches change in a weight of the checkpoint from which a pack takes something over."""
    key = f"{_PREFIX}{source}"
    before = patcher.model.own[key].float()
    return (comfy.lora.calculate_weight(patches, before.clone(), key) - before).cpu()


def _taken_over_of_hooks(patcher, patches: Mapping[str, list]) -> dict[str, list]:
    """What a pack takes over of a hook's patches, each at the strength that it has there."""
    model = patcher.model
    found: dict[str, list] = {}
    for source in sources(model.links):
        for strength, value, strength_model, *more in patches.get(f"{_PREFIX}{source}", ()):
            if strength_model != 1.0:  # a merge is no multiple of its strength
                continue
            changes = {source: _changed_by(patcher, source, [(1.0, value, strength_model, *more)])}
            for key, links in model.links.items():
                if (taken := taken_over(links, changes, model.matrices)) is not None:
                    found.setdefault(f"{_PREFIX}{key}", []).append((strength, *_patch("diff", taken)[1:]))
    return found


def _as_differences(weights: Callable[[], Unpatched], key: str, patches: list) -> list:
    """Patches of a hook for a unit of a pack. A checkpoint as LoRA is the difference of its weights from those that are
    patched, which the host would take from the pack's: it is meant to be that from the MODEL's.
    """
    return [
        (strength, ("diff", (_changed(weights(), key, value[1][0]),)), *more)
        if isinstance(value, tuple) and value[0] == "model_as_lora"
        else (strength, value, *more)
        for strength, value, *more in patches
    ]


def _changed(weights: Unpatched, key: str, to: Tensor) -> Tensor:
    return to.float().cpu() - weights[key.removeprefix(_PREFIX)].float().cpu()


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
        weights = cache(partial(Unpatched, model))
        for patcher in packs_of(model):
            known = patcher.model.state_dict()
            concerned = {*known, *(f"{_PREFIX}{source}" for source in sources(patcher.model.links))}
            patcher.hook_patches = {}
            for ref, patches in model.hook_patches.items():
                found = {k: _as_differences(weights, k, v) for k, v in patches.items() if k in concerned}
                mine = {k: v for k, v in found.items() if k in known}
                for key, more in _taken_over_of_hooks(patcher, found).items():
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
