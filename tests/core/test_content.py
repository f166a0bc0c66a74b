"""Whether a latent lies where it lay, over simulated sampling runs; and where its parts lie."""

import pytest
import torch

from asdm_core import content


def wiener(x, sigma, power):
    """The best guess of a Gaussian picture with a power spectrum f^-2power, from x with noise of size sigma."""
    freqs = torch.fft.fftfreq(x.shape[-1])
    spectrum = (1e-3 + freqs[:, None] ** 2 + freqs[None] ** 2) ** -power
    spectrum = spectrum / spectrum.mean()
    return torch.fft.ifft2(torch.fft.fft2(x) * spectrum / (spectrum + sigma**2)).real


def karras(steps, low=0.03, high=14.6, rho=7):
    t = torch.linspace(0, 1, steps)
    return [*((high ** (1 / rho) + t * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist(), 0.0]


def step(sampler, x, d, s, n):
    if sampler == "euler":
        return x + (x - d) / s * (n - s)
    if sampler == "ancestral":
        up = min(n, (n**2 * (s**2 - n**2) / s**2) ** 0.5)
        down = (n**2 - up**2) ** 0.5
        return d + (x - d) / s * down + torch.randn_like(x) * up
    if sampler == "sde":
        keeps = (n / s) ** 2
        return keeps * x + (1 - keeps) * d + torch.randn_like(x) * n * (1 - (n / s) ** 2) ** 0.5
    return d + torch.randn_like(x) * n  # lcm


def verdicts(sampler, steps, size=32, power=2, frames=1, move=None, at=None):
    """Of each evaluation but the first, against the one before; `move` happens to the latent before evaluation `at`."""
    sigmas, before, found = karras(steps), None, []
    x = torch.randn(frames, 4, size, size) * sigmas[0]
    for i, (s, n) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x = move(x) if i == at else x
        now = content.spectrum(x)
        if before is not None:
            found.append(content.verdict(now, before))
        d = wiener(x, s, power)
        before = now, content.spectrum(d)
        x = step(sampler, x, d, s, n)
    return found


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.sweep(9)
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("sampler", ["euler", "ancestral", "sde", "lcm"])
def test_no_sampler_moves_a_latent(sampler, steps, size, power):
    for _ in range(5):
        found = verdicts(sampler, steps, size, power, frames=2)
        assert "moved" not in found
        assert sampler != "euler" or set(found) == {"stays"}


@pytest.mark.sweep(9)
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("sampler", ["euler", "ancestral", "sde"])
@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (-1, 1), (0, 5)])
def test_a_shift_late_in_a_run_is_found(sampler, steps, power, shift):
    at = steps - steps // 3
    found = verdicts(sampler, steps, 64, power, move=lambda x: x.roll(shift, (2, 3)), at=at)
    assert found[at - 1] == "moved" and found.count("moved") == 1


@pytest.mark.parametrize("sampler", ["euler", "ancestral"])
def test_frames_that_change_places_are_found(sampler):
    found = verdicts(sampler, 12, frames=4, move=lambda x: x[[1, 2, 3, 0]], at=8)
    assert found[7] == "moved" and found.count("moved") == 1


@pytest.mark.parametrize("change", [lambda x: x.flip(3), lambda x: x.transpose(2, 3), lambda x: torch.randn_like(x)])
def test_another_picture_is_never_sure(change):
    found = verdicts("euler", 12, move=change, at=8)
    assert found[7] == "unsure"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_parts_are_found_exactly(dtype):
    whole = torch.randn(3, 4, 10, 12).to(dtype)
    places = content.Places(whole)
    numbers = torch.arange(3 * 10 * 12).view(3, 10, 12)
    parts = {
        "itself": lambda t: t,
        "a tile": lambda t: t[..., 2:7, 3:9],
        "rolled": lambda t: t.roll((1, -2), (-2, -1)),
        "frames": lambda t: t[[2, 0]],
        "flipped": lambda t: t.flip(-1),
        "every other": lambda t: t[..., ::2, 1::2],
    }
    for part in parts.values():
        assert torch.equal(places.of(part(whole)), part(numbers))
    foreign = torch.randn(1, 4, 5, 5).to(dtype)
    foreign[0, :, 2, 3] = whole[1, :, 4, 4]
    found = places.of(foreign)
    assert found[0, 2, 3] == numbers[1, 4, 4] and (found == -1).sum() == 24


def test_an_altered_part_is_located():
    whole = torch.randn(2, 4, 32, 32)
    part = whole[1:, :, 3:27, 5:29] * 1.1 + 0.2 * torch.randn(1, 4, 24, 24)
    place, sure = content.located(part, whole)
    assert int(place) == 1 * 32 * 32 + 3 * 32 + 5 and float(sure) > 3 * content.SURE
    assert float(content.located(torch.randn(1, 4, 24, 24), whole)[1]) < 2 * content.SURE
