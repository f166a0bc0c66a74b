"""Networks of the family measured against a teacher: the same inputs, prompts and noises for all.

    python -m train.emoji.compare runs/emoji-m2/emoji-m2.safetensors runs/emoji-tiny/emoji-tiny.safetensors

With --on openmoji against the finetune. The same command goes on where it stopped; other settings want another --out.

Two measures need no sampling and a few seconds: the squared difference of v to the teacher's, and to the data's, on
fixed inputs. The others are of pictures drawn from paired noise: PSNR and SSIM to the teacher's own, how muddy the
ground and how sharp all is (train/metrics.py), recognition by the classifier, and the Frechet and kernel distances of
its features to those of real glyphs after the codec.
Distances to the teacher punish a network that is better than it; recognition and the distances to glyphs do not.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from asdm_core.measure import psnr, ssim
from asdm_core.packs import open_model
from asdm_core.tensor_file import write_file

from ..figures import save_grid
from ..metrics import border, by_bins, frechet, gradient, kid, standard_error
from ..provenance import fingerprint, named, same_folder
from .captions import prompt
from .classifier import load_classifier, top_k
from .codec import load_codec
from .data import load_glyphs
from ..diffusion import STEPS, noised, schedule
from .latents import load_latents
from .teacher import TEACHER_STYLES, Batches, background_share, codec_images, sample_latents
from .text import LENGTH, Tokens, host_folder, load_text
from ..networks import assembled
from ..progress import Progress, plain_errors
from ..seeds import seeded
from .unet import load_unet

FIXED = 512  # inputs of the v-MSE
FIXED_STEP = 10**9  # their samples lie far beyond any training step
REFERENCE = 2048  # real glyphs
SHOWN = 16  # pictures of each network
STYLES = {"teacher": TEACHER_STYLES, "openmoji": ("openmoji",)}


class Switched(nn.Module):
    """Two networks that share one sampling run: `first` for the share `at` of its steps, then `second`."""

    def __init__(self, first: nn.Module, second: nn.Module, at: float, steps: int):
        super().__init__()
        self.first = first
        self.second = second
        self.last = schedule(steps)[round(at * steps) - 1]  # the last timestep of the first network

    def forward(self, x: Tensor, t: Tensor, context: Tensor):
        return (self.first if int(t[0]) >= self.last else self.second)(x, t, context)


class Judge:
    """What networks of one host ("teacher" or "openmoji") are measured with; folder: for results and what they share.

    prompts: every so many-th concept's plain name is drawn, from noises that depend on the concept and the round alone.
    """

    def __init__(
        self,
        host: str,
        folder: Path,
        runs: Path,
        models: Path,
        prompts: int,
        steps: int,
        cfg: float = 3.0,
        comfy: str | None = None,
    ):
        self.host = host
        self.folder = folder
        self.steps = steps
        self.cfg = cfg
        self.models = models
        self.runs = runs
        self.glyphs = load_glyphs(runs)
        concepts = self.glyphs.concepts
        self.chosen = [i * len(concepts) // prompts for i in range(min(prompts, len(concepts)))]
        self.encoder = load_text(models / "emoji-text.safetensors")
        self.tokens = Tokens(host_folder(comfy), ids=self.encoder.ids.tolist())
        self.codec = load_codec(models)
        self.classifier = load_classifier(models, [c.code for c in concepts])
        folder.mkdir(parents=True, exist_ok=True)
        self.file = models / f"emoji-{host}.safetensors"
        same_folder(folder, {"prompts": len(self.chosen), "steps": steps, "cfg": cfg, host: fingerprint(self.file)})

    @cached_property
    def whole(self) -> UNet2DConditionModel:
        return load_unet(self.file)

    # Shared by all networks, made once ---------------------------------------------------------------

    def _made(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            write_file(path, make(), {})
        return load_file(path)

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        """x, t, context, v (of the data) and wanted (the host's v) of FIXED inputs, t spread evenly."""

        @torch.no_grad()
        def make() -> dict[str, Tensor]:
            batches = Batches(self.glyphs, load_latents(self.runs, self.glyphs, STYLES[self.host]), self.tokens, 99)
            parts = []
            for i in range(FIXED // 32):
                x0, noise, _, rows = batches(FIXED_STEP + i, 32, False)
                t = (torch.arange(32) * FIXED // 32 + i) * STEPS // FIXED
                x, v = noised(x0, noise, t)
                # Batches leave out the padding at times; samplers never do.
                rows = torch.cat([rows, rows[:, -1:].expand(-1, LENGTH - rows.shape[1])], 1)
                parts.append({"x": x, "t": t, "context": self.encoder(rows), "v": v})
            whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
            return whole | {"wanted": self._predictions(self.whole, whole)}

        return self._made(f"fixed-{self.host}", make)

    @cached_property
    def reference(self) -> Tensor:
        """Features (REFERENCE, 64) of real glyphs after the codec, with the backgrounds the teacher learned from."""

        @torch.no_grad()
        def make() -> dict[str, Tensor]:
            data = load_latents(self.runs, self.glyphs, STYLES[self.host])
            rows = torch.multinomial(
                background_share(data.variants), REFERENCE, replacement=True, generator=seeded(99, 8)
            )
            parts = [self.classifier.features(self.codec.decode(z.float())) for z in data.latents[rows].split(32)]
            return {"features": torch.cat(parts)}

        return self._made(f"glyphs-{self.host}", make)["features"]

    # One network -------------------------------------------------------------------------------------

    @staticmethod
    @torch.no_grad()
    def _predictions(unet: nn.Module, fixed: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [
                unet(fixed["x"][i : i + 32], fixed["t"][i : i + 32], fixed["context"][i : i + 32]).sample
                for i in range(0, len(fixed["t"]), 32)
            ]
        )

    def errors(self, unet: nn.Module) -> dict[str, dict[str, float]]:
        """v-MSE on the fixed inputs: "teacher", to the host's v, and "data", to the data's; each by bins of t."""
        predicted = self._predictions(unet, self.fixed)
        fixed = self.fixed
        return {
            what: by_bins((predicted - fixed[key]).square().mean((1, 2, 3)), fixed["t"])
            for what, key in (("teacher", "wanted"), ("data", "v"))
        }

    def draw(self, name: str, unet: nn.Module, number: int) -> Tensor:
        """Latents (N, 4, 16, 16) of all prompts from the noises of one round."""
        label = f"{name}, round {number}"
        progress = Progress(label, len(self.chosen))
        prompts = [prompt(self.glyphs.concepts[i]) for i in self.chosen]
        # bfloat16 is twice as fast on a CPU; the sampler and the text stay in float32.
        latents = sample_latents(
            copy.deepcopy(unet).bfloat16(),
            self.encoder,
            self.tokens,
            prompts,
            [7000 + 1000 * number + i for i in self.chosen],
            self.steps,
            self.cfg,
            progress=progress,
        )
        progress.end()
        return latents

    def pictures(self, name: str, unet: Callable[[], nn.Module], number: int) -> dict[str, Tensor]:
        """Latents, images (N, 3, 128, 128), features (N, 64) and recognition of one round, drawn once and kept as
        latents.
        """
        latents = self._made(f"{self.host}-{name}-{number}", lambda: {"latents": self.draw(name, unet(), number)})[
            "latents"
        ]
        images = codec_images(self.codec, latents)
        first, five = top_k(self.classifier, images, torch.tensor(self.chosen))
        with torch.no_grad():
            features = torch.cat([self.classifier.features(x) for x in images.split(64)])
        return {"latents": latents, "images": images, "features": features, "top1": first.float(), "top5": five.float()}

    def measure(self, name: str, unet: Callable[[], nn.Module], rounds: int = 1, fixed: bool = True) -> dict:
        """All numbers of one network; what is on disk already is not computed again.

        fixed: whether it is one network at all t, so that fixed inputs say something.
        """
        path = self.folder / f"{self.host}-{name}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        if done.get("rounds") == rounds and "border" in done:
            return done
        found = {"network": name, "host": self.host, "rounds": rounds, "steps": self.steps, "cfg": self.cfg}
        if fixed:
            found["v_mse"] = done.get("v_mse") or self.errors(unet())
        mine = [self.pictures(name, unet, n) for n in range(rounds)]
        its = [self.pictures("whole", lambda: self.whole, n) for n in range(rounds)]
        a, b = ({key: torch.cat([r[key] for r in side]) for key in side[0]} for side in (mine, its))
        found |= {
            "pictures": len(a["images"]),
            "top1": float(a["top1"].mean()),
            "top5": float(a["top5"].mean()),
            "top1_se": standard_error(a["top1"]),
            "kid": kid(a["features"], self.reference),
            "border": float(border(a["images"]).mean()),
            "grad": float(gradient(a["images"]).mean() / gradient(b["images"]).mean()),
        }
        if len(a["images"]) > self.reference.shape[1]:
            # Biased upwards by the number of pictures; fed_glyphs is what as many real glyphs get, or half of them
            # where there are fewer.
            split = min(len(a["images"]), len(self.reference) // 2)
            found |= {
                "fed": frechet(a["features"], self.reference),
                "fed_glyphs": frechet(self.reference[:split], self.reference[split:]),
            }
        if name != "whole":
            quality = psnr(a["images"], b["images"])
            found |= {
                "mse": float((a["images"] - b["images"]).square().mean()),
                "psnr": float(quality.mean()),
                "psnr_se": standard_error(quality),
                "latent_mse": float((a["latents"] - b["latents"]).square().mean()),
                "ssim": float(ssim(a["images"], b["images"]).mean()),
            }
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(path)
        return found


def compare(args: argparse.Namespace) -> None:
    """The products and the original itself, each row below the one before in the picture."""
    torch.set_num_threads(args.threads)
    judge = Judge(args.on, args.out, args.runs, args.family, args.prompts, args.steps, args.cfg, args.comfy)

    def load(path: Path) -> nn.Module:
        return assembled(judge.whole, path)

    for path in args.products:
        open_model(path)  # better asked before the work than after it
    networks = {"whole": lambda: judge.whole} | {named(path): partial(load, path) for path in args.products}
    rows = [judge.measure(name, network, args.rounds) for name, network in networks.items()]
    (args.out / f"evaluation-{args.on}.json").write_text(json.dumps(rows, indent=1) + "\n")
    pictures = [judge.pictures(name, network, 0)["images"] for name, network in networks.items()]
    every = max(1, len(pictures[0]) // SHOWN)
    save_grid(args.out / f"evaluation-{args.on}.png", torch.cat([x[::every][:SHOWN] for x in pictures]), columns=SHOWN)
    for row in rows:
        print(
            " ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row.items()
                if not isinstance(v, dict)
            )
        )


@plain_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.emoji.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("products", type=Path, nargs="*", help="packs and pruned UNets")
    parser.add_argument("--on", choices=tuple(STYLES), default="teacher", help="the network packs are played in")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/emoji"), help="folder of the family's glyphs and latents"
    )
    parser.add_argument("--family", type=Path, default=Path("models/emoji"), help="folder of the family's weights")
    parser.add_argument("--comfy", help="ComfyUI folder, for the CLIP tokeniser")
    parser.add_argument("--prompts", type=int, default=360)
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="noises of each prompt; from 65 pictures in all on there is a Frechet distance",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    compare(args)


if __name__ == "__main__":
    main()
