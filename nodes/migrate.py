"""Workflows that use nodes which are gone: those of the DeepCache packs, which no longer run, become Feature
Inheritance, and our own Calibrate Inheritance becomes Calibrate.

The browser offers the exchange when such a workflow is opened, the host makes it in an API graph that is queued; both
only where the old node is not installed. The mechanism copies or sets values and cannot calculate: the old start and
end of DeepCache, counted in timesteps by one pack and in steps by the others, are left out (their defaults are the
whole run). The browser does not reach settings that appear with a choice (those behind "custom"): there the interval
and the branch come out as our defaults.

Of Calibrate Inheritance the run carries over. Its goal does not, because Calibrate finds plans for all savings at once:
the MODEL that comes out is at the default of its dial. Outputs lie in the same order, but where a plan was there is a
profile now, and Feature Inheritance, where that led to, says what to do with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import ComfyAPI, io

from .calibrate import ASDMCalibrate
from .feature_inheritance import ASDMFeatureInheritance, custom_inputs

# Old node: its widgets in the order in which workflows keep their values, and the settings of ours that differ from the
# defaults (a name in braces is the old widget whose value is taken).
DEEPCACHE: dict[str, tuple[list[str], dict[str, object]]] = {
    # styler00dollar/ComfyUI-deepcache, after laksjdjf's gist: cache_depth is the branch, by the same rule as ours.
    "DeepCache": (
        ["cache_interval", "cache_depth", "start_step", "end_step"],
        {"interval": "{cache_interval}", "branch": "{cache_depth}"},
    ),
    "DeepCacheV2": (
        ["cache_interval", "cache_depth", "start_step", "end_step"],
        {"interval": "{cache_interval}", "branch": "{cache_depth}"},
    ),
    # SoftMeng/ComfyUI-DeepCache-Fix: its advice is to leave the last 3 steps alone (end_steps is 12 of 16 by default).
    "DeepCache_Fix": (
        ["cache_interval", "cache_depth", "start_steps", "end_steps", "input_cache", "middle_cahce", "output_cache"],
        {"interval": "{cache_interval}", "branch": "{cache_depth}", "last_steps": 3},
    ),
    # siliconflow/onediff: branch = 3 * cache_block_id + cache_layer_id, 3 by default.
    "ModuleDeepCacheSpeedup": (
        ["static_mode", "cache_interval", "cache_layer_id", "cache_block_id", "start_step", "end_step"],
        {"interval": "{cache_interval}", "branch": 3},
    ),
}


CALIBRATE_INHERITANCE = "ASDMCalibrateInheritance"
CONTROL = "control_after_generate"  # of the seed; a widget of the browser alone
# As in DEEPCACHE. In place of goal.saving, goal.error where that was the goal.
CALIBRATE_WIDGETS = ["seed", CONTROL, "steps", "cfg", "sampler_name", "scheduler", "goal", "goal.saving", "longest"]


def exchange(
    old: str, new: type[io.ComfyNode], widgets: list[str], inputs: Mapping[str, Any], outputs: int
) -> io.NodeReplace:
    """The exchange of one node for another, with the first so many outputs in the same order.

    widgets: of the old node, in the order in which workflows keep their values. inputs: of the new one; a name in
    braces is the old input that is taken.
    """
    copied = {name: value.strip("{}") for name, value in inputs.items() if str(value).startswith("{")}
    return io.NodeReplace(
        new_node_id=new.define_schema().node_id,
        old_node_id=old,
        old_widget_ids=widgets,
        input_mapping=[
            {"new_id": name, **({"old_id": copied[name]} if name in copied else {"set_value": value})}
            for name, value in inputs.items()
        ],
        output_mapping=[{"new_idx": i, "old_idx": i} for i in range(outputs)],
    )


def deepcache(old: str) -> io.NodeReplace:
    """The exchange of one node of a DeepCache pack for Feature Inheritance with custom settings."""
    widgets, known = DEEPCACHE[old]
    # A step that inherits in DeepCache uses the features as they were.
    settings = (
        {i.id: i.default for i in custom_inputs()} | {"what": "deepcache", "reuse": "output", "when": "uniform"} | known
    )
    inputs = {
        "model": "{model}",
        "preset": "custom",
        **{f"preset.{name}": value for name, value in settings.items()},
        "memory_limit_mb": 0,
        "keep_on_cpu": False,
    }
    return exchange(old, ASDMFeatureInheritance, widgets, inputs, 1)


def calibrate_inheritance() -> io.NodeReplace:
    """The exchange of Calibrate Inheritance for Calibrate of the same run."""
    schema = ASDMCalibrate.define_schema()
    kept = {"model", "positive", "negative", "latent_image", *CALIBRATE_WIDGETS}
    inputs = {i.id: f"{{{i.id}}}" if i.id in kept else i.default for i in schema.inputs}
    # The old seed stayed as it was, so that nothing was measured again in the next run. This cannot be copied, because
    # API graphs do not have it, and the host would look for it there.
    inputs[CONTROL] = "fixed"
    return exchange(CALIBRATE_INHERITANCE, ASDMCalibrate, CALIBRATE_WIDGETS, inputs, len(schema.outputs))


async def register() -> None:
    """Tell the host about the old nodes."""
    for replacement in (*map(deepcache, DEEPCACHE), calibrate_inheritance()):
        await ComfyAPI().node_replacement.register(replacement)
