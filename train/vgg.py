"""The frozen network of the perceptual loss: VGG16 (arXiv 1409.1556), trained on ImageNet by torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .losses import resized

SOURCE = "timm/vgg16.tv_in1k"  # on the Hugging Face hub: torchvision's weights, its names, as safetensors
LEVELS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
_HOW = f"Give model.safetensors of {SOURCE} (Hugging Face hub) as loss.vgg, or set loss.perceptual to 0"


class VGG16(nn.Module):
    """Pictures (B, 3, H, W) in about [0, 1] -> four levels, (B, 64, 224, 224) to (B, 512, 28, 28)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.features = make_layers(cfgs["D"])[: LEVELS[-1] + 1]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        h = (resized(pictures, SIZE) - self.mean) / self.std
        levels = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in LEVELS:
                levels.append(h)
        return levels


def load_vgg(path: str) -> VGG16:
    """VGG16 with weights from a .safetensors file. Raises ValueError where there are none."""
    if not path:
        raise ValueError(f"loss.perceptual needs the weights of VGG16, and loss.vgg names no file. {_HOW}")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"loss.perceptual needs the weights of VGG16, and {file} does not exist. {_HOW}")
    if file.suffix != ".safetensors":
        raise ValueError(f"loss.vgg: {file.name} is no .safetensors file, and no other kind is read. {_HOW}")
    sd = load_file(file)
    net = VGG16()
    wanted = net.state_dict()
    for key, value in wanted.items():
        if key not in sd or sd[key].shape != value.shape:
            raise ValueError(
                f"{file.name}: {key} is missing or of another shape; wanted the weights of torchvision's VGG16"
            )
    net.load_state_dict({k: sd[k] for k in wanted})
    return net.requires_grad_(False).eval()
