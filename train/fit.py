"""Fit a pack to a checkpoint, from prompts alone (asdm_core/fit.py).

    python -m train fit my-finetune.safetensors my-pack.safetensors fitted.safetensors --prompts prompts.txt

The result is a pack of differences from this checkpoint, bound to it. A pack of differences (`python -m asdm_core
to-difference`) begins nearer to its goal than one of whole units.
Ctrl-C keeps what was learned until then. `python -m train.emoji fit ...` does it with the emoji family's text encoder.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from asdm_core import differences, fit
from asdm_core.addresses import walk
from asdm_core.architecture import Architecture
from asdm_core.identity import Checkpoint
from asdm_core.few_step import of_pack
from asdm_core.packs import PREDICTIONS, Description, Loaded, licence_of, open_pack, open_unet, write_pack
from asdm_core.tensor_file import check_output
from asdm_core.surgery import ADDRESSED, Form, convert, cut_diffusers, load_units, modules

from . import schedules
from .attention import BmmAttention
from .sections import PRECISIONS
from .encoders import Text, ToText, alike, conditions, load_text
from .networks import DTYPES, set_attention
from .progress import Progress, plain_errors
from .show import predictor
from .sources import read_prompts

Encoder = Callable[[Path], ToText]  # a checkpoint's file -> its text encoder


class Pair:
    """A checkpoint in full, and the same network with a pack's units in it: they share all other modules."""

    def __init__(
        self, checkpoint: Loaded, pack: Loaded, device: torch.device, half: torch.dtype, prediction: str | None = None
    ):
        """prediction: of a checkpoint that does not say it; None: as the pack says, and eps where neither does."""
        architecture = pack.description.architecture
        config = checkpoint.description.architecture.config
        name = checkpoint.path.name
        if checkpoint.description.architecture.cut or config != architecture.config:
            raise ValueError(
                f"{name} is {'a pruned ' if checkpoint.description.architecture.cut else 'a '}UNet of {config.family}; "
                f"wanted an unpruned one of {architecture.config.family}, which {pack.path.name} is for"
            )
        if not pack.description.units or pack.description.condconv or pack.description.gri:
            raise ValueError(f"{pack.path.name} has experts or gains; a fit is for packs that play units alone")
        if of_pack(pack.description.training) is not None:
            raise ValueError(
                f"{pack.path.name} was trained for a run of few steps, and a fit teaches what a whole run makes. Give "
                "a pack for any number of steps"
            )
        said, wanted = checkpoint.description.prediction, pack.description.prediction
        if said and prediction and said != prediction:
            raise ValueError(f"--prediction: {name} says itself that it predicts {said}; leave it out")
        its = said or prediction
        if its and wanted and its != wanted:
            raise ValueError(
                f"{pack.path.name} is a pack for networks that predict {wanted}, and {name} predicts {its}. Give a "
                f"pack for {its}"
            )
        self.prediction = its or wanted or "eps"
        self.checkpoint, self.pack, self.device, self.half = checkpoint, pack, device, half
        self.architecture = architecture
        self.whole = whole_network(checkpoint)
        units = set(pack.description.units)
        places = modules(self.whole, architecture, "diffusers")
        apart = {*units, *architecture.cut}
        shared = {id(part): part for a, unit in places.items() if a not in apart for part in unit.modules()}
        for module in (self.whole.time_proj, self.whole.time_embedding, getattr(self.whole, "add_embedding", None)):
            shared |= {id(part): part for part in module.modules()} if module is not None else {}
        self.student: UNet2DConditionModel = copy.deepcopy(self.whole, dict(shared))
        cut_diffusers(self.student, architecture)
        played = differences.played_in(pack, checkpoint.tensors, name)
        load_units(
            self.student,
            "diffusers",
            architecture,
            {k: played.tensors[k].float() for k in pack.description.unit_keys},
        )
        for unet in (self.whole, self.student):
            unet.requires_grad_(False).eval()
        nn.Module.to(self.whole, device, half)
        own = modules(self.student, architecture, "diffusers")
        self.parameters: dict[str, nn.Parameter] = {}
        for unit in walk(config):
            if unit.address in units:
                module = nn.Module.to(own[unit.address], device, torch.float32).requires_grad_(True)
                names = {unit.key(t, "diffusers"): unit.key(t) for t in unit.tensors}
                path = unit.path("diffusers")
                self.parameters |= {names[f"{path}.{k}"]: p for k, p in module.named_parameters()}
        for unet in (self.whole, self.student):
            if device.type == "cpu":
                set_attention(unet, BmmAttention())
        where = fit.levels(architecture)
        self.taps = fit.Taps({a: places[a] for a in where}, {a: own[a] for a in where})

    def networks(self, texts: Sequence[Text], empty: Text, size: int) -> tuple[fit.Network, fit.Network]:
        """Teacher and student on prompts, by number. texts: (1, L, D) each."""

        def network(unet: UNet2DConditionModel) -> fit.Network:
            predict = predictor(unet, self.half)

            def call(x: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
                chosen = [empty if n == fit.EMPTY else texts[n] for n in prompts]
                states = torch.cat([c.states for c in chosen]).to(self.device)
                pooled = [c.pooled for c in chosen if c.pooled is not None]
                added = conditions(Text(states, torch.cat(pooled)), empty, 1, size, self.device) if pooled else None
                with torch.autocast(self.device.type, self.half, enabled=self.half != torch.float32):
                    return predict(x, t, states, added)

            return call

        return network(self.whole), network(self.student)

    def fitted(self, training: Mapping) -> tuple[Description, dict[str, Tensor]]:
        """The pack that was learned: differences from this checkpoint."""
        weights = self.checkpoint.tensors
        whose = Checkpoint.of(self.checkpoint.path.name, weights, self.architecture.config)
        before = self.pack.description
        description = replace(
            before,
            difference_of=whose,
            made_for=whose,
            carry=None,
            prediction=self.prediction,
            licence=licence_of(self.checkpoint.description.licence, before.licence),
            training={**before.training, "fit": dict(training)},
        )
        return description, {k: p.detach().cpu() - weights[k].float() for k, p in self.parameters.items()}


def whole_network(checkpoint: Loaded) -> UNet2DConditionModel:
    """The unpruned network in a file, float32."""
    architecture = checkpoint.description.architecture
    unet = UNet2DConditionModel.from_config(architecture.config.to_diffusers() | {"sample_size": 64})
    names = convert(
        dict(checkpoint.tensors), Architecture.full(architecture.config), ADDRESSED, Form("diffusers", "addressed")
    )
    unet.load_state_dict({k: v.float() for k, v in names.items()})
    return unet


def memory(pair: Pair, networks: tuple[fit.Network, fit.Network], shape: tuple[int, int, int], walks: int) -> int:
    """Bytes that learning takes beside the networks; a forward is measured on small states."""
    channels, height, width = shape
    t = torch.zeros(2, dtype=torch.long, device=pair.device)

    def forward(side: int) -> Tensor:
        return networks[1](torch.zeros(2, channels, side, side, device=pair.device), t, [0, fit.EMPTY])

    return walks * fit.foretold_bytes(forward, height, width) + fit.learning_bytes(pair.parameters.values())


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


@plain_errors
def main(arguments: Sequence[str] | None = None, encoder: Encoder | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the file or the diffusers folder of an unpruned UNet")
    parser.add_argument("pack", help="a pack that plays units, absolute or as differences")
    parser.add_argument("output", help="a new .safetensors file")
    parser.add_argument("--prompts", required=True, help="a text file with a prompt in each line")
    parser.add_argument("--minutes", type=float, default=10.0, help="of learning")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures, in pixels")
    parser.add_argument("--encoders", default="", help="where the text encoder is; the checkpoint itself if not given")
    parser.add_argument("--tokenizer", default="", help="folder of CLIP's vocabulary")
    parser.add_argument("--walks", type=int, default=fit.Settings.walks, help="states in a batch")
    parser.add_argument("--guidance", type=float, default=fit.Settings.guidance, help="CFG of the runs it is for")
    parser.add_argument("--steps", type=int, default=0, help="of the runs it is for; 0: of any, 3 to 8 while it learns")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="what the checkpoint predicts, where no file says it")
    parser.add_argument("--lr", type=float, default=fit.Settings.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=[p for p in PRECISIONS if p != "fp16"], default="no")
    parser.add_argument("--stored", choices=DTYPES, default="float16")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument(
        "--cpu-time", action="store_true", help="minutes of this process on a CPU, for a machine that has other work"
    )
    args = parser.parse_args(arguments)
    check_output(args.output)
    if not args.minutes > 0:
        raise ValueError(f"--minutes: wanted a number above 0, got {args.minutes:g}")
    if args.size < 64 or args.size % 64:
        raise ValueError(f"--size: wanted a multiple of 64, got {args.size}")
    if args.steps < 0:
        raise ValueError(f"--steps: wanted 0 or more, got {args.steps}")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if args.cpu_time and device.type != "cpu":
        raise ValueError("--cpu-time: what runs on a GPU takes no time of the CPU; give --cpu as well, or leave it out")
    settings = fit.Settings(
        walks=args.walks, steps=fit.walks_for(args.steps), guidance=args.guidance, lr=args.lr, seed=args.seed
    )
    prompts = read_prompts(args.prompts)
    files = open_unet(args.checkpoint), open_pack(args.pack)
    pair = Pair(*files, device, PRECISIONS[args.precision], args.prediction)
    schedule = schedules.read_schedule(args.checkpoint)
    if schedule.zero_snr and pair.prediction == "eps":
        raise ValueError(
            f"{files[0].path.name} ends in noise alone (zero terminal SNR), where the noise says nothing of the "
            "picture; such models predict v: give --prediction v, and a pack for v"
        )
    diffusion = fit.Diffusion(schedule.alphas, pair.prediction)
    where = Path(args.encoders or args.checkpoint)
    to_text = encoder(where) if encoder else load_text(where, args.tokenizer)
    encoded = [to_text([prompt]).on_cpu() for prompt in ("", *prompts)]
    lengths = alike([text.states for text in encoded])  # long prompts have several times as many
    empty, *texts = (Text(states, text.pooled) for states, text in zip(lengths, encoded, strict=True))
    side = args.size // 8
    shape = (pair.architecture.config.in_channels, side, side)
    networks = pair.networks(texts, empty, args.size)
    needed, there = memory(pair, networks, shape, settings.walks), free_bytes(device)
    print(f"fitting {len(pair.pack.description.units)} units takes {needed / 2**30:.1f} GiB beside the networks")
    if needed > there:
        raise ValueError(
            f"that is more than the {there / 2**30:.1f} GiB that are free; give fewer --walks (now {settings.walks}) "
            "or a smaller --size"
        )
    learning = fit.Fit(*networks, pair.taps, pair.parameters, diffusion, shape, len(prompts), settings)
    progress, ended = Progress("fit", 100), ""
    try:
        learning.run(
            60 * args.minutes,
            time.process_time if args.cpu_time else time.perf_counter,
            lambda told: progress.show(int(100 * told.share), f"loss {told.loss:.4f}, {told.samples} samples"),
        )
    except KeyboardInterrupt:
        print("\nstopped; what was learned is kept")
    except FloatingPointError as error:
        ended = str(error)
    except torch.cuda.OutOfMemoryError:
        ended = f"memory ran out; give fewer --walks (now {settings.walks}) or a smaller --size"
    told = learning.told
    progress.end()
    if ended and not told.samples:
        raise ValueError(ended)
    training = {"minutes": round(args.minutes * told.share, 2), "samples": told.samples, "lr": args.lr}
    training |= {"guidance": args.guidance, "steps": args.steps, "seed": args.seed}
    description, tensors = pair.fitted(training)
    write_pack(args.output, tensors, description, DTYPES[args.stored])
    print(f"wrote {args.output}: for {pair.checkpoint.path.name}, from {told.samples} samples")
    if ended:
        raise ValueError(ended)
