"""The nodes: the only folder that imports the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from . import (
    apply_pack,
    calibrate,
    compare,
    files,
    gri,
    inherit,
    inspect_model,
    load,
    migrate,
    save_unet,
    speed,
    speed_up,
    switch,
    xy_plot,
)

NODES = [
    *load.NODES,
    *apply_pack.NODES,
    *save_unet.NODES,
    *inspect_model.NODES,
    *inherit.NODES,
    *gri.NODES,
    *calibrate.NODES,
    *switch.NODES,
    *compare.NODES,
    *xy_plot.NODES,
    *speed.NODES,
    *speed_up.NODES,
]


class ASDMExtension(ComfyExtension):
    async def on_load(self):
        files.register_folders()
        await migrate.register()

    async def get_node_list(self):
        return NODES
