"""What other packs and odd files do beside asdm: one small scenario with one number for each kind of fault.

    python bootstrap.py bench NAME=neighbours [ARGS="--before ../asdm-at-an-older-commit"]

--before: the folder of an older checkout, in which the same scenarios run. They know asdm by its nodes alone, so they
run with any version of it: `git worktree add ../older COMMIT` makes such a folder. The embedded family samples pictures
of 16 x 16 latents; stand-ins do to the host what the packs do that each kind was found with. A scenario that ends in an
error tells it in place of its number.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench._common import ROOT, command_line, record, start_host

RIGHT: dict[str, tuple[str, str]] = {}  # scenario -> (what is counted, what is right)
SCENARIOS: dict[str, Callable[[Beside], float]] = {}


def kind(counted: str, right: str):
    """Registers a scenario: what its number is, and what it should be."""

    def register(scenario: Callable[[Beside], float]):
        SCENARIOS[scenario.__name__] = scenario
        RIGHT[scenario.__name__] = counted, right
        return scenario

    return register


class Beside:
    """The nodes of a checkout in the host of this process, and the MODELs of its embedded family."""

    def __init__(self, pack: Path, folder: Path):
        import folder_paths

        spec = importlib.util.spec_from_file_location(
            "asdm_beside", pack / "__init__.py", submodule_search_locations=[str(pack)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)

        async def load():
            extension = await module.comfy_entrypoint()
            try:
                await extension.on_load()
            except AttributeError:  # what it registers with the server, which is not here
                pass
            return {node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}

        self.nodes = asyncio.run(load())
        self.folder, self.unets = folder, Path(folder_paths.get_folder_paths("diffusion_models")[0])
        self.said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda entry: self.said.append(entry.getMessage())  # type: ignore[assignment]
        logging.getLogger().addHandler(handler)
        self.teacher, clip, _ = self.call("ASDMCheckpointLoader", ckpt_name="emoji-teacher.safetensors")
        self.other = self.call("ASDMCheckpointLoader", ckpt_name="emoji-openmoji.safetensors")[0]
        self.positive, self.negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("red apple", "")
        )

    def call(self, node_id: str, **inputs):
        return self.nodes[node_id].execute(**inputs).args

    def inheriting(self, model, preset: str = "balanced", **more):
        given = {"preset": {"preset": preset, **more}, "memory_limit_mb": 0, "keep_on_cpu": False}
        return self.call("ASDMFeatureInheritance", model=model, **given)[0]

    def packed(self, model, start: float = 0.0, end: float = 1.0):
        window = {"start_percent": start, "end_percent": end, "strength": 1.0}
        return self.call("ASDMApplyPack", model=model, pack_name="emoji-m2.safetensors", **window)[0]

    def switched(self, first, second):
        at = {"switch_at": 0.5, "unit": "share of steps", "crossfade_steps": 0}
        return self.call("ASDMSwitchUNet", model_first=first, model_second=second, **at)[0]

    def regional(self, model):
        given = {"window": 4, "pool": 2, "stages": 2, "shifted": False, "start_percent": 0.0, "end_percent": 1.0}
        return self.call("ASDMGRIAttention", model=model, **given)[0]

    def sample(self, model, steps: int = 8, batch: int = 1, size: int = 16, **more):
        import comfy.sample
        import torch

        latent = torch.zeros(batch, 4, size, size)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        given = {"disable_pbar": True, "seed": 1, **more}
        conds = self.positive, self.negative
        return comfy.sample.sample(model, noise, steps, 4.0, "euler", "normal", *conds, latent, **given)

    def words(self) -> int:
        """How many warnings of asdm's have come since the last call."""
        found = [text for text in self.said if text.startswith("asdm: ")]
        self.said.clear()
        return len(set(found))


def off(a, b) -> float:
    """Root of the mean square of the difference, relative to that of b."""
    return float((a - b).norm() / b.norm())


# 1. Wrong picture, nothing said --------------------------------------------------------------------


@kind("error with windows that move, less that with still ones (RMS of the worst frame)", "0")
def moving_windows(beside: Beside) -> float:
    import comfy.samplers
    import torch

    frames, length = 4, 2

    def windowed(model, moving: bool):
        seen = {"step": -1, "sigma": None}

        def calc(args):
            x, sigma, options = args["input"], args["sigma"], dict(args["model_options"])
            options.pop("sampler_calc_cond_batch_function")
            seen["step"] += float(sigma[0]) != seen["sigma"]
            seen["sigma"] = float(sigma[0])
            outs = [torch.zeros_like(x) for _ in args["conds"]]
            for start in range(0, frames, length):
                at = [(i + start + seen["step"] * moving) % frames for i in range(length)]
                parts = comfy.samplers.calc_cond_batch(args["model"], args["conds"], x[at], sigma[at], options)
                for out, part in zip(outs, parts, strict=True):
                    out[at] = part
            return outs

        clone = model.clone()
        clone.set_model_sampler_calc_cond_batch_function(calc)
        return clone

    full = beside.sample(beside.teacher, batch=frames)
    errors = []
    for moving in (False, True):
        found = beside.sample(windowed(beside.inheriting(beside.teacher), moving), batch=frames)
        errors.append(float(((found - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).max()))
    return errors[1] - errors[0]


@kind("error of balanced inheritance with a pack from .25 to .75 of 20 steps (RMS)", "as low as can be")
def forecast_through_another_cast(beside: Beside) -> float:
    packed = beside.packed(beside.teacher, 0.25, 0.75)
    return off(beside.sample(beside.inheriting(packed), steps=20), beside.sample(packed, steps=20))


@kind("calls of another pack's module, of 8 that are right, behind Switch UNet", "8")
def injected_into_the_second_model(beside: Beside) -> float:
    import torch
    from comfy.model_patcher import CoreModelPatcher, PatcherInjection

    class Motion(torch.nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, h):
            Motion.calls += 1
            return h * (1 + 0.05 * self.weight)

    def moving(model):
        clone = model.clone()
        extra = CoreModelPatcher(Motion(), load_device=model.load_device, offload_device=model.offload_device)
        clone.set_additional_models("theirs", [extra])

        def inject(patcher):
            for found in patcher.get_additional_models_with_key("theirs"):
                patcher.model.diffusion_model.input_blocks[1].append(found.model)

        def eject(patcher):
            block = patcher.model.diffusion_model.input_blocks[1]
            for i in reversed([i for i, layer in enumerate(block) if isinstance(layer, Motion)]):
                block.pop(i)

        clone.set_injections("theirs", [PatcherInjection(inject, eject)])
        return clone

    beside.sample(beside.switched(moving(beside.teacher), moving(beside.other)), steps=8)
    return Motion.calls


@kind("warnings where another pack patches the forward of a layer that a pack plays", "1, or the patch acts")
def patches_on_layers_a_pack_plays(beside: Beside) -> float:
    model = beside.teacher.clone()
    layer = model.model.diffusion_model.output_blocks[3][0]
    forward = layer.forward
    model.add_object_patch("diffusion_model.output_blocks.3.0.forward", lambda x, emb: 0.5 * forward(x, emb))
    beside.words()
    beside.sample(beside.packed(model))
    return beside.words()


@kind("difference between two runs of one graph that puts another module into the UNet (RMS)", "0")
def a_layer_replaced(beside: Beside) -> float:
    model = beside.teacher.clone()
    twin = copy.deepcopy(model.model.diffusion_model.input_blocks[4][0])
    twin.out_layers[3].weight.data *= 1.7
    model.add_object_patch("diffusion_model.input_blocks.4.0", twin)
    beside.sample(beside.teacher)
    packed = beside.packed(model)
    return off(beside.sample(packed), beside.sample(packed))


@kind("warnings where another node runs the network by a way of its own", "1")
def the_network_run_by_another_node(beside: Beside) -> float:
    model = beside.packed(beside.teacher)

    def itself(_, args):
        base, x, t, c = model.model, args["input"], args["timestep"], args["c"]
        sampling = base.model_sampling
        given = {"context": c["c_crossattn"], "transformer_options": c["transformer_options"]}
        out = base.diffusion_model(sampling.calculate_input(t, x), sampling.timestep(t).float(), **given)
        return sampling.calculate_denoised(t, out.float(), x)

    model.set_model_unet_function_wrapper(itself)
    beside.words()
    beside.sample(model)
    return beside.words()


@kind("warnings where another node writes the wrappers of the MODEL anew", "1")
def wrappers_written_anew(beside: Beside) -> float:
    import comfy.patcher_extension as extension

    model = beside.packed(beside.teacher).clone()
    theirs: dict[str, Any] = {}
    for wrapped in (extension.WrappersMP.OUTER_SAMPLE, extension.WrappersMP.APPLY_MODEL):
        extension.add_wrapper_with_key(
            wrapped, "theirs", lambda executor, *args, **given: executor(*args, **given), theirs, is_model_options=False
        )
    model.wrappers.update(theirs["wrappers"])
    beside.words()
    beside.sample(model)
    return beside.words()


@kind("difference that GRI makes, in a picture too small for it, where another node patches self-attentions (RMS)", "0")
def self_attentions_patched(beside: Beside) -> float:
    from comfy.ldm.modules.attention import BasicTransformerBlock

    model = beside.teacher.clone()
    for name, module in beside.teacher.model.named_modules():
        if type(module) is BasicTransformerBlock:
            forward = module.attn1.forward
            model.add_object_patch(
                f"{name}.attn1.forward", lambda *args, own=forward, **given: 0.2 * own(*args, **given)
            )
    given = {"window": 0, "pool": 0, "stages": 2, "shifted": False, "start_percent": 0.0, "end_percent": 1.0}
    played = beside.call("ASDMGRIAttention", model=model, **given)[0]
    return off(beside.sample(played), beside.sample(model))


@kind("difference that a patch makes which changes nothing, on a second model that is the first with a LoRA (RMS)", "0")
def a_layer_held_on_the_second_model(beside: Beside) -> float:
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(ROOT / "models" / "loras" / "emoji-two-steps.safetensors"), safe_load=True)
    second = comfy.sd.load_lora_for_models(beside.teacher, None, lora, 1.0, 0)[0]
    wanted = beside.sample(beside.switched(beside.teacher, second))
    patched = second.clone()
    for block in (4, 7):
        forward = second.get_model_object(f"diffusion_model.input_blocks.{block}.0.forward")
        patched.add_object_patch(
            f"diffusion_model.input_blocks.{block}.0.forward", lambda *args, own=forward: own(*args)
        )
    return off(beside.sample(beside.switched(beside.teacher, patched)), wanted)


@kind("error that balanced inheritance adds where a node runs the network on another picture as well (RMS)", "0")
def the_network_run_twice(beside: Beside) -> float:
    model = beside.teacher.clone()
    model.add_wrapper_with_key(
        "diffusion_model",
        "theirs",
        lambda executor, x, *args, **given: executor(x + 0.1 * executor(x.flip(-1), *args, **given), *args, **given),
    )
    return off(beside.sample(beside.inheriting(model), steps=20), beside.sample(model, steps=20))


@kind("whether a replaced pack is read again: fingerprints that differ", "1")
def a_file_replaced(beside: Beside) -> float:
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("asdm_packs")[0])
    folder.mkdir(parents=True, exist_ok=True)
    source = ROOT / "models" / "emoji" / "emoji-m2.safetensors"
    target = folder / "replaced.safetensors"
    target.write_bytes(source.read_bytes())
    node = beside.nodes["ASDMApplyPack"]
    given = {"pack_name": target.name, "start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
    before = node.fingerprint_inputs(model=None, **given)
    time.sleep(0.02)
    target.write_bytes(source.read_bytes())
    return float(node.fingerprint_inputs(model=None, **given) != before)


# 2. Nothing gained, or a crash ---------------------------------------------------------------------


@kind("share of resnets that a run of 20 steps leaves out where a pair of samplers is cut", "above 0")
def inheriting_where_samplers_are_cut(beside: Beside) -> float:
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    model = beside.call("ASDMCheckpointLoader", ckpt_name="emoji-tiny-e2.safetensors")[0]
    forward, calls = ResBlock.forward, []

    def counted(self, *args, **given):
        calls.append(1)
        return forward(self, *args, **given)

    ResBlock.forward = counted
    try:
        beside.sample(model, steps=20)
        full = len(calls)
        beside.sample(beside.inheriting(model, "fast"), steps=20)
    finally:
        ResBlock.forward = forward
    return 1 - (len(calls) - full) / full


@kind("errors in a run with GRI where the first attentions attend to the text", "0")
def no_self_attention(beside: Beside) -> float:
    from comfy.ldm.modules.attention import BasicTransformerBlock

    model = beside.teacher.clone()
    beside.words()
    for number, block in enumerate(
        m for m in model.model.diffusion_model.modules() if type(m) is BasicTransformerBlock
    ):
        name = next(n for n, m in model.model.named_modules() if m is block)
        twin = copy.deepcopy(block)
        twin.attn1, twin.disable_self_attn = copy.deepcopy(block.attn2), True
        if number == 0:
            model.add_object_patch(name, twin)
    beside.sample(beside.regional(model))
    return float(sum("another node" in text for text in beside.said))


@kind("entries of the host's list whose MODEL is gone, after a switched run", "0")
def dead_entries(beside: Beside) -> float:
    import gc

    import comfy.model_management as management

    beside.sample(beside.packed(beside.teacher))
    model = beside.switched(beside.teacher, beside.packed(beside.other))
    beside.sample(model)
    del model
    gc.collect()
    return float(sum(bool(e.real_model and e.is_dead()) for e in management.current_loaded_models))


@kind("seconds to draw a comparison with a label of 5,000 letters", "under 2")
def a_long_text(beside: Beside) -> float:
    import torch

    images = {name: torch.zeros(1, 64, 64, 3) for name in "ab"}
    began = time.process_time()
    beside.call("ASDMCompareImages", images=images, labels="W" * 5_000, title="a")
    return time.process_time() - began


# Measuring -----------------------------------------------------------------------------------------


def child(pack: Path) -> None:
    """Run all scenarios with the pack of one checkout, and print what came."""
    with tempfile.TemporaryDirectory() as folder:
        start_host("--use-pytorch-cross-attention", "--base-directory", folder)
        import torch

        torch.set_grad_enabled(False)
        beside = Beside(pack, Path(folder))
        for name, scenario in SCENARIOS.items():
            value: float | str
            try:
                value = round(scenario(beside), 4)
            except Exception as error:
                value = f"{type(error).__name__}: {str(error)[:120]}"
            print(json.dumps({"scenario": name, "value": value}), flush=True)


def measured(packs: list[Path]) -> list[dict[str, float | str]]:
    """The numbers of the scenarios with each of these checkouts, which run at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.neighbours", "--pack", str(pack)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        for pack in packs
    ]
    found = []
    for pack, process in zip(packs, started, strict=True):
        output, _ = process.communicate()
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"scenario"')]
        if process.returncode or len(rows) != len(SCENARIOS):
            raise SystemExit(f"the scenarios did not run with {pack}:\n{output[-4000:]}")
        found.append({row["scenario"]: row["value"] for row in rows})
    return found


def commit_of(pack: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=pack, capture_output=True, text=True)
    return done.stdout.strip() or "no checkout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder of an older checkout")
    parser.add_argument("--pack", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    args = parser.parse_args()
    if args.pack:
        child(args.pack)
        return
    now, *earlier = measured([ROOT, *([args.before.resolve()] if args.before else [])])
    before = earlier[0] if earlier else {}
    rows = [
        {"kind": name, "counted": counted, "right": right, "before": before.get(name), "now": now[name]}
        for name, (counted, right) in RIGHT.items()
    ]
    for row in rows:
        print(f"{row['kind']}: {row['before']} -> {row['now']} (right: {row['right']})")
    notes = "; ".join(filter(None, [f"before: {commit_of(args.before)}" if args.before else "", args.notes]))
    host = Path(os.environ["COMFYUI_PATH"])
    record("neighbours", {"kinds": len(rows)}, rows, command_line("neighbours"), host, notes)


if __name__ == "__main__":
    main()
