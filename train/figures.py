"""Pictures and curves as PNG."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def save_grid(path: Path, images: Tensor, columns: int, scale: float = 1.0, gap: int = 2) -> None:
    """Write pictures (B, 3, H, W) in [0, 1] as one PNG."""
    images = images.detach().float().clamp(0, 1).cpu()
    if scale != 1:
        images = torch.nn.functional.interpolate(images, scale_factor=scale, mode="area")
    b, _, h, w = images.shape
    rows = -(-b // columns)
    canvas = torch.full((3, rows * (h + gap), columns * (w + gap)), 0.5)
    for i, image in enumerate(images):
        y = (i // columns) * (h + gap)
        x = (i % columns) * (w + gap)
        canvas[:, y : y + h, x : x + w] = image
    temporary = path.with_suffix(".part.png")
    Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy()).save(temporary)
    os.replace(temporary, path)


def save_curve(path: Path, curve: Iterable, title: str, ylabel: str = "loss") -> None:
    """Write a loss curve over the minutes of training as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = np.array(list(curve), dtype=float)
    if len(points) < 2:
        return
    width = max(1, len(points) // 40)
    smooth = np.convolve(points[:, 3], np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(points[:, 2] / 60, points[:, 3], alpha=0.25)
    axes.plot(points[width - 1 :, 2] / 60, smooth)
    axes.set(xlabel="minutes", ylabel=ylabel, title=title, yscale="log")
    axes.grid(True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
