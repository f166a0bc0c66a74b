"""A pack from the teacher: cut it, then train the kept units of the cut blocks against its output.

    python -m train.emoji.distill --preset m2 --minutes 10

Everything the pack does not play stays the teacher's and frozen, so that the pack fits any finetune.
"""

from __future__ import annotations

import argparse
import copy
import json
import time

import torch
from torch import Tensor, nn

from asdm_core.architecture import Architecture
from asdm_core.packs import Description, write_pack
from asdm_core.surgery import cut_diffusers, extract, modules

from ..metrics import by_bins
from ..stages import assembled
from .data import load_glyphs
from .diffusion import STEPS, noised
from .latents import load_latents
from .teacher import LICENCE, TEACHER_STYLES, Batches, add_unet_arguments, provenance
from .text import Tokens, host_folder, load_text
from .training import Checkpoint, Optimiser, Progress, Run, add_common_arguments, save_curve, start
from .unet import CONFIG, load_unet

FIXED_STEP = 10**9  # steps of the fixed measuring set lie far beyond any training step


def student_of(teacher: nn.Module, architecture: Architecture) -> nn.Module:
    """A copy of the teacher with the cut units cut; only the units the pack plays can be trained."""
    student = copy.deepcopy(teacher)
    cut_diffusers(student, architecture)
    student.requires_grad_(False)
    parts = modules(student, architecture, "diffusers")
    for address in architecture.pack_units():
        parts[address].requires_grad_(True)
    return student


def addressed_units(student: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of the units the pack plays, under addressed LDM names, float32."""
    live = dict(student.named_parameters())
    sd = {slot.unit.key(slot.tensor): live[key].detach().float() for key, slot in architecture.keys("diffusers").items()}
    return extract(sd, architecture, architecture.pack_units())


@torch.no_grad()
def v_mse(student: nn.Module, teacher: nn.Module, context_of, batches: Batches, count: int = 640, bins: int = 4) -> dict:
    """Squared difference of v between two networks on a fixed set of (picture, caption, noise, t), by bins of t.

    The steps t are spread evenly, unlike in training. Returns {"all": .., "0-249": .., ...}.
    """
    errors, times = [], []
    for i in range(count // 32):
        x0, noise, _, rows = batches(FIXED_STEP + i, 32, False)
        t = torch.arange(i, STEPS, STEPS / 32).long()[:32].clamp(max=STEPS - 1)
        x, _ = noised(x0, noise, t)
        context = context_of(rows)
        errors.append((student(x, t, context).sample.float() - teacher(x, t, context).sample.float()).square().mean((1, 2, 3)))
        times.append(t)
    return {name: round(value, 5) for name, value in by_bins(torch.cat(errors), torch.cat(times), STEPS, bins).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_unet_arguments(parser)
    parser.add_argument("--preset", default="m2", help="a preset of asdm_core.architecture: m1, m2, m3, base ...")
    parser.set_defaults(lr=5e-4, batch=32, ema=0.998)
    args = parser.parse_args()
    start(args)
    torch.manual_seed(args.seed)
    glyphs = load_glyphs(args.runs)
    encoder = load_text(args.models / "emoji-text.safetensors").to(args.device).requires_grad_(False)
    batches = Batches(glyphs, load_latents(args.runs, glyphs, TEACHER_STYLES),
                      Tokens(host_folder(args.host), ids=encoder.ids.tolist()), args.seed + 2)
    teacher = load_unet(args.models / "emoji-teacher.safetensors").requires_grad_(False)
    architecture = Architecture.preset(args.preset, CONFIG)
    best = student_of(teacher, architecture)
    before = v_mse(best, teacher, encoder, batches)
    print(f"{args.preset}: trains {architecture.own_params / 1e6:.2f} of {architecture.params / 1e6:.2f} M parameters, "
          f"v-MSE to the teacher {before}")

    student = copy.deepcopy(best).to(args.device, torch.bfloat16)
    fast_teacher = copy.deepcopy(teacher).to(args.device, torch.bfloat16)
    names = [k for k, p in student.named_parameters() if p.requires_grad]
    live, exact = dict(student.named_parameters()), dict(best.named_parameters())
    optimiser = Optimiser({k: live[k] for k in names}, weight_decay=0.0, ema=args.ema)
    with torch.no_grad():
        for k in names:
            optimiser.master[k].copy_(exact[k])
            optimiser.average[k].copy_(exact[k])
    checkpoint = Checkpoint(args.runs / f"{args.preset}.safetensors")
    run = Run(args.minutes, args.steps)
    if not args.fresh:
        run = checkpoint.load(optimiser, run)
    progress = Progress(args.preset)
    while not run.done:
        began = time.perf_counter()
        x0, noise, t, rows = (part.to(args.device) for part in batches(run.step, args.batch, False))
        x, _ = noised(x0, noise, t)
        x = x.bfloat16()
        with torch.no_grad():
            context = encoder(rows).bfloat16()
            wanted = fast_teacher(x, t, context).sample.float()
        loss = (student(x, t, context).sample.float() - wanted).square().mean()
        loss.backward()
        optimiser.step(run.rate(args.lr))
        run.advance(args.batch, float(loss.detach()), began)
        progress.show(run.step, f"loss {float(loss.detach()):.4f}, {run.samples} samples, {run.status()}")
        if checkpoint.due():
            checkpoint.save(optimiser, run)
            save_curve(args.runs / f"{args.preset}-loss.png", run.curve, args.preset, "v-MSE to the teacher")
    progress.end()
    checkpoint.save(optimiser, run)
    save_curve(args.runs / f"{args.preset}-loss.png", run.curve, args.preset, "v-MSE to the teacher")

    optimiser.averaged(best)
    path = args.models / f"emoji-{args.preset}.safetensors"
    training = provenance(args, run) | {"from": "emoji-teacher.safetensors", "loss": "output v-MSE", "v_mse_cut": before}
    description = Description("pack", architecture, architecture.pack_units(), prediction="v", licence=LICENCE, training=training)
    write_pack(path, addressed_units(best, architecture), description, "int8")
    after = v_mse(assembled(teacher, path), teacher, encoder, batches)
    print(f"wrote {path.name}; v-MSE to the teacher {json.dumps(after)}")


if __name__ == "__main__":
    main()
