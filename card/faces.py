"""The pack's nodes by their ids, as the host registers them, and the folder of what is written for them."""

from __future__ import annotations

import asyncio
import functools
import sys
from pathlib import Path

import folder_paths


@functools.cache
def node_classes() -> dict:
    """{node id: class}"""

    pack = sys.modules[__name__.rsplit(".", 2)[0]]  # whatever name the host gave it

    async def load():
        extension = await pack.comfy_entrypoint()
        return {node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}

    pack_folder()
    return asyncio.run(load())


def execute(node_id: str, **inputs) -> tuple:
    """Run one node of the pack; returns its outputs."""
    return node_classes()[node_id].execute(**inputs).args


@functools.cache
def pack_folder() -> Path:
    """models/asdm_packs, made and known to the host."""
    folder = Path(folder_paths.models_dir) / "asdm_packs"
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("asdm_packs", str(folder))
    folder_paths.folder_names_and_paths["asdm_packs"][1].add(".safetensors")
    return folder
