"""The losses of distillation: small pure functions with one value per sample, (B,), float32.

Whoever calls them averages and weighs; `train/taps.py` says which features are compared.

    task         || eps_S - eps ||^2, or of v                     BK-SDM (arXiv 2305.15798), equation 1
    output       || eps_S - eps_T ||^2                            equation 2
    features     sum over taps of  w || f_S - f_T ||^2            equation 3: blocks, with w = 1; also layers (SSD-1B,
                                                                  arXiv 2401.02677), self-attention (KOALA, arXiv
                                                                  2312.04005), and the mid block of A-SDM
    rollout      (sin / mean sin) || v - v* ||^2                  train/rollout.py
    perceptual   levels of one frozen network on both pictures    A-SDM (arXiv 2312.15516), section 2.5

Every || ||^2 is the mean over the elements of a sample, as in the published code, and in float32: features
of the up blocks reach 1e3, whose square float16 does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import taps

# Every loss by the name of its weight in a recipe's section [loss] (train/sections.py), and whether it looks at what
# the teacher makes of a batch. train/criterion.py has what each of them compares.
LOSSES: dict[str, bool] = {
    "task": False,
    "output": True,
    **dict.fromkeys(taps.KINDS, True),
    "perceptual": True,
    "rollout": False,  # the teacher has drawn the trajectories before
}

# Latents (4 channels) to linear RGB in about [-1, 1], (4, 3): the fixed matrices ComfyUI previews with
# (comfy/latent_formats.py).
LATENT_RGB = {
    "sd15": (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
    ),
    "sdxl": (
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
    ),
}
LATENT_RGB_BIAS = {"sdxl": (0.1084, -0.0175, -0.0011)}


class _SquaredError(torch.autograd.Function):
    """Keeps a and b as they are, which others keep as well; plain autograd would keep their difference in float32."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a.float() - b.float()).square().flatten(1).mean(1)

    @staticmethod
    def backward(ctx, given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        difference = a.float() - b.float()
        each = given / difference[0].numel()
        gradient = each.view(-1, *[1] * (a.dim() - 1)) * (2 * difference)
        to_a, to_b = ctx.needs_input_grad
        return gradient.to(a.dtype) if to_a else None, -gradient.to(b.dtype) if to_b else None


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample, (B,), float32, for a and b of one shape (B, ...)."""
    return _SquaredError.apply(a, b)


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    """|| a - b ||^2 / || b ||^2 of each sample, (B,)."""
    return squared_error(a, b) / squared_error(b, torch.zeros_like(b)).clamp_min(1e-6)


def target(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor, prediction: str) -> Tensor:
    """What the network should predict for x_t = a x0 + s noise: the noise, or v = a noise - s x0."""
    return noise if prediction == "eps" else a * noise - s * x0


def task(predicted: Tensor, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor, prediction: str) -> Tensor:
    """The denoising loss, (B,). a, s: coefficients of x_t, (B, 1, 1, 1)."""
    return squared_error(predicted, target(x0, noise, a, s, prediction))


def output(student: Tensor, teacher: Tensor) -> Tensor:
    """Output distillation, (B,)."""
    return squared_error(student, teacher)


def features(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weights: Mapping[str, float], relative: bool = False
) -> Tensor:
    """Feature distillation, (B,): the weighted sum over the taps in `weights`, each (B, ...).

    relative: each in proportion to || f_T ||^2, for networks whose features are of very different size.
    """
    error = relative_error if relative else squared_error
    return torch.stack([w * error(student[tap], teacher[tap]) for tap, w in weights.items()]).sum(0)


def rollout(v: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Where a step lands against where it should, (B,); train/rollout.py. weight: (B,)."""
    return weight * squared_error(v, wanted)


# Semantic-aware supervision -------------------------------------------------------------------------


def denoised(x: Tensor, predicted: Tensor, a: Tensor, s: Tensor, prediction: str) -> Tensor:
    """The x_0 a prediction stands for: (x - s eps) / a, or a x - s v. (B, C, H, W), float32."""
    x, predicted = x.float(), predicted.float()
    return (x - s * predicted) / a if prediction == "eps" else a * x - s * predicted


def latent_rgb(latents: Tensor, family: str) -> Tensor:
    """Latents (B, 4, H, W) to pictures (B, 3, H, W), about [0, 1], not clamped: outside, the gradient would be lost."""
    rgb = torch.einsum("bchw,cr->brhw", latents.float(), latents.new_tensor(LATENT_RGB[family], dtype=torch.float32))
    bias = latents.new_tensor(LATENT_RGB_BIAS.get(family, (0.0, 0.0, 0.0)), dtype=torch.float32)
    return (rgb + bias[:, None, None] + 1) / 2


def perceptual(student: Tensor, teacher: Tensor, net: Callable[[Tensor], Sequence[Tensor]], counts: Tensor) -> Tensor:
    """Mean over the levels of a frozen network of || f_S - f_T ||^2 / || f_T ||^2, (B,).

    student, teacher: pictures (B, 3, H, W). net: picture -> levels, each (B, ...); deep levels are far
    smaller in value, hence the quotient. counts: (B,) bool; other samples get 0, for the x_0 of a very
    noisy sample shows nothing yet.
    """
    with torch.no_grad():
        wanted = net(teacher)
    levels = [relative_error(f, g) for f, g in zip(net(student), wanted, strict=True)]
    return torch.where(counts, torch.stack(levels).mean(0), 0.0)


class PerceptualNetwork(nn.Module):
    """A frozen network, pictures (B, 3, H, W) -> levels, with a way of its own from latents to pictures."""

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures, not clamped: outside, the gradient would be lost."""
        raise NotImplementedError


def resized(pictures: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, H, W) at size x size, bilinear."""
    return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
