import copy
import importlib

import pytest
import torch
from safetensors import safe_open

from asdm_core.tensor_file import write_file
from train.emoji import data as family
from train.emoji import teacher
from train.emoji import unet as unets
from train.emoji.data import variants
from train.emoji.latents import load_latents
from train.emoji.teacher import Batches
from train.emoji.text import TextEncoder
from train.emoji.training import Checkpoint, Optimiser, TrainingState
from train.figures import save_curve, save_grid


@pytest.fixture()
def encoder(tokens):
    torch.manual_seed(1)
    return TextEncoder(
        tokens.ids, hidden_size=32, intermediate_size=64, num_hidden_layers=1, max_position_embeddings=16
    )


@pytest.fixture()
def run_training(tiny, encoder, glyphs, data, tokens, settings, monkeypatch):
    monkeypatch.setattr(teacher, "SHOWN", ("pizza",))
    # A sample grid of twenty steps says nothing here and takes the time of the test.
    monkeypatch.setattr(teacher, "sample_images", lambda *args, **kwargs: torch.zeros(1, 3, 8, 8))

    def run(name, stop_at=None):
        torch.manual_seed(2)
        net = unets.build(tiny)
        batches = Batches(glyphs, data, tokens, seed=0)
        if stop_at is not None:
            calls = iter(range(stop_at))

            class Stop(Exception):
                pass

            def interrupted(step, size, pooled):
                if next(calls, None) is None:
                    raise Stop
                return Batches.__call__(batches, step, size, pooled)

            with monkeypatch.context() as m:
                m.setattr(Checkpoint, "due", lambda self: True)
                with pytest.raises(Stop):
                    teacher.train(
                        settings,
                        name,
                        net,
                        copy.deepcopy(encoder),
                        _Wrapped(batches, interrupted),
                        ("noto",),
                        joint=True,
                    )
            return None
        return teacher.train(settings, name, net, copy.deepcopy(encoder), batches, ("noto",), joint=True)

    return run


class _Wrapped:
    def __init__(self, batches, call):
        self.concepts = batches.concepts
        self.tokens = batches.tokens
        self._call = call

    def __call__(self, *args):
        return self._call(*args)


def test_a_resumed_run_equals_an_unbroken_one(run_training, settings):
    net, text, run = run_training("unbroken")
    run_training("broken", stop_at=3)
    net2, text2, run2 = run_training("broken")
    assert run.step == run2.step == settings.steps and run.samples == run2.samples
    for a, b in ((net, net2), (text, text2)):
        for (key, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert torch.equal(p, q), key
    with (
        safe_open(settings.runs / "unbroken.safetensors", "pt") as f,
        safe_open(settings.runs / "broken.safetensors", "pt") as g,
    ):
        assert set(f.keys()) == set(g.keys())
        for key in f.keys():
            assert torch.equal(f.get_tensor(key), g.get_tensor(key)), key


def test_batches_depend_on_seed_and_step_alone(glyphs, data, tokens):
    one, two = Batches(glyphs, data, tokens, 0), Batches(glyphs, data, tokens, 0)
    one(0, 4, False)
    for a, b in zip(one(7, 4, False), two(7, 4, False), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one(7, 4, False)[1], Batches(glyphs, data, tokens, 1)(7, 4, False)[1])
    assert one(7, 4, True)[0].shape == (4, 4, 8, 8)


def test_the_loss_decreases(tiny, glyphs, data, tokens, encoder):
    torch.manual_seed(0)
    net = unets.build(tiny)
    optimiser = Optimiser(dict(net.named_parameters()))
    batches = Batches(glyphs, data, tokens, 0)
    losses = []
    for _ in range(12):  # the same batch: it must be learnt
        x0, noise, t, rows = batches(0, 4, True)
        loss = teacher.v_loss(net, encoder(rows).detach(), x0, noise, t).mean()
        loss.backward()
        optimiser.step(2e-3)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_rate_is_a_trapezoid_that_ends_at_zero():
    run = TrainingState(minutes=1, total=400)
    rates = []
    while not run.done:
        rates.append(run.rate(1.0))
        run.step += 1
    assert len(rates) == 400 and rates[0] < 0.1 and rates[200] == 1 and rates[-1] < 0.02
    assert max(rates) == 1


def test_a_time_box_ends_and_its_cooldown_survives_resuming(tmp_path):
    parameters = {"p": torch.nn.Parameter(torch.zeros(2))}
    optimiser = Optimiser(parameters)
    run = TrainingState(minutes=1)
    while not run.done and run.step < 1000:
        run.rate(1.0)
        run.step, run.seconds = run.step + 1, run.seconds + 0.5
        run._recent = [0.5] * 20
    assert 115 <= run.step <= 121
    Checkpoint(tmp_path / "c.safetensors").save(optimiser, run)
    back = Checkpoint(tmp_path / "c.safetensors").load(optimiser, TrainingState(minutes=1))
    assert (back.cooldown_from, back.cooldown_steps, back.step) == (
        run.cooldown_from,
        run.cooldown_steps,
        run.step,
    ) and back.done


def test_a_gradient_that_is_not_finite_stops_the_run():
    p = torch.nn.Parameter(torch.zeros(2))
    optimiser = Optimiser({"p": p})
    p.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="step 0"):
        optimiser.step(1e-3)
    assert torch.equal(optimiser.master["p"], torch.zeros(2))


def test_bfloat16_networks_learn_in_float32():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimiser = Optimiser({"p": p}, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        optimiser.step(1e-4)  # each step is lost in bfloat16
    assert optimiser.master["p"].max() < 1 - 2.5e-4
    assert torch.equal(p.detach(), optimiser.master["p"].bfloat16())


def test_pictures_are_written(tmp_path):
    save_grid(tmp_path / "g.png", torch.rand(5, 3, 8, 8), columns=3)
    save_curve(tmp_path / "c.png", [(i, i, float(i), 1.0 / (i + 1)) for i in range(20)], "test")
    assert {p.name for p in tmp_path.iterdir()} == {"g.png", "c.png"}


def test_half_of_the_pictures_drawn_are_on_white(glyphs, data, tokens):
    batches = Batches(glyphs, data, tokens, 0)
    white = sum(float(p) for p, v in zip(batches.share, data.variants, strict=True) if v.background == "white")
    assert abs(white - 0.5) < 1e-5 and abs(float(batches.share.sum()) - 1) < 1e-5


def test_cached_latents_serve_fewer_copies_and_say_what_is_missing(glyphs, tmp_path):
    count = len(variants(glyphs.concepts, ("noto",), copies=2))
    assert count == 2 * len(variants(glyphs.concepts, ("noto",)))
    latents = torch.randn(count, 4, 16, 16).half()
    write_file(tmp_path / "latents-noto.safetensors", {"latents": latents}, {"copies": "2"})
    assert torch.equal(load_latents(tmp_path, glyphs, ("noto",)).latents, latents[: count // 2])
    assert load_latents(tmp_path, glyphs, ("noto",), 2).variants == variants(glyphs.concepts, ("noto",), copies=2)
    with pytest.raises(ValueError, match="holds 2 copies of each picture and 3 were asked for"):
        load_latents(tmp_path, glyphs, ("noto",), 3)
    write_file(tmp_path / "latents-noto.safetensors", {"latents": latents[1:]}, {"copies": "2"})
    with pytest.raises(ValueError, match="not what the glyphs make"):
        load_latents(tmp_path, glyphs, ("noto",))


@pytest.mark.parametrize(
    "script", ["data", "codec", "latents", "classifier", "teacher", "finetune", "cache", "evaluate"]
)
def test_scripts_end_in_one_line_where_a_file_is_missing(script, tmp_path, monkeypatch):
    module = importlib.import_module(f"train.emoji.{script}")
    monkeypatch.setattr(family, "fetch", lambda *_: (_ for _ in ()).throw(ValueError("the names are missing")))
    monkeypatch.setattr(
        "sys.argv",
        [script, "--runs", str(tmp_path), "--models", str(tmp_path), "--threads", str(torch.get_num_threads())],
    )
    with pytest.raises(SystemExit, match="missing") as found:
        module.main()
    assert isinstance(found.value.code, str)
