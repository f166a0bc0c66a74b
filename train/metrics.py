"""Metrics that need no network of their own: distances between pictures, between sets of features, and their spread."""

from __future__ import annotations

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values (N,)."""
    return float(values.float().std() / len(values) ** 0.5)


def by_bins(values: Tensor, t: Tensor, steps: int = 1000, bins: int = 4) -> dict[str, float]:
    """Means of values (N,) over all and by bins of their timesteps t (N,): {"all": .., "0-249": .., ...}."""
    width = steps // bins
    return {"all": float(values.mean())} | {
        f"{b * width}-{(b + 1) * width - 1}": float(values[t // width == b].mean()) for b in range(bins)
    }


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features (N, D) and (M, D), each taken as a normal distribution (Heusel et al.
    2017).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); biased upwards for few pictures, so sets are only
    comparable at the same N. Raises ValueError where N does not exceed D and covariances are singular.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        raise ValueError(
            f"the Frechet distance of {a.shape[1]} features needs more than {a.shape[1]} pictures, got {len(a)} and "
            f"{len(b)}"
        )
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    # tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of the similar, symmetric C_a^(1/2) C_b C_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance (Binkowski et al. 2018) of features (N, D) and (M, D): unbiased MMD^2 with (x y / D + 1)^3."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def border(images: Tensor, width: int = 3) -> Tensor:
    """How far the outermost pixels of pictures (N, C, H, W) are from one colour, (N,): mean distance to their median.

    Few-step students leave muddy grounds and halos there, which recognition does not see.
    """
    w = width
    edge = torch.cat(
        [part.flatten(2) for part in (images[:, :, :w], images[:, :, -w:], images[..., :w], images[..., -w:])], 2
    )
    return (edge - edge.median(2, keepdim=True).values).abs().mean((1, 2))


def gradient(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of pictures (N, C, H, W), (N,): how sharp they are."""
    across = images[..., 1:] - images[..., :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    return across.abs().mean((1, 2, 3)) + down.abs().mean((1, 2, 3))
