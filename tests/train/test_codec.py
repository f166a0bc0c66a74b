import pytest
import torch

from train.emoji.codec import Codec, from_taesd, gather, loss_of, psnr_of, to_taesd
from train.emoji.training import Optimiser


class TaesdBlock(torch.nn.Module):
    """TAESD's layers as its authors publish them, to check the export against."""

    def __init__(self):
        super().__init__()
        conv = [torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = torch.nn.Sequential(conv[0], torch.nn.ReLU(), conv[1], torch.nn.ReLU(), conv[2])

    def forward(self, x):
        return (self.conv(x) + x).relu()


def taesd():
    def conv(n_in, n_out, **kw):
        return torch.nn.Conv2d(n_in, n_out, 3, padding=1, **kw)

    class Clamp(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x / 3) * 3

    def down():
        return [conv(64, 64, stride=2, bias=False), TaesdBlock(), TaesdBlock(), TaesdBlock()]

    def up():
        return [TaesdBlock(), TaesdBlock(), TaesdBlock(), torch.nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]

    encoder = torch.nn.Sequential(conv(3, 64), TaesdBlock(), *down(), *down(), *down(), conv(64, 4))
    decoder = torch.nn.Sequential(Clamp(), conv(4, 64), torch.nn.ReLU(), *up(), *up(), *up(), TaesdBlock(), conv(64, 3))
    return torch.nn.ModuleDict({"taesd_encoder": encoder, "taesd_decoder": decoder})


@pytest.fixture()
def codec():
    torch.manual_seed(0)
    codec = Codec()
    with torch.no_grad():  # away from the start, where most is zero
        for p in codec.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return codec.eval()


@pytest.fixture()
def exported(codec):
    sd = to_taesd(codec)
    full = taesd()
    full.load_state_dict({k: v for k, v in sd.items() if not k.startswith("vae_")})
    return full.eval()


@torch.no_grad()
def test_the_gathering_stages_are_exactly_a_space_to_depth(exported):
    x = torch.rand(2, 3, 64, 48)
    assert torch.equal(exported["taesd_encoder"][:7](x), gather(x))


@torch.no_grad()
def test_the_export_computes_the_same(codec, exported):
    # In float64: zero channels add exactly nothing, whatever order the kernels sum in.
    codec, exported = codec.double(), exported.double()
    x = torch.rand(2, 3, 64, 48, dtype=torch.float64)
    z = codec.encode(x)
    torch.testing.assert_close(exported["taesd_encoder"](x), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(exported["taesd_decoder"](z), codec.decoder(z), rtol=0, atol=1e-12)


def test_the_codec_comes_back_from_its_file_unchanged(codec):
    back = from_taesd(to_taesd(codec))
    for (key, a), (_, b) in zip(codec.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


@torch.no_grad()
def test_it_starts_as_mean_colours():
    torch.manual_seed(0)
    codec = Codec()
    flat = torch.rand(4, 3, 1, 1).expand(-1, -1, 64, 64).contiguous()
    assert psnr_of(codec, flat).min() > 15


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    codec = Codec()
    optimiser = Optimiser(dict(codec.named_parameters()), weight_decay=0.0)
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), scale_factor=8, mode="bicubic").clamp(0, 1)
    noise = torch.randn(2, 4, 8, 8)
    amount = torch.tensor([0.0, 0.1])
    losses = []
    for _ in range(12):
        loss = loss_of(codec, x, noise, amount)
        loss.backward()
        optimiser.step(1e-3)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
