"""asdm: faster Stable Diffusion in ComfyUI by changing the UNet."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI (V3 custom nodes) to list the nodes of this pack."""
    from .nodes import ASDMExtension

    return ASDMExtension()
