"""Two machines, as two calls of accelerate launch that meet at an address and see their run folder under two paths."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.train.recipes import CONFIGS, NARROW
from train.__main__ import lost

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


def test_two_machines_meet_and_train_one_student(tmp_path):
    shared, seen = tmp_path / "shared", tmp_path / "elsewhere"
    shared.mkdir()
    seen.symlink_to(shared)
    port = free_port()
    both = [
        launched(rank, port, folder, "run.steps=2", "run.save_every=1", "run.picture_every=0")
        for rank, folder in enumerate((shared, seen))
    ]
    outputs = [p.communicate(timeout=1500)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert (shared / "narrow.safetensors").exists()
    assert load_file(max(shared.glob("checkpoint-*.safetensors")))
    assert all(output.count("wrote") == 1 for output in outputs)


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
