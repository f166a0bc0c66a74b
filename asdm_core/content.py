"""What part of a latent is looked at, and whether a latent lies where it lay a step before.

Parts (windows of frames, tiles, rolled or shuffled latents) are found exactly: they hold the very numbers of the whole.
Two steps of a run hold other numbers. There, phase correlation (Kuglin and Hines 1975) tells a displacement: the
frequencies of both, all made equally large, agree in phase where nothing has moved, however smooth the picture is, and
whatever share of fresh noise a sampler has added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# In standard deviations of what unrelated latents give by chance.
SURE = 5.0  # of a likeness that is one
MORE = 6.0  # so much more alike is what has moved at its new place than at its old one
CERTAIN = 0.6  # mean cosine of the phases: what has moved by one pixel has less, however smooth

_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


def _signed(n: int) -> int:
    n &= (1 << 64) - 1
    return n - (1 << 64) if n >> 63 else n


def names(latent: Tensor) -> Tensor:
    """A number for each pixel of a latent (B, C, H, W), made of the bits of its channels: (B, H, W), int64."""
    bits = latent.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[latent.itemsize])
    found = torch.zeros(latent.shape[0], *latent.shape[2:], dtype=torch.int64, device=latent.device)
    for c in range(latent.shape[1]):
        found += bits[:, c].long() * _signed(_MULTIPLIERS[c % len(_MULTIPLIERS)] * (2 * c + 1))
    return found


class Places:
    """Where the pixels of parts lie in a whole latent (B, C, H, W)."""

    def __init__(self, whole: Tensor):
        self._names, self._order = names(whole).flatten().sort(stable=True)

    def of(self, part: Tensor) -> Tensor:
        """The place of each pixel of a part (b, C, h, w) of the same dtype, counted through B, H and W: (b, h, w); -1
        where the whole has no such pixel.
        """
        wanted = names(part)
        at = torch.searchsorted(self._names, wanted.flatten()).clamp(max=len(self._names) - 1)
        found = torch.where(self._names[at] == wanted.flatten(), self._order[at], -1)
        return found.view(wanted.shape)


def spectrum(latent: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Frequencies of a latent (B, C, H, W), as phase correlation needs them; size: (H, W) to which it is padded."""
    found: Tensor = torch.fft.fft2(latent.float(), s=tuple(size) if size else None)
    return found


def _phases(frequencies: Tensor) -> Tensor:
    return frequencies / frequencies.abs().clamp_min(torch.finfo(torch.float32).tiny)


def verdict(now: Tensor, before: Sequence[Tensor]) -> str:
    """Where the frames of a latent lie: "stays" if all surely are where they were, "moved" if one surely is elsewhere,
    or "unsure".

    now: its spectrum (B, C, H, W). before: those of what is known of the steps before it (latents, results).
    """
    own = _phases(now)
    scale = (now.shape[1] * now.shape[2] * now.shape[3]) ** 0.5
    # Most samplers go along the line through latents and results before, and what lies on it has the phases of neither.
    here = (own * _phases(_combined(now, before)).conj()).real.mean((1, 2, 3))
    if float(here.min()) > CERTAIN:
        return "stays"
    found, elsewhere = [here * scale], []
    for reference in before:
        phases = _phases(reference)
        surface = torch.fft.ifft2((own * phases.conj()).mean(1)).real.flatten(1) * scale
        found.append(surface[:, 0])
        elsewhere.append(surface[:, 1:].amax(1) if surface.shape[1] > 1 else surface[:, 0])
        if len(now) > 1:  # the places of other frames
            between = (own.flatten(1) @ phases.flatten(1).mH).real / scale
            elsewhere.append(between.fill_diagonal_(-scale).amax(1))
    at_home, away = torch.stack(found).amax(0), torch.stack(elsewhere).amax(0)
    gone = (away >= SURE) & (away > at_home + MORE)
    moved, sure = torch.stack([gone.any(), (at_home >= SURE).all()]).tolist()
    return "moved" if moved else "stays" if sure else "unsure"


def _combined(now: Tensor, before: Sequence[Tensor]) -> Tensor:
    """The combination of the references that comes nearest."""
    table = torch.stack([torch.view_as_real(b).flatten() for b in before])
    # So few numbers are solved for here, where no device has to begin a solver of its own.
    sums = torch.cat([table @ table.mH, (table @ torch.view_as_real(now).flatten())[:, None]], 1).double().cpu()
    gram = sums[:, :-1] + torch.eye(len(before)) * sums[:, :-1].diagonal().mean() * 1e-9
    weights = torch.linalg.lstsq(gram, sums[:, -1:], driver="gelsd").solution.to(table)
    return torch.view_as_complex((weights.mH @ table).view(*now.shape, 2))


def located(part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The place in a whole latent (B, C, H, W) where each frame of an altered part (b, C, h, w), not larger, most
    likely lies, counted through B, H and W, and how sure that is, in standard deviations of chance: each (b,).
    """
    frames, channels, height, width = whole.shape
    phases = _phases(spectrum(whole))
    places, sure = [], []
    for frame in part:
        own = _phases(spectrum(frame[None], (height, width)))
        surface = torch.fft.ifft2((phases * own.conj()).mean(1)).real.flatten() * (channels * height * width) ** 0.5
        best = surface.max(0)
        places.append(best.indices)
        sure.append(best.values)
    return torch.stack(places), torch.stack(sure)
