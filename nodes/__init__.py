"""The nodes, a file each; which ComfyUI loads. What they share stands in common.py and engine/."""

from __future__ import annotations

import importlib
import pkgutil

from comfy_api.latest import ComfyExtension, io

from . import migrate
from .engine import files, notes


def all_nodes() -> list[type[io.ComfyNode]]:
    """The nodes that the files of this folder define, in the order of the files' names."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.ispkg)
    modules = [importlib.import_module(f".{name}", __name__) for name in names]
    return [
        thing
        for module in modules
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, io.ComfyNode) and thing.__module__ == module.__name__
    ]


def name_errors() -> None:
    """Give the pack's errors a short public name, "asdm.BadFile": ComfyUI shows an error's type with its module, and
    names the modules of a custom node after its folder on the disk.
    """
    pack = __name__.rpartition(".")[0]
    for error in ValueError.__subclasses__():
        if error.__module__.startswith(f"{pack}."):
            error.__module__ = "asdm"


class ASDMExtension(ComfyExtension):
    async def on_load(self):
        notes.register()
        files.register_folders()
        await migrate.register()

    async def get_node_list(self):
        nodes = all_nodes()
        name_errors()
        return nodes
