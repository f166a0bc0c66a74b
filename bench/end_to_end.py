"""A whole picture of the embedded family in ComfyUI, from the prompt to its pixels: few steps against the long run.

    python bootstrap.py bench NAME=end_to_end ARGS="--lora models/loras/emoji-two-steps.safetensors"

Text, sampling and decoding, batch 1, in turn: 20 steps of euler with CFG 3 and the decoder as the host builds it, as
wide everywhere as TAESD; and the steps that the LoRA's metadata ask for, without guidance, on the checkpoint and with a
pack, with the decoder as narrow as it was trained. Goes into bench/results/fewstep.json.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

from asdm_core import few_step
from asdm_core.measure import ratio, time_alternating
from asdm_core.tensor_file import TensorFile
from bench._common import ROOT, add_common_arguments, begin, beside_earlier, command_line, pack_module, record

FAMILY = ROOT / "models" / "emoji"
PROMPT = "a red apple emoji"
LONG = {"steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", type=Path, required=True, help="for few steps, with its settings in its metadata")
    parser.add_argument("--pack", type=Path, default=FAMILY / "emoji-m2.safetensors")
    parser.add_argument("--rounds", type=int, default=9)
    add_common_arguments(parser)
    args, host, _, clock = begin(parser)
    import comfy.sd
    import comfy.utils
    import nodes as stock
    import torch

    apply_pack = pack_module("nodes.apply_pack").apply_pack
    window = pack_module("asdm_core.assignment").Window()
    load = pack_module("nodes.engine.models").load_checkpoint
    model, clip, vae = load(FAMILY / "emoji-teacher.safetensors")
    wide = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(FAMILY / "emoji-vae.safetensors")))
    few = few_step.of_lora(TensorFile(args.lora).metadata)
    if few is None:
        parser.error(f"{args.lora.name} does not say for how many steps it was trained")
    short = {"steps": few.steps, "cfg": few.cfg, "sampler_name": few.sampler, "scheduler": few.scheduler}
    weights = comfy.utils.load_torch_file(str(args.lora), safe_load=True)

    def picture(model, clip, vae, settings):
        with torch.inference_mode():
            conds = [stock.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, "")]
            latent = {"samples": torch.zeros(1, 4, 16, 16)}
            (made,) = stock.common_ksampler(
                model, 0, positive=conds[0], negative=conds[1], latent=latent, **settings, denoise=1.0
            )
            return vae.decode(made["samples"])

    def with_lora():
        """A checkpoint of its own: one that two ways share would have its LoRA put on and taken off at each turn."""
        mine, its_clip, _ = load(FAMILY / "emoji-teacher.safetensors")
        return comfy.sd.load_lora_for_models(mine, its_clip, weights, 1.0, 0.0)

    fast, fast_clip = with_lora()
    packed, packed_clip = with_lora()
    packed = apply_pack(packed, args.pack, args.pack.name, window)
    ways = {
        "20 steps, wide decoder": partial(picture, model, clip, wide, LONG),
        "20 steps": partial(picture, model, clip, vae, LONG),
        f"{few.steps} steps, LoRA": partial(picture, fast, fast_clip, vae, short),
        f"{few.steps} steps, LoRA and M2": partial(picture, packed, packed_clip, vae, short),
    }
    times = time_alternating(ways, args.rounds, warmup=2, clock=clock)
    factors = {name: 1 / ratio(times, name, "20 steps, wide decoder") for name in ways}
    rows = [
        {
            "row": f"end to end: {name}",
            "seconds": statistics.median(seconds),
            "factor": factors[name],
            "all_seconds": seconds,
        }
        for name, seconds in times.items()
    ]
    words = {1: "one_step", 2: "two_steps", 3: "three_steps"}.get(few.steps, f"{few.steps}_steps")
    summary = {
        f"end_to_end_factor_{words}": factors[f"{few.steps} steps, LoRA and M2"],
        f"end_to_end_factor_{words}_lora": factors[f"{few.steps} steps, LoRA"],
        "end_to_end_factor_decoder": factors["20 steps"],
    }
    command = command_line("end_to_end")
    summary, rows = beside_earlier("fewstep", summary, rows, command, lambda row: row["row"])
    record("fewstep", summary, rows, command, host, args.notes)


if __name__ == "__main__":
    main()
