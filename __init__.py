"""asdm: faster Stable Diffusion in ComfyUI by changing the UNet."""

import importlib.util
import logging
import re
import sys

WEB_DIRECTORY = "./web"
OLDEST_HOST = "0.27.0"  # the oldest ComfyUI that was tried; requires-comfyui of pyproject.toml says the same


def _too_old() -> str:
    """One sentence where this ComfyUI is too old; nothing elsewhere, also outside of a ComfyUI."""
    version = str(getattr(sys.modules.get("comfyui_version"), "__version__", ""))
    if (
        "comfyui_version" not in sys.modules
        and "folder_paths" in sys.modules
        and not importlib.util.find_spec("comfyui_version")
    ):
        version = "0.3.10 or older"  # ComfyUI tells its version since 0.3.11
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest = tuple(map(int, OLDEST_HOST.split(".")[:2]))
    if numbers is None or tuple(map(int, numbers.groups())) >= oldest:
        return ""
    return (
        f"asdm needs ComfyUI {oldest[0]}.{oldest[1]} or newer, and this is {version}. Update ComfyUI, then start again."
    )


# A ComfyUI from before comfy_entrypoint would only say that it found no nodes.
if _too_old() and "comfy_api.latest" not in sys.modules:
    logging.warning(_too_old())


async def comfy_entrypoint():
    """Called by ComfyUI (V3 custom nodes) to list the nodes of this pack. Raises RuntimeError where it is too old."""
    if _too_old():
        raise RuntimeError(_too_old())
    from .nodes import ASDMExtension

    return ASDMExtension()
