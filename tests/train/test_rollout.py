"""Rollout distillation: the target against sampling written otherwise, the bank, who is where, and whole runs."""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from asdm_core import few_step
from asdm_core.packs import open_pack
from asdm_core.tensor_file import TensorFile
from tests.train.recipes import CONFIGS, NARROW
from train import dry_run, losses, networks
from train.recipe import load
from train.data import Random
from train.diffusion import ALPHAS, as_v, coefficients, simple_times
from train.encoders import Text
from train.criterion import Criterion
from train.loop import train
from train.show import Show
from train.lora import file_names, merge_file
from train.sources import Prompts
from train.rollout import Bank, Course, Rollouts, guided_trajectory, landing, rotations, table

CPU = torch.device("cpu")
LORA = ("student.preset=full", "student.trained=none", "lora.rank=4")
ROLLOUT = (
    *(f"loss.{name}=0" for name in ("task", "output", "blocks", "mid")),
    "loss.rollout=1",
    "rollout.steps=[2]",
    "rollout.teacher_steps=4",
    "rollout.window=8",
    "data.caption_dropout=0",
)


def settings(folder, *changes):
    return load(NARROW, [f"run.folder={folder}", *LORA, *ROLLOUT, *changes])


def teacher(x, t, context, added):
    """Some smooth function of everything it is given."""
    a, s = coefficients(t)
    return (s * x - a * x.flip(1)) * (1 + context.mean((1, 2)))[:, None, None, None]


def as_prediction(v, x, a, s, prediction):
    """What a network of this prediction says where it means v."""
    return v if prediction == "v" else s * x + a * v


@pytest.fixture()
def rollouts(tmp_path):
    def make(*changes):
        recipe = settings(tmp_path, *changes)
        return Rollouts(recipe, Bank(recipe, Random(recipe), teacher, CPU), CPU)

    return make


# The formulas ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [(999, 499), (999, 624, 374), (999,), simple_times(8)])
def test_the_target_is_what_ddim_needs_to_land(times):
    """DDIM in Song's form: predict x_0, find the noise, mix them again at the next step's coefficients."""
    g = torch.Generator().manual_seed(0)
    x, wanted = (torch.randn(2, 4, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    cos, sin = (part.double() for part in rotations(table(times)))
    alphas = [*ALPHAS.double()[list(times)].tolist(), 1.0]
    for k, (now, after) in enumerate(zip(alphas, alphas[1:], strict=False)):
        v = landing(x, wanted, cos[k], sin[k])
        x0 = math.sqrt(now) * x - math.sqrt(1 - now) * v
        noise = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        torch.testing.assert_close(math.sqrt(after) * x0 + math.sqrt(1 - after) * noise, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim"])
def test_the_teacher_walks_as_k_diffusion_does(sampler):
    """The same run in k-diffusion's variables, x / a and sigma = s / a, with its DPM-Solver++(2M) and its Euler."""
    times, guidance = simple_times(6), 2.5
    g = torch.Generator().manual_seed(0)
    noise, text = torch.randn(2, 4, 5, 5, generator=g), Text(torch.randn(2, 3, 7, generator=g))
    empty = Text(torch.zeros(1, 3, 7))
    states = guided_trajectory(teacher, noise, text, empty, times, sampler, guidance, "v", 40)
    assert states.shape == (2, 7, 4, 5, 5) and torch.equal(states[:, 0], noise)

    a2 = ALPHAS.double()[list(times)]
    sigmas = [*((1 - a2) / a2).sqrt().tolist(), 0.0]

    def denoised(x, k):
        scaled, t = x / math.sqrt(sigmas[k] ** 2 + 1), torch.full((2,), times[k])
        a, s = coefficients(t)
        out = [teacher(scaled.float(), t, c.states.expand_as(text.states), None) for c in (text, empty)]
        return a * scaled - s * (out[1] + guidance * (out[0] - out[1]))

    x, old = noise.double() * math.sqrt(sigmas[0] ** 2 + 1), None
    for k in range(6):
        x0 = denoised(x, k)
        if sampler == "ddim":
            x = x + (x - x0) / sigmas[k] * (sigmas[k + 1] - sigmas[k])
        elif old is None or sigmas[k + 1] == 0:
            h = math.inf if sigmas[k + 1] == 0 else -math.log(sigmas[k + 1]) + math.log(sigmas[k])
            x = (sigmas[k + 1] / sigmas[k]) * x - math.expm1(-h) * x0
        else:
            h, last = (math.log(sigmas[i] / sigmas[i + 1]) for i in (k, k - 1))
            r = last / h
            x = (sigmas[k + 1] / sigmas[k]) * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old)
        old = x0
        wanted = x / math.sqrt(sigmas[k + 1] ** 2 + 1)
        torch.testing.assert_close(states[:, k + 1].double(), wanted, rtol=1e-4, atol=1e-5)


def test_guidance_alone_is_a_special_case(rollouts):
    """As many steps as the teacher's, DDIM, its own states: the target is the guided v itself."""
    r = rollouts("rollout.steps=[4]", "rollout.sampler=ddim", "rollout.states=teacher", "rollout.guidance=2")
    r.prepare(0)
    batch = r.batch(0, range(4))
    assert batch.t.tolist() == list(simple_times(4))
    empty = r.bank.source.empty.states.expand_as(batch.context)
    mine, its = teacher(batch.x, batch.t, batch.context, None), teacher(batch.x, batch.t, empty, None)
    torch.testing.assert_close(batch.v, its + 2 * (mine - its), rtol=0.02, atol=0.02)  # float16 in the bank


def test_pairs_are_those_of_noise_and_picture(rollouts):
    r = rollouts("rollout.states=pairs")
    r.prepare(3)
    batch = r.batch(3, range(4))
    a, s = coefficients(batch.t)
    torch.testing.assert_close(batch.x, a * batch.x0 + s * batch.noise)
    torch.testing.assert_close(a * batch.x - s * batch.v, batch.x0, rtol=1e-4, atol=1e-5)
    # For one step straight from noise that is what a rollout wants as well, up to the noise left at t = 999.
    one, pairs = (rollouts("rollout.steps=[1]", f"rollout.states={states}") for states in ("own", "pairs"))
    one.prepare(0)
    a, s = coefficients(torch.tensor([999] * 4))
    mine, its = one.batch(0, range(4)), pairs.batch(0, range(4))
    torch.testing.assert_close(a * mine.x - s * mine.v, a * its.x - s * its.v, rtol=1e-3, atol=1e-3)


# Losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_a_student_that_lands_on_the_trajectory_has_no_loss_and_stays_on_it(prediction, rollouts):
    r = rollouts(f"network.prediction={prediction}", "rollout.steps=[4]", "rollout.teacher_steps=8")
    criterion = Criterion(r.config, CPU)
    for step in range(6):
        r.prepare(step)
        batch = r.batch(step, range(4))
        places = [r.course.place(step, i) for i in range(4)]
        states = r.bank([r.course.trajectory(p.walk) for p in places]).states
        on = torch.stack([states[i, 2 * p.k] for i, p in enumerate(places)])
        torch.testing.assert_close(batch.x, on, rtol=1e-3, atol=1e-4)
        a, s = coefficients(batch.t)
        following = torch.stack([states[i, 2 * p.k + 2] for i, p in enumerate(places)])
        cos, sin = rotations(table(simple_times(4)))
        k = [p.k for p in places]
        v = (cos[k][:, None, None, None] * batch.x - following) / sin[k][:, None, None, None]
        said = as_prediction(v, batch.x, a, s, prediction)
        (loss,) = criterion(batch, batch.x, (said, {}), None)
        assert loss.max() < 1e-7
        r.advance(step, range(4), batch.x, as_v(said, batch.x, a, s, prediction))


def test_eps_and_v_agree(rollouts):
    """The same denoiser has the same loss, and moves to the same place, however it says what it means."""
    found = {}
    for prediction in ("v", "eps"):
        r = rollouts(f"network.prediction={prediction}", f"rollout.bank={rollouts().bank.folder}-{prediction}")
        r.bank.config = rollouts().config  # the teacher of this test means v
        r.prepare(1)
        batch = r.batch(1, range(4))
        a, s = coefficients(batch.t)
        v = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(1))
        said = as_prediction(v, batch.x, a, s, prediction)
        loss = Criterion(r.config, CPU)(batch, batch.x, (said, {}), None)[0]
        r.advance(1, range(4), batch.x, as_v(said, batch.x, a, s, prediction))
        found[prediction] = loss, r.x.clone()
    for mine, its in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_landing_error(rollouts):
    r = rollouts()
    r.prepare(0)
    batch = r.batch(0, range(4))
    said = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(2))
    loss = losses.rollout(said, batch.v, batch.weight)
    cos, sin = rotations(table(simple_times(2)))
    k = torch.tensor([r.course.place(0, i).k for i in range(4)])
    x = cos[k][:, None, None, None] * batch.x - sin[k][:, None, None, None] * said
    wanted = cos[k][:, None, None, None] * batch.x - sin[k][:, None, None, None] * batch.v
    torch.testing.assert_close(loss, (x - wanted).square().mean((1, 2, 3)) / (sin[k] * sin.mean()))


def test_a_walk_goes_on_where_its_own_prediction_led(rollouts):
    r = rollouts()
    r.prepare(1)
    first = r.batch(0, range(4))
    v = torch.randn(first.x.shape, generator=torch.Generator().manual_seed(3))
    v[2] = torch.nan
    r.advance(0, range(4), first.x, v)
    second = r.batch(1, range(4))
    a, s = ALPHAS[499].sqrt(), (1 - ALPHAS[499]).sqrt()
    b, u = ALPHAS[999].sqrt(), (1 - ALPHAS[999]).sqrt()
    # Samples 0 and 2 stood at the first of two steps; 1 and 3 at the second, and new walks take their place.
    x0, noise = b * first.x[0] - u * v[0], u * first.x[0] + b * v[0]
    torch.testing.assert_close(second.x[0], a * x0 + s * noise, rtol=1e-4, atol=1e-4)
    assert second.x.isfinite().all() and second.t.tolist() == [499, 999, 499, 999]
    assert torch.equal(second.x[1], second.noise[1])


# Who is where ----------------------------------------------------------------------------------------


def test_every_batch_holds_all_steps_and_every_trajectory_is_walked_as_often():
    recipe = load(NARROW, [*LORA, *ROLLOUT, "rollout.uses=3", "run.steps=60", "rollout.steps=[4,2]", "run.batch=8"])
    course = Course(recipe)
    walks, before = {}, {}
    for step in range(60):
        places = [course.place(step, i) for i in range(8)]
        steps = 4 if step < 30 else 2
        assert Counter(p.k for p in places) == dict.fromkeys(range(steps), 8 // steps)
        for i, p in enumerate(places):
            assert p.steps == steps and p.fresh == (p.k == 0 or step in (0, 30))
            if not p.fresh:
                assert before[i] == (p.walk, p.k - 1)
            before[i] = p.walk, p.k
            assert walks.setdefault(p.walk, i) == i
    # Where a run, or its number of steps, ends, not all samples have begun their last walk.
    assert max(walks) - len(walks) < 2 * 8
    used = Counter(course.trajectory(w) for w in range(24 * 5))
    assert used == dict.fromkeys(range(8 * 5), 3)
    assert [course.trajectory(w) for w in range(24)] != sorted(course.trajectory(w) for w in range(24))


def test_the_bank_grows_as_it_is_needed_and_is_the_same_for_all(tmp_path, rollouts):
    r = rollouts()
    r.prepare(0)
    assert [p.name for p in r.bank.folder.iterdir()] == ["000000.safetensors"]
    again = Bank(settings(tmp_path / "other"), Random(r.config), teacher, CPU)
    again.reach([0, 15])
    assert len(list(again.folder.iterdir())) == 2
    for key, value in load_file(again.path(0)).items():
        assert torch.equal(value, load_file(r.bank.path(0))[key])
    text = again.text(range(2))
    torch.testing.assert_close(again([0, 1]).text.states, text.states, rtol=1e-3, atol=1e-3)
    shared = Bank(
        settings(tmp_path / "third", f"rollout.bank={again.folder}", "rollout.guidance=5"),
        Random(r.config),
        teacher,
        CPU,
    )
    with pytest.raises(ValueError, match="rollout.guidance was 3.0 and is 5.0"):
        shared([0])


@pytest.mark.parametrize("change", ["encoders.clip_skip=2", "encoders.rows=1", "encoders.tokenizer=TOKENIZER"])
def test_a_bank_knows_how_its_prompts_were_read(tmp_path, change):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    prompts = ["data.source=prompts", f"data.path={tmp_path / 'prompts.txt'}"]

    def made_with(*changes):
        config = settings(tmp_path / "run", *prompts, *changes)
        source = Prompts(config, teacher, lambda texts: Text(torch.zeros(len(texts), 7, 32)), CPU)
        return Bank(config, source, teacher, CPU).settings, source.settings

    pairs = zip(made_with(), made_with(change.replace("TOKENIZER", str(tmp_path / "tokenizer"))), strict=True)
    assert all(before != after for before, after in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout.steps=[3]"], "3 does not divide the teacher's 4 steps"),
        (["loss.rollout=0", "loss.output=1"], "go together"),
        (["loss.output=1"], "loss.output: a rollout has nothing to compare"),
        (["rollout.times=[499, 999]"], "wanted descending whole numbers"),
        (["rollout.guidance=0.5"], "at least 1"),
        (["lora.rank=0"], "trains nothing"),
        (["student.trained=all"], "nothing is left for a LoRA"),
        (["run.shard=true"], "does not go with run.shard"),
        (["lora.on=up.9"], "matches no unit"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load(NARROW, [*LORA, *ROLLOUT, *changes])


# Whole runs ------------------------------------------------------------------------------------------


def run(recipe):
    train(recipe, Accelerator(cpu=True))
    return recipe


@pytest.mark.sweep(1)
@pytest.mark.parametrize("changes", [(), ("student.preset=m2", "student.trained=own", "rollout.steps=[4,2]")])
def test_a_broken_off_run_equals_an_unbroken_one(changes, tmp_path):
    whole, broken = (run(settings(tmp_path / name, *changes, "run.keep=9")) for name in ("whole", "broken"))
    for path in broken.folder.glob("checkpoint-*6.safetensors"):
        path.unlink()
    broken.product.unlink(), broken.lora_file.unlink(missing_ok=True)
    for path in broken.folder.glob("bank/*"):
        path.unlink()
    run(settings(tmp_path / "broken", *changes, "run.keep=9"))
    for path in {whole.product, whole.lora_file}:
        mine, its = load_file(path), load_file(broken.folder / path.name)
        assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
    one, two = (load_file(r.folder / "checkpoint-00000006.safetensors") for r in (whole, broken))
    assert torch.equal(one["rollout.x"], two["rollout.x"])


def test_a_student_learns_to_land_and_says_how_it_is_to_be_run(tmp_path):
    changes = ("run.steps=30", "run.batch=8", "run.micro_batch=8", "rollout.uses=20", "optimiser.lr=3e-3")
    recipe = run(settings(tmp_path, *changes))
    log = [json.loads(line)["rollout"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(log[-5:]) < 0.8 * sum(log[:5])
    file = TensorFile(recipe.product)
    assert few_step.of_lora(file.metadata) == few_step.FewStep(2, "euler", "simple", 1.0, (999, 499))
    assert "LoRA" in recipe.product.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "text, said", [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "wanted steps")]
)
def test_a_lora_that_says_no_such_thing_is_refused_in_a_sentence(text, said):
    with pytest.raises(ValueError, match=f"few_step: {said}"):
        few_step.of_lora({few_step.METADATA_KEY: text})


def test_units_and_lora_together_are_a_pack_and_a_lora(tmp_path):
    recipe = run(settings(tmp_path, "student.preset=m2", "student.trained=own", "run.stored=float32"))
    pack, lora = open_pack(recipe.product), TensorFile(recipe.lora_file)
    assert few_step.of_pack(pack.description.training) == few_step.of_lora(lora.metadata)
    assert pack.description.training["lora"] == recipe.lora_file.name
    own = set(networks.trained_units(recipe))
    names, keys = file_names(recipe.network.config), recipe.architecture.keys("diffusers").items()
    modules = {names[key.removesuffix(".weight")]: slot.unit.address for key, slot in keys if len(slot.shape) > 1}
    reached = {modules[key.split(".")[0]] for key in lora}
    assert reached == set(modules.values()) - own and own == set(pack.description.units)
    # Played together: the pack's units as they are, and the LoRA on the rest.
    again = settings(
        tmp_path / "on", "student.preset=m2", f"student.start={recipe.product}", "student.trained=own", "lora.rank=0"
    )
    both = networks.make_student(networks.load_teacher(again), again)
    merge_file(both, recipe.network.config, recipe.lora_file)
    alone = networks.addressed(networks.assembled(networks.load_teacher(recipe), recipe.product), recipe.architecture)
    slots = recipe.architecture.keys()
    differ = {k for k, v in networks.addressed(both, recipe.architecture).items() if not torch.equal(v, alone[k])}
    assert {slots[key].unit.address for key in differ}.isdisjoint(own)
    assert {"stem.conv_in", "stem.time_embed", "mid.0.resnet", "up.0.0.resnet"} <= {
        slots[k].unit.address for k in differ
    }


def test_processes_draw_shares_that_do_not_depend_on_who_is_faster(tmp_path, monkeypatch):
    drawn, waits, source = {0: [], 1: []}, [], Random(settings(tmp_path))
    banks = [Bank(settings(tmp_path), source, teacher, CPU, i, 2, lambda i=i: waits.append(i)) for i in range(2)]
    monkeypatch.setattr(Bank, "_draw", lambda self, n: (drawn[self.process].append(n), self.path(n).touch()))
    for numbers in ([0, 3], [4, 7], [15, 17], [20, 24], [33]):
        for bank in banks:
            bank.reach(numbers)
    assert drawn == {0: [0, 2, 4], 1: [1, 3, 5]} and waits == [0, 1] * 3
    late = Bank(settings(tmp_path), source, teacher, CPU)
    late.reach([60])  # a run that goes on needs nothing of what lies behind it
    assert drawn[0][-1] == 7 and len(drawn[0]) == 4


def test_pictures_on_the_way_are_drawn_as_teacher_and_student_are_run(tmp_path):
    recipe, asked = settings(tmp_path), []

    def predict(x, t, context, added):
        asked.append((int(t[0]), len(x)))
        return teacher(x, t, context, added)

    show = Show(recipe, Random(recipe), predict, lambda latents: latents[:, :3], 1.0, CPU)
    assert asked == [(t, 8) for t in simple_times(4)]  # four captions, guided
    asked.clear()
    assert show.rows(predict).shape[:2] == (2, 4) and asked == [(999, 4), (499, 4)]


@pytest.mark.sweep(0)
def test_two_processes_equal_one(tmp_path):
    """Each walks its own samples; what one does is what both do together, up to the order of sums."""
    changes = ("run.micro_batch=2", "run.stored=float32", "optimiser.ema=0", "run.steps=3")
    one = run(settings(tmp_path / "one", *changes))
    sets = [f"run.folder={tmp_path / 'two'}", *LORA, *ROLLOUT, *changes]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "train", str(NARROW), "--cpu"]
        + [part for change in sets for part in ("--set", change)],
        cwd=CONFIGS.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    mine, its = (load_file(tmp_path / name / "checkpoint-00000003.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(mine["rollout.x"], its["rollout.x"], rtol=1e-3, atol=1e-3)
    assert all(mine["rollout.x"].abs().amax((1, 2, 3)) > 0)
    for key, value in load_file(one.product).items():
        other = load_file(tmp_path / "two" / one.product.name)[key].float()
        torch.testing.assert_close(value.float(), other, rtol=1e-2, atol=1e-3)


def test_the_dry_run_tells_steps_bank_and_files(tmp_path):
    text = dry_run.report(settings(tmp_path), 1)
    assert "2 steps without guidance at t = 999, 499; the host's sampler euler, scheduler simple" in text
    assert "bank: 8 trajectories of 8 forwards" in text and "narrow.safetensors (LoRA)" in text
    assert not list(tmp_path.iterdir())
