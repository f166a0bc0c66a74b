"""The VAE of the emoji family: 128 px pictures to 4x16x16 latents, in the TAESD layout.

    python -m train.emoji.codec --minutes 18

Trained small, exported exactly. The first two stages of the encoder only gather pixels (an exact
space-to-depth, which TAESD's layers can express because pictures in [0, 1] pass every ReLU), and the
decoder is narrow towards the picture; both are written into TAESD's full layers with zeros.

    python -m train.emoji.codec --decoder-only --minutes 20

goes on with the finished decoder and leaves the encoder, and so every latent, as it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from asdm_core.tensor_file import write_file

from .data import ALL_COPIES, draw, load_glyphs, variants
from .sources import STYLES
from .training import Checkpoint, Optimiser, TrainingState, add_common_arguments, start
from ..progress import Progress, plain_errors
from ..figures import save_curve, save_grid
from ..seeds import seeded

WIDTH = 64  # of every layer of TAESD
DECODER = (64, 64, 32, 16)  # trained widths at 16, 32, 64 and 128 px
LATENT_CHANNELS = 4
FACTOR = 0.18215  # the host's SD1.5 latent format multiplies by it; vae_scale in the file undoes that


def conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Block(nn.Module):
    """TAESD's residual block. Starts as the identity on what is not negative: its last convolution is zero."""

    def __init__(self, width: int):
        super().__init__()
        last = conv(width, width)
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Encoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 4, H/8, W/8). Numbers in brackets: place in TAESD's encoder."""

    def __init__(self):
        super().__init__()
        self.at32 = nn.Sequential(*[Block(WIDTH) for _ in range(3)])  # 7, 8, 9
        self.down = conv(WIDTH, WIDTH, stride=2, bias=False)  # 10
        self.at16 = nn.Sequential(*[Block(WIDTH) for _ in range(3)])  # 11, 12, 13
        self.out = conv(WIDTH, LATENT_CHANNELS)  # 14
        with torch.no_grad():
            # Channels 0-2 carry the mean colour of the 8x8 patch on to the first three latent channels.
            self.down.weight.mul_(0.5)
            self.down.weight[:3].zero_()
            for c in range(3):
                self.down.weight[c, 16 * c : 16 * c + 16, 1:, 1:] = 1 / 64
            self.out.weight[:3].mul_(0.1)
            self.out.bias.zero_()
            for c in range(3):
                self.out.weight[c, c, 1, 1] = 3.0
                self.out.bias[c] = -2.2

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.at16(self.down(self.at32(gather(x)))))


def gather(x: Tensor) -> Tensor:
    """4x4 patches to channels, colour first: (B, 3, H, W) -> (B, 64, H/4, W/4), channels 48 to 63 zero."""
    return F.pad(F.pixel_unshuffle(x, 4), (0, 0, 0, 0, 0, WIDTH - 48))


class Decoder(nn.Module):
    """(B, 4, h, w) -> (B, 3, 8h, 8w), about [0, 1]. Numbers in brackets: place in TAESD's decoder."""

    def __init__(self):
        super().__init__()
        a, b, c, d = DECODER
        self.enter = conv(LATENT_CHANNELS, a)  # 1
        self.at16 = nn.Sequential(*[Block(a) for _ in range(3)])  # 3, 4, 5
        self.up32 = conv(a, b, bias=False)  # 7
        self.at32 = nn.Sequential(*[Block(b) for _ in range(3)])  # 8, 9, 10
        self.up64 = conv(b, c, bias=False)  # 12
        self.at64 = nn.Sequential(*[Block(c) for _ in range(3)])  # 13, 14, 15
        self.up128 = conv(c, d, bias=False)  # 17
        self.at128 = Block(d)  # 18
        self.out = conv(d, 3)  # 19
        with torch.no_grad():
            # Three channels carry the colour of the latents straight to the picture; the rest starts small.
            for layer, scale in (
                (self.enter, 1 / 3.0),
                (self.up32, 1.0),
                (self.up64, 1.0),
                (self.up128, 1.0),
                (self.out, 1.0),
            ):
                layer.weight[:3] = 0
                for k in range(3):
                    layer.weight[k, k, 1, 1] = scale
            self.enter.bias[:3] = 2.2 / 3.0
            self.out.weight[:, 3:].mul_(0.1)
            self.out.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        h = self.at16(F.relu(self.enter(torch.tanh(z / 3) * 3)))
        h = self.at32(self.up32(F.interpolate(h, scale_factor=2)))
        h = self.at64(self.up64(F.interpolate(h, scale_factor=2)))
        return self.out(self.at128(self.up128(F.interpolate(h, scale_factor=2))))


class Codec(nn.Module):
    """Encoder and decoder. Training pulls the latents to mean 0 and std 1 per channel, what the UNet wants."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).clamp(0, 1)


# Export ---------------------------------------------------------------------------------------------

_ENCODER = {"at32.0": 7, "at32.1": 8, "at32.2": 9, "down": 10, "at16.0": 11, "at16.1": 12, "at16.2": 13, "out": 14}
_DECODER = {
    "enter": 1,
    "at16.0": 3,
    "at16.1": 4,
    "at16.2": 5,
    "up32": 7,
    "at32.0": 8,
    "at32.1": 9,
    "at32.2": 10,
    "up64": 12,
    "at64.0": 13,
    "at64.1": 14,
    "at64.2": 15,
    "up128": 17,
    "at128": 18,
    "out": 19,
}


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = torch.zeros(shape)
    padded[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return padded


def to_taesd(codec: Codec) -> dict[str, Tensor]:
    """The state dict of TAESD's own, full-width classes that computes the same (float32)."""
    sd: dict[str, Tensor] = {}

    for side, names in (("encoder", _ENCODER), ("decoder", _DECODER)):
        for key, tensor in getattr(codec, side).state_dict().items():
            name = next(n for n in names if key.startswith(n + "."))
            target = f"taesd_{side}.{names[name]}.{key.removeprefix(name + '.')}"
            tensor = tensor.detach().float().cpu()
            ends = (side, name) in (("encoder", "out"), ("decoder", "out"))
            out = tensor.shape[0] if ends else WIDTH
            if tensor.dim() == 1:
                sd[target] = _pad(tensor, (out,))
            else:
                into = tensor.shape[1] if (side, name) == ("decoder", "enter") else WIDTH
                sd[target] = _pad(tensor, (out, into, 3, 3))

    # The gathering stages: a 3x3 convolution of stride 2 sees a pixel and its right, lower and diagonal neighbour.
    e = "taesd_encoder"
    sd[f"{e}.0.weight"] = torch.zeros(WIDTH, 3, 3, 3)
    sd[f"{e}.0.bias"] = torch.zeros(WIDTH)
    for c in range(3):
        sd[f"{e}.0.weight"][c, c, 1, 1] = 1
    for layer, n_in in ((2, 3), (6, 12)):
        weight = torch.zeros(WIDTH, WIDTH, 3, 3)
        for c in range(n_in):
            for y in range(2):
                for x in range(2):
                    if n_in == 3:
                        out = 4 * c + 2 * y + x
                    else:  # channel c holds colour c // 4 at offset (c % 4) of a 2x2 patch: pixel_unshuffle(4)'s order
                        colour = c // 4
                        y1 = c % 4 // 2
                        x1 = c % 2
                        out = 16 * colour + 4 * (2 * y + y1) + 2 * x + x1
                    weight[out, c, 1 + y, 1 + x] = 1
        sd[f"{e}.{layer}.weight"] = weight
    for layer in (1, 3, 4, 5):
        for i in (0, 2, 4):
            sd[f"{e}.{layer}.conv.{i}.weight"] = torch.zeros(WIDTH, WIDTH, 3, 3)
            sd[f"{e}.{layer}.conv.{i}.bias"] = torch.zeros(WIDTH)
    sd["vae_scale"] = torch.tensor(FACTOR)
    sd["vae_shift"] = torch.tensor(0.0)
    return sd


def from_taesd(sd: dict[str, Tensor]) -> Codec:
    """The small codec inside a file that `to_taesd` wrote."""
    codec = Codec()
    for side, names in (("encoder", _ENCODER), ("decoder", _DECODER)):
        for key, p in getattr(codec, side).named_parameters():
            name = next(n for n in names if key.startswith(n + "."))
            stored = sd[f"taesd_{side}.{names[name]}.{key.removeprefix(name + '.')}"].float()
            with torch.no_grad():
                p.copy_(stored[tuple(slice(0, n) for n in p.shape)])
    return codec.eval()


def load_codec(models: Path) -> Codec:
    """The finished codec, as it is on disk (weights rounded to fp16)."""
    path = models / "emoji-vae.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is missing; make it with `python -m train.emoji.codec`")
    with safe_open(path, framework="pt") as f:
        return from_taesd({k: f.get_tensor(k) for k in f.keys()})


# Training -------------------------------------------------------------------------------------------


def loss_of(codec: Codec, x: Tensor, noise: Tensor, amount: Tensor) -> Tensor:
    """L1 + 2 MSE + 0.5 gradient differences, plus a pull of the latents to mean 0 and std 1.

    noise (B, 4, h, w) is added to the latents times `amount` (B,): the decoder must bear what a UNet leaves.
    """
    z = codec.encode(x)
    y = codec.decoder(z + amount[:, None, None, None] * noise)
    z = z.float()
    d = y.float() - x
    dx = d[..., 1:] - d[..., :-1]
    dy = d[..., 1:, :] - d[..., :-1, :]
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    return (
        d.abs().mean()
        + 2 * d.square().mean()
        + 0.5 * (dx.abs().mean() + dy.abs().mean())
        + 0.02 * (mean.square() + (std - 1).square()).mean()
    )


@torch.no_grad()
def psnr_of(codec: Codec, x: Tensor) -> Tensor:
    """PSNR in dB of every picture of (B, 3, H, W) after the codec."""
    y = torch.cat([codec.decode(codec.encode(part)) for part in x.split(32)])
    return -10 * (y - x).square().mean((1, 2, 3)).log10()


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.3, help="largest std of the noise on the latents")
    parser.add_argument(
        "--decoder-only", action="store_true", help="train the finished decoder on, with the encoder frozen"
    )
    args = parser.parse_args()
    start(args)
    torch.manual_seed(args.seed)
    name = "decoder" if args.decoder_only else "codec"

    glyphs = load_glyphs(args.runs)
    pool = variants(glyphs.concepts, STYLES, everything=True, copies=ALL_COPIES)
    probe = draw(glyphs, [pool[i] for i in range(0, len(pool), len(pool) // 96)], wild=True)
    codec = load_codec(args.models) if args.decoder_only else Codec()
    codec.encoder.requires_grad_(not args.decoder_only)
    finished = copy.deepcopy(codec)  # takes the averaged weights
    codec = codec.to(args.device).train()
    optimiser = Optimiser({k: p for k, p in codec.named_parameters() if p.requires_grad}, weight_decay=0.0, ema=0.998)
    checkpoint = Checkpoint(args.runs / f"{name}.safetensors")
    run = TrainingState(args.minutes, args.steps)
    if not args.fresh:
        run = checkpoint.load(optimiser, run)

    def show() -> float:
        best = optimiser.averaged(finished.to(args.device))
        quality = float(psnr_of(best, probe.to(args.device)).mean())
        some = probe[:16].to(args.device)
        with torch.no_grad():
            save_grid(args.runs / f"{name}.png", torch.cat([some, best.decode(best.encode(some))]), columns=16)
        save_curve(args.runs / f"{name}-loss.png", run.curve, f"{name}, {quality:.2f} dB")
        return quality

    progress = Progress(name)
    while not run.done:
        began = time.perf_counter()
        g = seeded(args.seed, 4 if args.decoder_only else 1, run.step)
        chosen = [pool[i] for i in torch.randint(len(pool), (args.batch,), generator=g)]
        x = draw(glyphs, chosen, seed=run.step + 1, wild=True).to(args.device)
        noise = torch.randn(args.batch, LATENT_CHANNELS, x.shape[2] // 8, x.shape[3] // 8, generator=g)
        # Half the pictures without noise: the codec alone must be sharp too.
        amount = args.noise * (2 * torch.rand(args.batch, generator=g) - 1).clamp_min(0)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss = loss_of(codec, x, noise.to(args.device), amount.to(args.device))
        loss.backward()
        optimiser.step(run.rate(args.lr))
        run.advance(args.batch, float(loss.detach()), began)
        progress.show(run.step, f"loss {float(loss.detach()):.4f}, {run.status()}")
        if checkpoint.due():
            checkpoint.save(optimiser, run)
            print(f"step {run.step}: {show():.2f} dB after {run.seconds / 60:.1f} min", flush=True)
    progress.end()
    checkpoint.save(optimiser, run)

    best = optimiser.averaged(finished.cpu())
    sd = {k: v.half() for k, v in to_taesd(best).items()}
    write_file(
        args.models / "emoji-vae.safetensors",
        sd,
        {
            "format": "pt",
            "training": json.dumps(
                {
                    "minutes": round(run.seconds / 60, 1),
                    "steps": run.step,
                    "samples": run.samples,
                    "batch": args.batch,
                    "lr": args.lr,
                    "noise": args.noise,
                    "seed": args.seed,
                    "decoder_only": args.decoder_only,
                }
            ),
        },
    )
    print(f"wrote emoji-vae.safetensors, {show():.2f} dB on jittered glyphs of all styles")


if __name__ == "__main__":
    main()
