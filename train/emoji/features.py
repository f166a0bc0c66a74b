"""The family's stand-in for VGG in semantic-aware supervision: its codec makes the picture, its classifier looks at it.

Not VGG, and not to be reported as such: a small network that knows nothing but emoji.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from asdm_core.tensor_file import read_header

from ..losses import PerceptualNetwork
from .classifier import SIZE, load_classifier
from .codec import load_codec


class ClassifierFeatures(PerceptualNetwork):
    """Pictures (B, 3, 128, 128) -> the five levels of the classifier, (B, C, h, w). models: folder of the family's
    weights.
    """

    def __init__(self, models: Path) -> None:
        super().__init__()
        codes = json.loads(read_header(models / "emoji-classifier.safetensors").metadata["codes"])
        self.decoder = load_codec(models).decoder
        self.body = load_classifier(models, codes).body
        self.requires_grad_(False).eval()

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, 16, 16) to pictures, about [0, 1], not clamped: outside, the gradient would be lost."""
        return self.decoder(latents)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        h = 2 * F.avg_pool2d(pictures, pictures.shape[-1] // SIZE) - 1
        levels = []
        for stage in self.body:
            h = stage(h)
            levels.append(h)
        return levels[1:]  # the first only folds the picture
