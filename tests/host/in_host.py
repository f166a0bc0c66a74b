"""For scripts that run inside a host process: the pack, imported the way the host does it."""

import asyncio
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path

PACK = Path(os.environ.get("ASDM_PACK") or Path(__file__).resolve().parents[2])
NAME = "asdm_under_test"


@functools.cache
def pack():
    """The pack's package. Its name is no import path, as in the host."""
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


def module(name):
    """A module of the pack: module("asdm_core.packs"), module("nodes.engine.host")."""
    pack()
    return importlib.import_module(f"{NAME}.{name}")


@functools.cache
def node_classes():
    """{node id: class} of all nodes of the pack, registered as the host registers them."""

    async def load():
        extension = await pack().comfy_entrypoint()
        module("nodes.engine.files").register_folders()  # of on_load; the rest is for the server, which is not here
        return {node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}

    return asyncio.run(load())


def execute(node_id, **inputs):
    """Run one node of the pack; returns the tuple of its outputs."""
    return node_classes()[node_id].execute(**inputs).args
