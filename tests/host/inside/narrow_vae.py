"""The embedded VAE as narrow as it was trained, against the same weights in the host's own classes."""

from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import small
import torch
from comfy.taesd.taesd import TAESD
from torch import nn

FAMILY = Path(__file__).resolve().parents[3] / "models/emoji"
narrow_vae = small.module("nodes.engine.narrow_vae")


@pytest.fixture(scope="module")
def weights():
    return comfy.utils.load_torch_file(str(FAMILY / "emoji-vae.safetensors"))


@pytest.fixture(scope="module")
def stock(weights):
    return comfy.sd.VAE(sd=dict(weights))


@pytest.fixture(scope="module")
def embedded():
    return small.models.load_checkpoint(FAMILY / "emoji-teacher.safetensors")[2]


def widths(network, x):
    """Channels that each convolution of a network takes and gives."""
    found, hooks = [], []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(lambda _, x, y: found.append((x[0].shape[1], y.shape[1]))))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


def test_pictures_and_latents_are_those_of_the_full_width(stock, embedded):
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    for of in (lambda vae: vae.decode(latents), lambda vae: vae.encode(pictures)):
        wanted, found = of(stock), of(embedded)
        assert wanted.shape == found.shape and (wanted - found).abs().max() < 1e-5 * wanted.abs().max()
    assert not torch.equal(stock.decode(latents), torch.full_like(stock.decode(latents), 0.5))


def test_the_decoder_is_as_narrow_as_it_was_trained(stock, embedded):
    x = torch.zeros(1, 4, 16, 16)
    full = widths(stock.first_stage_model.taesd_decoder.float(), x)
    found = widths(embedded.first_stage_model.taesd_decoder.float(), x)
    assert set(full) == {(4, 64), (64, 64), (64, 3)} and len(found) == len(full)
    assert found[-1] == (16, 3) and (32, 32) in found and (16, 16) in found


def test_what_is_saved_is_the_file(weights, embedded):
    saved = embedded.get_sd()
    assert saved.keys() == weights.keys() and all(torch.equal(saved[k].float(), weights[k].float()) for k in weights)


def test_a_network_without_noughts_and_one_of_another_class_stay_as_they_are():
    full = TAESD()
    for p in full.parameters():
        nn.init.normal_(p)
    layers = list(full.taesd_decoder.modules())
    narrow_vae.narrow(full)
    x = torch.zeros(1, 4, 8, 8)
    assert set(widths(full.taesd_decoder, x)) == {(4, 64), (64, 64), (64, 3)}
    assert {type(layer) for layer in full.taesd_decoder.modules()} == {type(layer) for layer in layers}
    other = nn.Module()
    other.taesd_decoder = nn.Sequential(nn.Conv2d(4, 3, 1))
    before = other.taesd_decoder
    narrow_vae.narrow(other)
    assert other.taesd_decoder is before


@pytest.mark.parametrize("seed", range(5))
def test_any_channels_may_be_nought(seed):
    """Not only the last ones, and also such as a block fills for the first time."""
    g = torch.Generator().manual_seed(seed)
    whole = TAESD()
    for p in whole.parameters():
        if p.dim() == 4:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
            p.data[torch.rand(len(p), generator=g) < 0.6] = 0
        elif p.dim() == 1:
            p.data = torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) < 0.2)
    x, z = torch.rand(1, 3, 32, 32, generator=g), torch.randn(1, 4, 4, 4, generator=g)
    with torch.no_grad():
        wanted = whole.taesd_encoder(x), whole.taesd_decoder(z)
        saved = {k: v.clone() for k, v in whole.state_dict().items()}
        narrow_vae.narrow(whole)
        found = whole.taesd_encoder(x), whole.taesd_decoder(z)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max())) for a, b in zip(wanted, found, strict=True)
    )
    assert any(a != (64, 64) for a in widths(whole.taesd_decoder, z)[1:-1])
    assert all(torch.equal(v, saved[k]) for k, v in whole.state_dict().items())
