"""The loop on a narrow network: resumed runs, several processes, what is skipped, and what a run ends in."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from asdm_core.packs import open_pack
from asdm_core.surgery import load_units
from asdm_core.tensor_file import write_file
from tests.train.recipes import CONFIGS, NARROW
from train import criterion, loop, networks
from train.recipe import load
from train.data import Random
from train.criterion import Criterion
from train.loop import learning_rate, train
from train.sharding import accelerator_of

ROOT = CONFIGS.parents[1]


def settings(folder, *changes):
    return load(NARROW, [f"run.folder={folder}", *changes])


def run(folder, *changes):
    recipe = settings(folder, *changes)
    train(recipe, Accelerator(cpu=True))
    return recipe


def newest(folder):
    return max(Path(folder).glob("checkpoint-*.safetensors"))


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_equal(one, two):
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys() and one.name == two.name
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_a_line_of_the_log_that_is_not_whole_is_left_out(tmp_path):
    """A full disk may cut one right after a brace."""
    run(tmp_path, "run.steps=3")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    cut = '{"step": 3, "by_t": {"0-249": {"output": 1}'
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, cut, "{}"]))
    run(tmp_path, "run.steps=4")
    assert [line["step"] for line in log(tmp_path)] == [*[json.loads(line)["step"] for line in lines], 4]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def command(folder, *changes, processes=1):
    start = [sys.executable, "-m"] + (
        ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    )
    sets = [part for change in (f"run.folder={folder}", *changes) for part in ("--set", change)]
    # The order of a sum, and so its last bit, depends on the number of threads: as many as this process has.
    threads = str(max(1, torch.get_num_threads() // processes))
    return subprocess.Popen(
        [*start, "train", str(NARROW), "--cpu", *sets],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# Resuming -------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_equals_an_unbroken_one(unbroken, tmp_path):
    killed = command(tmp_path, "run.steps=100000")
    deadline = time.monotonic() + 1800
    while not list(tmp_path.glob("checkpoint-*.safetensors")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    output, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, output
    (tmp_path / ".checkpoint-00000004-x.part").write_bytes(b"half a file")
    reached = int(newest(tmp_path).stem[-8:])

    # The unbroken run to compare with: as far as this one gets.
    steps = f"run.steps={max(6, reached + 2)}"
    whole = unbroken if steps == "run.steps=6" else tmp_path / "whole"
    if whole != unbroken:
        run(whole, steps)
    run(tmp_path, steps)
    assert_equal(newest(whole), newest(tmp_path))
    assert_products_equal(whole, tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert [line["step"] for line in log(tmp_path)] == [line["step"] for line in log(whole)]


def assert_products_equal(one, two):
    a, b = load_file(one / "narrow.safetensors"), load_file(two / "narrow.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_stopped_between_checkpoints_loses_only_what_came_after(unbroken, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    original = loop._numbers

    def until_five(config, accelerator, step, part):
        if step == 5:
            raise Stop
        return original(config, accelerator, step, part)

    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(loop, "_numbers", until_five)
        run(tmp_path)
    assert newest(tmp_path).stem == "checkpoint-00000004"
    run(tmp_path)
    assert_equal(newest(unbroken), newest(tmp_path))
    again = run(tmp_path)  # a finished run has nothing to do, and writes its product again
    assert again.product.exists() and [line["step"] for line in log(tmp_path)] == [2, 4, 6]


def test_old_checkpoints_go_and_other_settings_are_refused(unbroken):
    assert sorted(p.name for p in unbroken.iterdir()) == [
        "checkpoint-00000004.safetensors",
        "checkpoint-00000006.safetensors",
        "log.jsonl",
        "narrow.md",
        "narrow.safetensors",
    ]
    with pytest.raises(ValueError, match=r"other settings \(optimiser.lr was 0.001 and is 0.1\)"):
        run(unbroken, "optimiser.lr=0.1")
    run(unbroken, "run.keep=5", "run.log_every=1")


def test_a_start_that_was_made_anew_under_its_name_is_another(tmp_path):
    start = tmp_path / "start.safetensors"
    one = run(tmp_path / "one", "run.steps=2").product
    start.write_bytes(one.read_bytes())
    run(tmp_path / "two", f"student.start={start}", "run.steps=2")
    run(tmp_path / "two", f"student.start={start}", "run.steps=4")
    start.write_bytes(run(tmp_path / "three", "run.steps=4").product.read_bytes())
    with pytest.raises(ValueError, match="began with another file as student.start. Choose another name"):
        run(tmp_path / "two", f"student.start={start}", "run.steps=6")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    write_file(tmp_path / "checkpoint-00000004.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="is no checkpoint of a training; move it out of run.folder"):
        run(tmp_path)


def test_half_precision_of_graphics_cards_is_refused_on_a_cpu(tmp_path, monkeypatch):
    there = SimpleNamespace(device=torch.device("cpu"), distributed_type=None)
    monkeypatch.setattr("train.sharding.Accelerator", lambda **_: there)  # of these a process has one kind
    with pytest.raises(ValueError, match="run.precision: fp16 is for graphics cards; on a CPU take bf16 or no"):
        accelerator_of(settings(tmp_path, "run.precision=fp16"), cpu=True)


def test_a_broken_checkpoint_is_left_out_and_the_one_before_it_taken(unbroken, tmp_path, capsys):
    run(tmp_path)
    file = tmp_path / "checkpoint-00000006.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    run(tmp_path, "run.keep=1")
    output = capsys.readouterr().out
    assert "left out: checkpoint-00000006.safetensors" in output and "going on at step 4" in output
    assert_equal(newest(unbroken), newest(tmp_path))
    # What is broken does not stay in the place of what is written after it.
    (tmp_path / "checkpoint-00000100.safetensors").write_bytes(b"")
    run(tmp_path, "run.keep=1", "run.steps=8")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000008.safetensors"]
    newest(tmp_path).write_bytes(b"")
    with pytest.raises(ValueError, match="none of its checkpoints can be read; delete them to start anew"):
        run(tmp_path)


def test_a_checkpoint_that_cannot_be_opened_now_is_not_taken_for_broken(unbroken, tmp_path):
    run(tmp_path)
    file = tmp_path / "checkpoint-00000006.safetensors"
    file.unlink()
    file.mkdir()  # whoever opens it gets an error from the system
    with pytest.raises(OSError):
        run(tmp_path)
    assert (tmp_path / "checkpoint-00000004.safetensors").exists()


# Several processes and parts ------------------------------------------------------------------------


def gradients(folder):
    """AdamW's first moments after the first step: the gradient of the whole batch, times 0.1."""
    return {k: v for k, v in load_file(newest(folder)).items() if k.startswith("exp_avg.")}


ONE_STEP = ("run.steps=1", "optimiser.clip=1e9")


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *ONE_STEP)
    return folder


def assert_same_gradients(one, two):
    # Random networks multiply rounding: in float64 the two agree to 1e-12, in float32 single tensors to 1e-2.
    a, b = (torch.cat([v.flatten() for _, v in sorted(gradients(folder).items())]) for folder in (one, two))
    assert a.shape == b.shape and (a - b).norm() < 0.01 * a.norm()
    for x, y in zip(log(one), log(two), strict=True):
        for name in ("task", "output", "blocks", "mid"):
            assert x[name] == pytest.approx(y[name], rel=1e-4)


def test_two_processes_of_half_a_batch_equal_one(whole_batch, tmp_path):
    process = command(tmp_path, *ONE_STEP, "run.micro_batch=2", processes=2)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    assert_same_gradients(whole_batch, tmp_path)
    assert (tmp_path / "narrow.safetensors").exists() and output.count("wrote") == 1


def test_what_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="run.shard shares a network out among several processes, and there is one"):
        run(tmp_path, "run.shard=true")
    with pytest.raises(ValueError, match="run.shard does not go with fp16"):
        settings(tmp_path, "run.shard=true", "run.precision=fp16")


def test_accumulated_parts_equal_the_whole_batch(whole_batch, tmp_path):
    run(tmp_path, *ONE_STEP, "run.micro_batch=1")
    assert_same_gradients(whole_batch, tmp_path)


def test_recomputed_activations_change_nothing(whole_batch, tmp_path):
    run(tmp_path, *ONE_STEP, "run.checkpoint_gradients=true")
    assert_same_gradients(whole_batch, tmp_path)


# Non-finite losses ----------------------------------------------------------------------------------


@pytest.fixture()
def broken_samples(monkeypatch):
    """Makes some pictures NaN. Without shuffling, step n sees pictures 4 n to 4 n + 3."""

    def breaks(*steps):
        init = Random.__init__

        def broken(self, config):
            init(self, config)
            for step in steps:
                self.latents[4 * step] = float("nan")

        monkeypatch.setattr(Random, "__init__", broken)
        monkeypatch.setattr("train.data.Batches._order", lambda self, epoch: list(range(len(self.source))))

    return breaks


def test_a_step_that_is_not_finite_is_skipped_and_counted(broken_samples, tmp_path):
    broken_samples(1, 2, 4)
    recipe = run(tmp_path, "run.steps=7")
    with safe_open(newest(tmp_path), "pt") as f:
        state = json.loads(f.metadata()["state"])
    assert (state["step"], state["skipped"], state["in_a_row"]) == (7, 3, [])
    tensors = load_file(newest(tmp_path))
    assert all(v.isfinite().all() for v in tensors.values())
    assert {float(v) for k, v in tensors.items() if k.startswith("step.")} == {4}  # updates
    assert log(tmp_path)[-1]["skipped"] == 3 and open_pack(recipe.product).description.training["skipped"] == 3


def test_three_in_a_row_stop_the_run_and_leave_the_last_good_state(broken_samples, tmp_path):
    broken_samples(2, 3, 4)
    with pytest.raises(
        FloatingPointError, match=r"steps 3, 4, 5.*last good state is checkpoint-00000002.*optimiser.lr"
    ):
        run(tmp_path)
    assert all(v.isfinite().all() for v in load_file(newest(tmp_path)).values())


def scaled(**settings):
    """An accelerator with the gradient scaler that fp16 has, which accelerate gives to a GPU alone."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
    return accelerator


def test_a_loss_that_is_not_finite_leaves_the_scaler_of_fp16_ready(broken_samples, tmp_path):
    broken_samples(1, 2, 4)
    accelerator = scaled(init_scale=1024.0)
    train(settings(tmp_path, "run.steps=7"), accelerator)
    assert log(tmp_path)[-1]["skipped"] == 3 and accelerator.scaler.get_scale() == 128
    broken_samples(1, 2, 3)
    with pytest.raises(FloatingPointError, match="steps 2, 3, 4"):
        train(settings(tmp_path / "stops"), scaled(init_scale=1024.0))


def test_the_scaler_of_fp16_goes_on_where_it_was(broken_samples, tmp_path):
    broken_samples(1, 2)
    train(settings(tmp_path, "run.steps=4"), scaled(init_scale=1024.0))
    going_on = scaled(init_scale=1024.0)
    train(settings(tmp_path, "run.steps=6"), going_on)
    assert going_on.scaler.get_scale() == 256
    train(settings(tmp_path, "run.steps=7"), Accelerator(cpu=True))  # a run without one leaves it alone


def test_overflows_while_fp16_finds_its_scale_are_counted_and_do_not_stop_the_run(tmp_path, capsys):
    train(settings(tmp_path), scaled(init_scale=2.0**127, backoff_factor=0.25))
    skipped = log(tmp_path)[-1]["skipped"]
    tensors = load_file(newest(tmp_path))
    assert skipped > loop.BAD_STEPS and capsys.readouterr().out.count("not finite, skipped") == skipped
    assert all(v.isfinite().all() for v in tensors.values())
    assert {float(v) for k, v in tensors.items() if k.startswith("step.")} == {6 - skipped}  # updates


# The whole ------------------------------------------------------------------------------------------


def test_a_run_ends_in_a_pack_that_holds_its_average(unbroken):
    recipe = settings(unbroken)
    opened = open_pack(recipe.product)
    assert opened.description.units == networks.trained_units(recipe) and opened.description.prediction == "v"
    training = opened.description.training
    assert (training["steps"], training["samples"], training["recipe"]) == (6, 24, "narrow")
    assert training["losses"] == {"task": 1, "output": 1, "blocks": 1, "mid": 1} and set(training["final"]) == set(
        training["losses"]
    )
    teacher = networks.load_teacher(recipe)
    student = networks.make_student(teacher, recipe)
    before = {k: v.clone() for k, v in networks.addressed(student, recipe.architecture).items()}
    load_units(student, "diffusers", recipe.architecture, {k: v.float() for k, v in opened.tensors.items()})
    after = networks.addressed(student, recipe.architecture)
    average = load_file(newest(unbroken))
    names = {slot.unit.key(slot.tensor): key for key, slot in recipe.architecture.keys("diffusers").items()}
    for key, value in after.items():
        if key in opened.tensors:
            assert torch.equal(value, average[f"average.{names[key]}"].half().float()), key
        else:
            assert torch.equal(value, before[key]), key
    assert any(not torch.equal(after[k], before[k]) for k in opened.tensors)


def test_the_student_learns(tmp_path):
    # The same four samples again and again: they must be learnt.
    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop, "_numbers", lambda config, accelerator, step, part: range(4))
        run(tmp_path, "run.steps=30", "loss.task=0", "loss.blocks=0", "loss.mid=0")
    lines = log(tmp_path)
    assert lines[-1]["output"] < 0.3 * lines[0]["output"]


def test_losses_of_the_log_are_split_by_t(unbroken):
    for line in log(unbroken):
        assert set(line["by_t"]) <= {"0-249", "250-499", "500-749", "750-999"}
        low, high = (f(v["output"] for v in line["by_t"].values()) for f in (min, max))
        assert low <= line["output"] <= high


def test_no_clipping_is_a_clip_of_nought(tmp_path):
    """One step of AdamW's first moment says what gradient came: a large clip, none and a small one."""
    moments = []
    for clip in ("1e9", "0", "1e-3"):
        folder = tmp_path / clip
        config = load(NARROW, ["run.steps=1", f"optimiser.clip={clip}", f"run.folder={folder}"])
        train(config, Accelerator(cpu=True))
        tensors = load_file(folder / "checkpoint-00000001.safetensors")
        moments.append({k: v for k, v in tensors.items() if k.startswith("exp_avg.")})
    assert all(torch.equal(moments[0][k], moments[1][k]) for k in moments[0])
    assert sum(float(v.square().sum()) for v in moments[2].values()) ** 0.5 == pytest.approx(1e-4, rel=1e-2)


def test_the_rate_is_a_trapezoid():
    recipe = load(NARROW, ["run.steps=100", "optimiser.lr=2.0", "optimiser.warmup=10", "optimiser.cooldown=20"])
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and set(rates[9:81]) == {2.0} and rates[90] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert {learning_rate(load(NARROW, ["optimiser.lr=2.0"]), step) for step in range(6)} == {2.0}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_rate_may_follow_a_cosine_or_another_course(warmup):
    def rates(schedule):
        given = ["run.steps=100", "optimiser.lr=2.0", f"optimiser.warmup={warmup}", f"optimiser.schedule={schedule}"]
        return [learning_rate(load(NARROW, given), step) for step in range(100)]

    def done(step):
        return (step - warmup) / (100 - warmup)

    rising = [2 * step / warmup for step in range(warmup)]
    rest = range(warmup, 100)
    assert rates("cosine") == pytest.approx(rising + [1 + math.cos(math.pi * done(step)) for step in rest])
    assert rates("linear") == pytest.approx(rising + [2 - 2 * done(step) for step in rest])
    assert rates("constant_with_warmup") == pytest.approx(rising + [2.0 for _ in rest])
    assert rates("polynomial")[-1] == pytest.approx(2 - 2 * done(99), abs=1e-5)
    with pytest.raises(ValueError, match="optimiser.cooldown: cosine has its own end"):
        load(NARROW, ["optimiser.schedule=cosine", "optimiser.cooldown=5"])


def test_the_perceptual_loss_rises_and_wants_its_weights(monkeypatch):
    recipe = load(CONFIGS / "sd15-m2.toml", ["loss.perceptual_warmup=4"])
    with pytest.raises(ValueError, match="needs the weights of VGG16, and loss.vgg names no file"):
        Criterion(recipe, torch.device("cpu"))
    monkeypatch.setattr(criterion, "load_vgg", lambda path: torch.nn.Identity())
    its = Criterion(recipe, torch.device("cpu"))
    assert list(its.weights) == ["task", "output", "mid", "perceptual"]
    assert [round(its.factors(step)[3], 6) for step in (0, 1, 3, 9)] == [0.025, 0.05, 0.1, 0.1]
    assert its.factors(0)[:3] == [1, 1, 1]
