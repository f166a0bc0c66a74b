"""Runs in a child process with ComfyUI's own classes: the family's files on fixed inputs.

python host_family.py HOST MODELS INPUTS OUTPUTS
"""

import json
import sys
from pathlib import Path

host, models, inputs, outputs = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

given = load_file(inputs)
unet_config = json.loads(Path(inputs).with_suffix(".json").read_text())
result = {}
with torch.no_grad():
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(Path(models) / "emoji-vae.safetensors"), safe_load=True))
    # The host's latents are larger by its latent format's factor; images are (B, H, W, C).
    result["latents"] = vae.encode(given["images"].movedim(1, -1)) * 0.18215
    result["decoded"] = vae.decode(given["latents"] / 0.18215).movedim(-1, 1)

    unet = UNetModel(**unet_config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in given.items() if k.startswith("unet.")})
    result["v"] = unet.eval()(given["latents"], given["t"], context=given["context"])

    tokenizer = comfy.sd1_clip.SD1Tokenizer()
    tokens = tokenizer.tokenize_with_weights("a cat face on blue, noto style")["l"]
    result["tokens"] = torch.tensor([[t for t, _ in tokens[0]]])
save_file({k: v.contiguous() for k, v in result.items()}, outputs)
