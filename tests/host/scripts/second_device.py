"""The techniques on a second device, which the CPU plays (second_device.cpp), against the CPU itself."""

import ctypes
import functools
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import torch

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "second"
GIB = 2**30
STEPS = 6
LITTLE = 64 * 2**20  # bytes that are free where weights must stay on the CPU


def build(library):
    """Compile the device with the compiler of this machine; done once for a torch."""
    if not Path(library).exists():
        torch_folder = Path(torch.__file__).parent
        include = torch_folder / "include"
        part = f"{library}.part"
        flags = [
            "-O1",
            "-fPIC",
            "-shared",
            "-std=c++17",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        ]
        folders = [
            f"-isystem{include}",
            f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-L{torch_folder / 'lib'}",
        ]
        command = [os.environ.get("CXX", "c++"), *flags, *folders, str(SOURCE), "-ltorch_cpu", "-lc10", "-o", part]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(part, library)


def _answer(value, *_, **__):
    return value


def begin(library):
    """Register the device; returns how often something was fetched from it so far."""
    build(library)
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    said = {"is_available": True, "current_device": 0, "device_count": 1, "_is_in_bad_fork": False}
    answers = {name: functools.partial(_answer, value) for name, value in said.items()}
    asked = "manual_seed_all", "synchronize", "empty_cache", "set_rng_state"
    nothing = dict.fromkeys(asked, functools.partial(_answer, None))
    state = {"get_rng_state": lambda *_: torch.get_rng_state()}
    torch._register_device_module(NAME, SimpleNamespace(**answers, **nothing, **state))
    return ctypes.CDLL(str(library)).fetched


@contextmanager
def device(patch, free):
    """The host takes it for its graphics card. free: bytes of its memory."""
    there = torch.device(NAME, 0)
    before = management.get_free_memory, management.get_total_memory

    def asked(own, size):
        def memory(dev=None, *torchs, **torch_too):
            if dev is not None and dev.type == "cpu":
                return own(dev, *torchs, **torch_too)
            return (size, size) if any((*torchs, *torch_too.values())) else size

        return memory

    patch.setattr(management, "cpu_state", management.CPUState.GPU)
    patch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    patch.setattr(management, "get_torch_device", lambda: there)
    patch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: [] if exclude_current else [there])
    patch.setattr(management, "get_free_memory", asked(before[0], free))
    patch.setattr(management, "get_total_memory", asked(before[1], 16 * GIB))
    halves = "should_use_fp16", "should_use_bf16", "supports_fp8_compute"
    for name in ("is_nvidia", "is_amd", "soft_empty_cache", "device_supports_non_blocking", *halves):
        patch.setattr(management, name, lambda *_, **__: False)
    yield
    management.unload_all_models()


def main(library):
    """{technique: [error of the second device against the CPU, the same where weights stay on the CPU, how often
    something was fetched in a run]}.
    """
    import pytest
    import small
    from in_host import module

    SD = small.SD
    folder = Path.cwd()
    inheritance, switch = module("asdm_core.inheritance"), module("nodes.switch_unet")
    pack = small.write_pack(folder / "pack.safetensors", seed=1)
    shallow = small.Architecture.preset("m2", SD).own
    convs = [a for a, conv in small.condconv.convolutions(SD).items() if conv.unit.address in shallow]
    experts = small.write_experts(folder / "experts.safetensors", small.condconv.CondConv(dict.fromkeys(convs, 2)))
    plan = inheritance.deepcache(SD, 1, inheritance.Schedule(interval=2))
    regional, speed_up = module("nodes.engine.regional"), module("nodes.speed_up")
    lora = small.lora()

    def kinds():
        model = small.model(folder)
        second = small.model(folder, seed=2)
        on = small.on_model.with_technique
        return {
            "nothing": model,
            "a pack": small.with_pack(model, pack),
            "a pack for a while": small.with_pack(model, pack, 0.3, 0.7),
            "a pack and a LoRA": small.add_lora(small.with_pack(model, pack), lora),
            "experts": small.with_pack(model, experts),
            "inheritance": small.with_plan(model, plan),
            "inheritance on the CPU": small.with_plan(model, plan, on_cpu=True),
            "GRI": on(model, regional.Regional(8, 8)),
            "Speed Up": on(model, speed_up.SpeedUp("close")),
            "Switch": switch.ASDMSwitchUNet.execute(model, second, 0.5, "share of steps", 0).args[0],
        }

    def drawn(fetched=None):
        found = {}
        for name, model in kinds().items():
            picture = small.sample(model, steps=STEPS).cpu()
            before = fetched() if fetched else 0
            if fetched:  # once more, as in the first run the host writes LoRAs into weights and puts the old ones by
                assert torch.equal(small.sample(model, steps=STEPS).cpu(), picture), name
            found[name] = picture, fetched() - before if fetched else 0
        return found

    wanted = drawn()
    fetched = begin(library)
    with pytest.MonkeyPatch.context() as patch, device(patch, 8 * GIB):
        assert small.model(folder).load_device.type == NAME
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, device=NAME) + torch.ones(2)
        full = drawn(fetched)
    with pytest.MonkeyPatch.context() as patch, device(patch, LITTLE):
        streamed = drawn()
    return {
        name: [small.difference(x, wanted[name][0]), small.difference(streamed[name][0], wanted[name][0]), count]
        for name, (x, count) in full.items()
    }
