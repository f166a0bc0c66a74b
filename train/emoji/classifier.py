"""The classifier behind the metrics: which concept does a 128 px picture show?

    python -m train.emoji.classifier --minutes 15

Trained on glyphs of all three styles with jitter, crops, colour changes, blur and codec round trips. It learned
from the pictures the teacher learned from, so its accuracy is read beside the ceiling: the same classifier on real
glyphs after the codec.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from asdm_core.tensor_file import write_file

from .codec import load_codec
from .data import ALL_COPIES, Variant, draw, load_glyphs, variants
from .sources import STYLES
from .training import Checkpoint, Optimiser, TrainingState, add_common_arguments, start
from ..progress import Progress, plain_errors
from ..figures import save_curve
from ..seeds import seeded

FEATURES = 64
SIZE = 64  # pixels it looks at


class Classifier(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] -> logits (B, concepts); `features` gives the 64 numbers before them.

    It looks at half the resolution: what an emoji shows is clear at 64 px. Pictures of 64 px are taken as they are.
    """

    def __init__(self, concepts: int, width: int = 48):
        super().__init__()

        def stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

        w = width
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            stage(12, w, 1),
            stage(w, 2 * w, 2),
            stage(2 * w, 2 * w, 1),
            stage(2 * w, 4 * w, 2),
            stage(4 * w, 4 * w, 1),
        )
        self.features_out = nn.Sequential(nn.Linear(2 * 4 * w, FEATURES, bias=False), nn.BatchNorm1d(FEATURES))
        self.head = nn.Linear(FEATURES, concepts)

    def features(self, x: Tensor) -> Tensor:
        """(B, 64)"""
        if x.shape[-1] > SIZE:
            x = F.avg_pool2d(x, x.shape[-1] // SIZE)
        h = self.body(2 * x - 1)
        return self.features_out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Random crops, colour changes, blur and noise for pictures (B, 3, H, W) in [0, 1]."""
    b, _, h, w = x.shape
    scale = 0.85 + 0.15 * torch.rand(b, generator=g)
    shift = (1 - scale)[:, None] * (2 * torch.rand(b, 2, generator=g) - 1)
    maps = torch.zeros(b, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = scale
    maps[:, :, 2] = shift
    x = F.grid_sample(
        x, F.affine_grid(maps, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    gain = 0.85 + 0.3 * torch.rand(b, 3, 1, 1, generator=g)
    x = (x - 0.5) * gain + 0.5 + 0.1 * (torch.rand(b, 3, 1, 1, generator=g) - 0.5)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(b, 1, 1, 1, generator=g)
    x = x + amount * (blurred - x)
    return (x + 0.05 * torch.rand(b, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)).clamp(0, 1)


@torch.no_grad()
def recalibrate(model: Classifier, batches: Iterable[Tensor]) -> Classifier:
    """Measure the batch statistics anew, for weights that were averaged; leaves the model in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain mean over the batches
    model.train()
    for x in batches:
        model(x)
    return model.eval()


def save_classifier(path: Path, model: Classifier, codes: list[str], training: dict) -> None:
    tensors = {k: v.half() if v.dim() > 1 else v for k, v in model.state_dict().items()}
    write_file(path, tensors, {"format": "pt", "codes": json.dumps(codes), "training": json.dumps(training)})


def load_classifier(models: Path, codes: list[str]) -> Classifier:
    """The finished classifier, its classes in the order of `codes` (code points it knows, or some of them)."""
    path = models / "emoji-classifier.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is missing; make it with `python -m train.emoji.classifier`")
    with safe_open(path, framework="pt") as f:
        known = {code: row for row, code in enumerate(json.loads(f.metadata()["codes"]))}
        unknown = [code for code in codes if code not in known]
        if unknown:
            raise ValueError(f"{path.name} does not know {', '.join(unknown)}; train it again on these glyphs")
        model = Classifier(len(codes))
        sd = {k: f.get_tensor(k) for k in f.keys()}
    rows = [known[code] for code in codes]
    model.load_state_dict(sd | {k: sd[k][rows] for k in ("head.weight", "head.bias")})
    return model.eval()


@torch.no_grad()
def top_k(model: Classifier, images: Tensor, labels: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Whether each picture is recognised first, and among the first k: two bool tensors (B,)."""
    logits = torch.cat([model(part) for part in images.split(128)])
    best = logits.topk(k, 1).indices
    return best[:, 0] == labels, (best == labels[:, None]).any(1)


def pictures(runs: Path, models: Path, device: str) -> tuple[Tensor, Tensor]:
    """Training pictures at SIZE px (uint8) and their concepts, made once: jittered glyphs, and half as many after
    the codec with latents that are a little wrong."""
    path = runs / "classifier-pictures.safetensors"
    glyphs = load_glyphs(runs)
    chosen = variants(glyphs.concepts, STYLES, everything=True, copies=ALL_COPIES)
    labels = torch.tensor([v.concept for v in chosen] + [v.concept for v in chosen[::2]])
    if path.exists():
        with safe_open(path, framework="pt") as f:
            return f.get_tensor("pictures"), labels
    codec = load_codec(models).to(device)
    made = []
    progress = Progress("classifier pictures", len(labels))

    def keep(x: Tensor) -> None:
        made.append((F.avg_pool2d(x.float().cpu(), 2) * 255).round().to(torch.uint8))
        progress.show(sum(map(len, made)))

    for i in range(0, len(chosen), 32):
        keep(draw(glyphs, chosen[i : i + 32], seed=11, wild=True))
    g = seeded(11)
    for i in range(0, len(chosen[::2]), 32):
        x = draw(glyphs, chosen[::2][i : i + 32], seed=12, wild=True).to(device)
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            z = codec.encode(x).float().cpu()
            z = z + 0.3 * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
            keep(codec.decode(z.to(device)))
    progress.end()
    result = torch.cat(made)
    write_file(path, {"pictures": result}, {})
    return result, labels


@plain_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    start(args)
    torch.manual_seed(args.seed)
    glyphs = load_glyphs(args.runs)
    codec = load_codec(args.models)
    images, labels = pictures(args.runs, args.models, args.device)
    model = Classifier(len(glyphs.concepts)).to(args.device)
    optimiser = Optimiser(dict(model.named_parameters()), weight_decay=0.02, ema=0.998)
    checkpoint = Checkpoint(args.runs / "classifier.safetensors")
    run = TrainingState(args.minutes, args.steps)
    if not args.fresh:
        run = checkpoint.load(optimiser, run)

    progress = Progress("classifier")
    while not run.done:
        began = time.perf_counter()
        g = seeded(args.seed, 5, run.step)
        rows = torch.randint(len(images), (args.batch,), generator=g)
        x = augment(images[rows].float() / 255, g)
        wanted = labels[rows]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            logits = model(x.to(args.device))
        loss = F.cross_entropy(logits.float(), wanted.to(args.device), label_smoothing=0.05)
        loss.backward()
        optimiser.step(run.rate(args.lr))
        run.advance(len(x), float(loss.detach()), began)
        progress.show(run.step, f"loss {float(loss.detach()):.3f}, {run.status()}")
        if checkpoint.due():
            checkpoint.save(optimiser, run)
            save_curve(args.runs / "classifier-loss.png", run.curve, "classifier")
    progress.end()
    checkpoint.save(optimiser, run)
    save_curve(args.runs / "classifier-loss.png", run.curve, "classifier")
    best = optimiser.averaged(Classifier(len(glyphs.concepts)))
    g = seeded(args.seed, 6)
    best = recalibrate(
        best, (augment(images[torch.randint(len(images), (256,), generator=g)].float() / 255, g) for _ in range(24))
    )
    save_classifier(
        args.models / "emoji-classifier.safetensors",
        best,
        [c.code for c in glyphs.concepts],
        {
            "minutes": round(run.seconds / 60, 1),
            "steps": run.step,
            "samples": run.samples,
            "lr": args.lr,
            "seed": args.seed,
        },
    )
    for style in STYLES:
        chosen = [Variant(i, style, b, 1) for i in range(len(glyphs.concepts)) for b in ("white", "blue")]
        with torch.no_grad():
            after = torch.cat(
                [
                    codec.decode(codec.encode(draw(glyphs, chosen[i : i + 32], seed=10**6, wild=True)))
                    for i in range(0, len(chosen), 32)
                ]
            )
        first, five = top_k(best, after, torch.tensor([v.concept for v in chosen]))
        print(
            f"{style}, real glyphs after the codec: top-1 {first.float().mean():.3f}, top-5 {five.float().mean():.3f}"
        )


if __name__ == "__main__":
    main()
