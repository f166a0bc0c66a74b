"""Workflows that still use the DeepCache packs, which no longer run: their nodes become Feature Inheritance.

The browser offers the exchange when such a workflow is opened, the host makes it in an API graph that is queued; both
only where the old node is not installed. The mechanism copies or sets values and cannot calculate: the old start and
end, counted in timesteps by one pack and in steps by the others, are left out (their defaults are the whole run). The
browser does not reach settings that appear with a choice (those behind "custom"): there the interval and the branch
come out as our defaults.
"""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

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


def replacement(old: str) -> io.NodeReplace:
    """The exchange of one old node for Feature Inheritance with custom settings."""
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
    return io.NodeReplace(
        new_node_id=ASDMFeatureInheritance.define_schema().node_id,
        old_node_id=old,
        old_widget_ids=widgets,
        input_mapping=[
            {"new_id": new, **({"old_id": value.strip("{}")} if str(value).startswith("{") else {"set_value": value})}
            for new, value in inputs.items()
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    )


async def register() -> None:
    """Tell the host about the old nodes."""
    for old in DEEPCACHE:
        await ComfyAPI().node_replacement.register(replacement(old))
