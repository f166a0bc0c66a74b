"""Noise schedule, v-prediction and sampling, in the notation of Salimans and Ho (arXiv 2202.00512).

x_t = a x_0 + s eps,  v = a eps - s x_0,  x_0 = a x_t - s v,  eps = s x_t + a v,  with a^2 + s^2 = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1000


def alphas_cumprod() -> Tensor:
    """SD1.5's scaled-linear schedule, a^2 by step, (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


ALPHAS = alphas_cumprod()


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """A schedule (1000,) shifted and scaled so that its last step holds nothing of the picture, and its first what it
    held (arXiv 2305.08891, algorithm 1).
    """
    root = alphas.double().sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square().float()


def coefficients(t: Tensor, alphas: Tensor = ALPHAS) -> tuple[Tensor, Tensor]:
    """a and s at steps t (B,), shaped (B, 1, 1, 1). alphas: a^2 by step, of another schedule than SD's own."""
    a2 = alphas.to(t.device)[t][:, None, None, None]
    return a2.sqrt(), (1 - a2).sqrt()


def as_v(predicted: Tensor, x: Tensor, a: Tensor, s: Tensor, prediction: str) -> Tensor:
    """The v a prediction at x_t stands for, float32."""
    return predicted.float() if prediction == "v" else (predicted.float() - s * x) / a


def step_weights(alphas: Tensor = ALPHAS) -> Tensor:
    """p(t) of training, (1000,): 80% in proportion to min(SNR, 1) / SNR, 20% uniform.

    Where SNR > 1 the picture is nearly there and v is little but noise; drawing such steps less often
    does what min-SNR weights do, without computing samples to throw away.
    """
    p = 1 / (alphas / (1 - alphas)).clamp(min=1)
    return 0.8 * p / p.sum() + 0.2 / STEPS


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, v) for latents x0 and noise (B, C, H, W) at steps t (B,)."""
    a, s = coefficients(t)
    return a * x0 + s * noise, a * noise - s * x0


def schedule(steps: int) -> list[int]:
    """The time steps of a sampling run, from 999 down."""
    return torch.linspace(STEPS - 1, 0, steps + 1)[:-1].round().long().tolist()


def simple_times(steps: int) -> tuple[int, ...]:
    """Time steps of ComfyUI's scheduler `simple`, from 999 down."""
    return tuple(STEPS - 1 - k * STEPS // steps for k in range(steps))


@torch.no_grad()
def ddim(
    predict_v: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    steps: int = 20,
    cfg: float = 3.0,
    alphas: Tensor = ALPHAS,
) -> Tensor:
    """Deterministic DDIM (eta 0) from noise x (B, C, H, W) to x_0.

    predict_v(x, t, context): v for t (B,) and context (B, N, D). cond: (B, N, D); uncond: (1, M, D), N a
    multiple of M, which changes nothing for attention.
    """
    times = schedule(steps)
    if cfg != 1:
        its = uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1)
    context = torch.cat([cond, its.expand_as(cond)]) if cfg != 1 else cond
    for i, now in enumerate(times):
        t = torch.full((len(context),), now, device=x.device)
        v = predict_v(torch.cat([x, x]) if cfg != 1 else x, t, context).float()
        if cfg != 1:
            v_cond, v_uncond = v.chunk(2)
            v = v_uncond + cfg * (v_cond - v_uncond)
        a, s = coefficients(t[: len(x)], alphas)
        x0 = a * x - s * v
        eps = s * x + a * v
        if i + 1 < len(times):
            a, s = coefficients(torch.full((len(x),), times[i + 1], device=x.device), alphas)
            x = a * x0 + s * eps
        else:
            x = x0
    return x
