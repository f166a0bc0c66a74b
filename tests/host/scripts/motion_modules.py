"""Modules inserted between the layers of a UNet while the MODEL is loaded, as AnimateDiff packs do."""

import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import PatcherInjection


class VanillaTemporalModule(torch.nn.Module):
    """Like a motion module: the frames of a batch see each other. It has a weight of its own, as they have."""

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor([0.5]), requires_grad=False)

    def forward(self, x, transformer_options):
        frames = x.unflatten(0, (len(transformer_options["cond_or_uncond"]), -1))
        return (frames + self.strength * frames.tanh().mean(1, keepdim=True)).flatten(0, 1)


def _blocks(unet):
    return [*(unet.input_blocks[i] for i in (1, 2, 4, 5, 7, 8, 10, 11)), *unet.output_blocks]


def inject(patcher):
    # Placed by the class of their neighbours: after the transformer of a block, or else after its resnet. What
    # follows, as the upsampler, is then one further.
    for block in _blocks(patcher.model.diffusion_model):
        after = [i for i, layer in enumerate(block) if isinstance(layer, attention.SpatialTransformer)]
        after = after or [i for i, layer in enumerate(block) if type(layer).__name__ == "ResBlock"][:1]
        block.insert(after[-1] + 1, VanillaTemporalModule())


def eject(patcher):
    for block in _blocks(patcher.model.diffusion_model):
        for i in reversed([i for i, layer in enumerate(block) if isinstance(layer, VanillaTemporalModule)]):
            block.pop(i)


def with_motion(model):
    """The modules are called by an entry of their own."""

    def handler(layer, x, emb, context, transformer_options, *shapes_and_videos):
        return layer(x, transformer_options)

    clone = model.clone()
    clone.set_model_forward_timestep_embed_patch((VanillaTemporalModule, handler))
    clone.set_injections("motion", [PatcherInjection(inject, eject)])
    return clone
