"""Several processes as accelerate is configured, and two machines, as two calls of accelerate launch that meet at an
address and see their run folder under two paths.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from asdm_core.tensor_file import TensorFile
from tests.train.recipes import CONFIGS, NARROW
from tests.train.test_sources import models, recipe, write_shards  # noqa: F401
from train import networks, sharding
from train.__main__ import lost
from train.recipe import load
from train.loop import train

ROOT = CONFIGS.parents[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(rank, port, folder, *changes):
    sets = [
        part
        for change in (f"run.folder={folder}", "run.micro_batch=1", "run.batch=2", *changes)
        for part in ("--set", change)
    ]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            *("-m", "train", str(NARROW), "--cpu", *sets),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# One machine, as accelerate is configured -------------------------------------------------------------

CONFIGURATIONS = {
    "ddp": "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\nnum_machines: 1\n"
    "machine_rank: 0\nnum_processes: 2\n",
    "fsdp2": (ROOT / "train" / "fsdp2.yaml").read_text("utf-8"),
}


def newest(folder):
    return max(folder.glob("checkpoint-*.safetensors"))


def joined(file, prefix=""):
    return torch.cat([v.flatten().double() for k, v in sorted(load_file(file).items()) if k.startswith(prefix)])


def assert_near(one, two, within):
    """Checkpoints and products of the same run, whose sums were made in another order.

    AdamW moves every weight by about as much, also where its gradient is nothing but rounding, and there in any
    direction: weights count in proportion to their gradients.
    """
    name = newest(one).name
    start = one / "checkpoint-00000001.safetensors"
    for prefix in ("exp_avg.", "exp_avg_sq."):
        a, b = joined(one / name, prefix), joined(two / name, prefix)
        assert (a - b).norm() < within * a.norm()
    gradient = joined(one / name, "exp_avg_sq.").sqrt()
    for prefix in ("weights.", "average."):
        a, b = joined(one / name, prefix), joined(two / name, prefix)
        moved = gradient * (a - joined(start, prefix))
        assert moved.norm() > 0 and (gradient * (a - b)).norm() < within * moved.norm()
    a, b = (joined(folder / "narrow.safetensors") for folder in (one, two))
    assert (a - b).abs().max() <= 2 * 3 * 1.01e-5  # twice the way of three steps at this rate


@pytest.mark.sweep(0)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_run_by_accelerates_configuration_ends_as_one_process_does(configuration, models, tmp_path):  # noqa: F811
    """Steps 1 and 3 by one process, step 2 by two with this configuration, on shards that each reads its own of."""
    write_shards(tmp_path / "data", 12, 3)
    drawn = [
        *("data.lanes=4", "run.batch=4", "run.micro_batch=2", "run.save_every=1", "run.keep=3", "optimiser.clip=1e9"),
        *("run.picture_every=2", "samples.steps=2", "network.family=sd15", "run.stored=float32", "optimiser.lr=1e-5"),
    ]

    def settings(folder, steps):
        its = [*drawn, f"run.folder={tmp_path / folder}", f"run.steps={steps}"]
        return recipe("shards", tmp_path / "data", models, *its), its

    def alone(folder, steps):
        train(settings(folder, steps)[0], Accelerator(cpu=True))

    for folder in ("one", "two"):
        alone(folder, 1)
    alone("one", 2)
    file = tmp_path / "accelerate.yaml"
    file.write_text(CONFIGURATIONS[configuration])
    sets = [
        *(f"data.{key}={value}" for key, value in {"source": "shards", "path": tmp_path / "data"}.items()),
        *(f"encoders.models={models}", "data.caption_dropout=0", *settings("two", 2)[1]),
    ]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
            *("--main_process_port", "0", "-m", "train", str(NARROW), "--cpu"),
            *(part for change in sets for part in ("--set", change)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0 and output.count("going on at step 1") == 1 and output.count("wrote") == 1, output
    assert_near(tmp_path / "one", tmp_path / "two", within=0.01)
    assert (tmp_path / "two" / "pictures" / "00000002.png").exists()
    # Both wrote where their shards stand into the one checkpoint, so one process goes on alone.
    states = [json.loads(TensorFile(newest(tmp_path / f)).metadata["state"])["source"] for f in ("one", "two")]
    assert states[0] == states[1] and len(states[0]["places"]) == 4
    for folder in ("one", "two"):
        alone(folder, 3)
    # What is rounding in step 2 has moved weights in other directions, and a network of random weights feels that;
    # pictures that the first one did not see would be far more.
    assert_near(tmp_path / "one", tmp_path / "two", within=0.05)


@pytest.fixture()
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(plugin):
    """The classes that are put together at once with a configuration."""
    config = load(NARROW)
    unet = networks.make_student(networks.load_teacher(config), config)
    state = SimpleNamespace(fsdp_plugin=plugin)
    sharding.shard(unet, SimpleNamespace(device=torch.device("cpu"), state=state))
    assert isinstance(unet, FSDPModule)
    return {type(m).__name__.removeprefix("FSDP") for m in unet.modules() if isinstance(m, FSDPModule)}


def test_the_layers_of_accelerates_configuration_are_shared_out(group, monkeypatch):
    unet = "UNet2DConditionModel"
    assert sharded(None) == {unet, *sharding.LAYERS}
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Transformer2DModel")
    assert sharded(FullyShardedDataParallelPlugin()) == {unet, "Transformer2DModel"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    with pytest.raises(ValueError, match="Could not find the transformer layer class LlamaDecoderLayer"):
        sharded(FullyShardedDataParallelPlugin())
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    assert sharded(FullyShardedDataParallelPlugin()) == {unet}


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**FSDP2, "FSDP_VERSION": "1"}, "has fsdp_version: 1, which this loop does not follow: fsdp_version: 2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "has fsdp_offload_params"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "has fsdp_cpu_ram_efficient_loading"),
        ({**FSDP2, "FSDP_IGNORED_MODULES": "conv_in"}, "has fsdp_ignored_modules"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "has gradient_accumulation_steps, .*: run.batch and"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "has dynamo_config, .*: --set run.compile=inductor"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "has DeepSpeed"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "has parallelism_config"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "says mixed_precision: bf16, the recipe run.precision = no; make"),
        ({**FSDP2, "given": "optimiser.kind=adafactor"}, "run.shard goes with optimiser.kind = adamw"),
    ],
)
def test_what_would_be_followed_in_part_is_refused(environment, message, monkeypatch):
    given = [environment[key] for key in environment if key == "given"]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        sharding.accelerator_of(load(NARROW, given), cpu=True)


def test_sharding_takes_the_place_of_offloading(monkeypatch, capsys):
    """Recipes of large networks offload, and accelerate's configuration says how many cards there are."""
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    accelerator, config = sharding.accelerator_of(load(NARROW, ["run.offload=true"]), cpu=True)
    assert config.run.shard and not config.run.offload
    assert "run.offload is off" in capsys.readouterr().out


# Several machines -------------------------------------------------------------------------------------


def test_two_machines_go_on_together_and_lose_one(tmp_path):
    """From a checkpoint of one process. When one of them is killed the other ends with one line, and what both had
    reached goes on.
    """
    shared, seen = tmp_path / "shared", tmp_path / "elsewhere"
    shared.mkdir()
    seen.symlink_to(shared)
    settings = ("run.micro_batch=1", "run.batch=2", "run.save_every=1", "run.picture_every=0")

    def alone(steps):
        train(load(NARROW, [*settings, f"run.folder={shared}", f"run.steps={steps}"]), Accelerator(cpu=True))

    alone(1)
    (shared / "narrow.safetensors").unlink()
    port = free_port()
    both = [
        launched(rank, port, folder, *settings[2:], "run.steps=1000000") for rank, folder in enumerate((shared, seen))
    ]
    until = time.monotonic() + 1500
    while newest(shared).name == "checkpoint-00000001.safetensors":
        assert time.monotonic() < until and all(p.poll() is None for p in both), [p.communicate()[0] for p in both]
        time.sleep(0.05)
    (worker,) = [p for p in psutil.Process(both[1].pid).children(recursive=True) if str(NARROW) in p.cmdline()]
    worker.kill()
    outputs = [p.communicate(timeout=1500)[0] for p in both]
    assert all(p.returncode for p in both), outputs
    assert outputs[0].count("going on at step 1\n") == 1, outputs[0]  # one of them speaks
    assert outputs[0].count("another process of the run was lost (") == 1, outputs[0]
    assert "the same command goes on from the last checkpoint" in outputs[0]
    reached = int(newest(shared).stem.partition("-")[2])
    assert 1 < reached < 1_000_000 and not (shared / "narrow.safetensors").exists()
    alone(reached + 1)
    assert load_file(newest(shared)) and load_file(shared / "narrow.safetensors")


@pytest.mark.sweep(0)
def test_two_machines_train_one_student_to_its_end(tmp_path):
    port = free_port()
    both = [launched(rank, port, tmp_path, "run.steps=2", "run.picture_every=0") for rank in range(2)]
    outputs = [p.communicate(timeout=1500)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert load_file(tmp_path / "narrow.safetensors") and all(output.count("wrote") == 1 for output in outputs)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3000"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_lost_process_is_told_from_a_fault(error, wanted):
    assert lost(error) == wanted


def test_the_slurm_script_calls_accelerate_launch_on_each_machine(tmp_path):
    """With stand-ins for Slurm's own commands, which run what they are given on two machines at once."""
    for name, text in {
        "scontrol": 'printf "first\\nsecond\\n"',
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'echo "$@"',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **{"SLURM_JOB_NODELIST": "x[1-2]", "SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"},
    }
    sh = shutil.which("sh")
    given = [sh, str(ROOT / "train" / "slurm.sh"), "a recipe.toml", "--set", "run.steps=3"]
    lines = subprocess.run(given, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    for rank, line in enumerate(lines):
        assert line == (
            f"launch --multi_gpu --num_machines 2 --machine_rank {rank} --num_processes 16 --main_process_ip first "
            "--main_process_port 21234 -m train a recipe.toml --set run.steps=3"
        )
    assert len(lines) == 2
    failed = subprocess.run(given, env={"PATH": env["PATH"]}, capture_output=True, text=True)
    assert failed.returncode and "start this with sbatch" in failed.stderr
