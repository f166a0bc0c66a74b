"""Noise schedules: against formulas written out here in double precision, and from the file to the product."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from asdm_core.architecture import Architecture
from asdm_core.packs import Description, describe, write_unet
from asdm_core.tensor_file import TensorFile
from tests.train.recipes import NARROW
from train import networks
from train.recipe import load
from train.diffusion import ALPHAS, ddim, step_weights
from train.criterion import Criterion
from train.loop import train
from train.rollout import Solver
from train.schedules import STANDARD, read_schedule, schedule_of

T = np.arange(1000)


def from_betas(betas):
    return np.cumprod(1 - betas)


def cosine(t):
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def zero_snr(alphas):
    """The last is 0, the first as it was, and what lies between keeps its place between them, in sqrt(a^2)."""
    root = np.sqrt(alphas)
    share = (root - root[-1]) / (root[0] - root[-1])
    return (share * root[0]) ** 2


SD = from_betas((np.sqrt(0.00085) + T / 999 * (np.sqrt(0.012) - np.sqrt(0.00085))) ** 2)
LINEAR = from_betas(0.0001 + T / 999 * (0.02 - 0.0001))
COSINE = from_betas(np.array([min(1 - cosine((t + 1) / 1000) / cosine(t / 1000), 0.999) for t in T]))
CONFIGS = {
    "sd": (STANDARD, SD),
    "linear": ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, LINEAR),
    "nothing said": ({"_class_name": "DDIMScheduler"}, LINEAR),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, COSINE),
    "given": ({"trained_betas": np.linspace(0.001, 0.01, 1000).tolist()}, from_betas(np.linspace(0.001, 0.01, 1000))),
    "zero snr": (STANDARD | {"rescale_betas_zero_snr": True}, zero_snr(SD)),
    "linear, zero snr": ({"rescale_betas_zero_snr": True}, zero_snr(LINEAR)),
}


@pytest.mark.parametrize(("settings", "wanted"), CONFIGS.values(), ids=CONFIGS)
def test_schedules_are_what_their_formulas_say(settings, wanted):
    found = schedule_of(settings)
    np.testing.assert_allclose(found.alphas.double().numpy(), wanted, rtol=2e-4, atol=1e-7)
    assert found.zero_snr == (wanted[-1] == 0) and found.standard == (settings is STANDARD)
    again = schedule_of(json.loads(json.dumps(dict(found.settings))))  # as the metadata of a product keeps it
    assert torch.equal(again.alphas, found.alphas)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500; wanted 1000"),
        ({"beta_schedule": "moon"}, "no noise schedule"),
        ({"beta_start": "a"}, "no noise schedule"),
        ({"trained_betas": [0.1, 0.2]}, "does not rise over 1000 steps"),
        ({"beta_end": -0.5}, "does not rise over 1000 steps"),
        ({"beta_end": float("nan")}, "does not rise over 1000 steps"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler has no noise schedule"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler has no noise schedule"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=f"^here.json: .*{said}"):
        schedule_of(settings, "here.json")


# From the teacher to the product --------------------------------------------------------------------


def write_teacher(path, markers=(), **told):
    recipe = load(NARROW)
    full = Architecture.full(recipe.network.config)
    whole = networks.load_teacher(recipe)
    told = Description("unet", full, prediction="v", **told)
    write_unet(path, networks.addressed(whole, full), told, None, {name: torch.zeros(0) for name in markers})
    return path


def write_folder(path, settings, prediction="v_prediction"):
    (path / "scheduler").mkdir(parents=True)
    config = settings | {"prediction_type": prediction}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (path / "unet").mkdir()
    write_teacher(path / "unet" / "diffusion_pytorch_model.safetensors")
    return path


KINDS = {
    "marker": (lambda p: write_teacher(p / "t.safetensors", ["ztsnr"]), zero_snr(SD)),
    "no marker": (lambda p: write_teacher(p / "t.safetensors"), SD),
    "folder, zero snr": (lambda p: write_folder(p / "t", CONFIGS["zero snr"][0]), zero_snr(SD)),
    "folder, linear": (lambda p: write_folder(p / "t", CONFIGS["linear"][0]), LINEAR),
    "folder, cosine": (lambda p: write_folder(p / "t", CONFIGS["cosine"][0]), COSINE),
    "product": (
        lambda p: write_teacher(p / "t.safetensors", training={"schedule": CONFIGS["linear"][0]}),
        LINEAR,
    ),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("write", "wanted"), KINDS.values(), ids=KINDS)
def test_a_run_is_trained_on_its_teachers_schedule_and_says_so(write, wanted, tmp_path, monkeypatch):
    teacher = write(tmp_path)
    seen = []
    plain = Criterion.__call__

    def spy(self, batch, x, student, its):
        seen.append((batch, x.clone(), student[0].detach(), its[0]))
        return plain(self, batch, x, student, its)

    monkeypatch.setattr(Criterion, "__call__", spy)
    common = [f"network.teacher={teacher}", "run.steps=3", "run.batch=8", "run.micro_batch=8", "run.log_every=1"]
    changes = [*common, "student.preset=base", "loss.mid=0", "loss.output=1", f"run.folder={tmp_path / 'run'}"]
    product = train(load(NARROW, changes), Accelerator(cpu=True))
    losses = [json.loads(line)["task"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for (batch, x, predicted, _), loss in zip(seen, losses, strict=True):
        a2 = torch.from_numpy(wanted)[batch.t][:, None, None, None]
        a, s = a2.sqrt(), (1 - a2).sqrt()
        torch.testing.assert_close(x.double(), a * batch.x0 + s * batch.noise, rtol=1e-3, atol=1e-3)
        v = a * batch.noise - s * batch.x0
        assert loss == pytest.approx(float((predicted - v).square().mean()), rel=2e-3)
    ends_in_noise = wanted[-1] == 0
    assert {k for k, shape in TensorFile(product).shapes.items() if 0 in shape} == (
        {"v_pred", "ztsnr"} if ends_in_noise else {"v_pred"}
    )
    said = describe(TensorFile(product)).training.get("schedule")
    assert (said is None) == (wanted is SD)
    assert torch.equal(read_schedule(str(product)).alphas, load(NARROW, common).network.alphas)
    assert ("zero terminal SNR" in product.with_suffix(".md").read_text()) == ends_in_noise
    # A pack cannot carry markers: it is told in its metadata.
    pack = load(NARROW, [*common, f"run.folder={tmp_path / 'pack'}"])
    pack.folder.mkdir()
    networks.write_product(networks.make_student(networks.load_teacher(pack), pack), pack, {})
    assert describe(TensorFile(pack.product)).training.get("schedule") == said


def test_a_schedule_is_named_where_files_say_nothing(tmp_path):
    teacher = write_teacher(tmp_path / "t.safetensors")
    for name, wanted in (("linear", LINEAR), ("cosine", COSINE), ("zero_snr", zero_snr(SD)), ("scaled_linear", SD)):
        found = load(NARROW, [f"network.teacher={teacher}", f"network.schedule={name}"]).network.alphas
        np.testing.assert_allclose(found.double().numpy(), wanted, rtol=2e-4, atol=1e-7)
    with pytest.raises(ValueError, match="network.schedule: 'zerosnr' is none of .*did you mean 'zero_snr'"):
        load(NARROW, ["network.schedule=zerosnr"])


def test_what_cannot_be_learned_is_refused(tmp_path):
    eps = [f"network.teacher={tmp_path / 't.safetensors'}", "network.prediction=eps"]
    write_teacher(tmp_path / "t.safetensors", ["ztsnr"])
    with pytest.raises(ValueError, match="zero terminal SNR.*set network.prediction = v"):
        _ = load(NARROW, eps).network.alphas
    write_teacher(tmp_path / "e.safetensors", ["edm_mean", "edm_std"])
    with pytest.raises(ValueError, match="e.safetensors was trained on a schedule of EDM"):
        read_schedule(str(tmp_path / "e.safetensors"))
    folder = tmp_path / "f" / "scheduler"
    folder.mkdir(parents=True)
    for text, said in (
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "wanted a JSON object"),
    ):
        (folder / "scheduler_config.json").write_text(text)
        read_schedule.__globals__["_read"].cache_clear()
        with pytest.raises(ValueError, match=said):
            read_schedule(str(tmp_path / "f"))


# Sampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [SD, LINEAR, zero_snr(SD)], ids=["sd", "linear", "zero snr"])
def test_a_perfect_network_draws_the_picture_on_any_schedule(wanted):
    alphas = torch.from_numpy(wanted).float()
    x0 = torch.randn(2, 4, 8, 8)

    def predict_v(x, t, context):
        a2 = alphas[t][:, None, None, None]
        noise = (x - a2.sqrt() * x0) / (1 - a2).sqrt()
        return a2.sqrt() * noise - (1 - a2).sqrt() * x0

    out = ddim(predict_v, torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 1), torch.zeros(1, 1, 1), 5, 1.0, alphas)
    torch.testing.assert_close(out, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim"])
def test_steps_from_noise_alone_are_the_limit_of_those_from_almost_noise(sampler):
    """v of pictures from a normal distribution of width 2, which bends the way and is known in closed form."""

    def walk(alphas):
        solver = Solver((999, 700, 400, 100), sampler, alphas)
        x = torch.linspace(-2, 2, 9)
        for k in range(4):
            a, s = (float(c) for c in solver.points[k])
            x0 = a * 4 * x / (4 * a * a + s * s)
            x = solver.step(k, x, (a * x - x0) / s)
        return x

    alphas = torch.from_numpy(zero_snr(SD))
    found = walk(alphas)
    last = []
    for rest in (1e-6, 1e-24, 1e-96, 1e-300):  # it comes nearer with the logarithm
        almost = alphas.clone()
        almost[-1] = rest
        last.append(float((walk(almost) - found).abs().max()))
    assert found.isfinite().all() and last == sorted(last, reverse=True) and last[-1] < 0.01


def test_times_are_drawn_on_any_schedule():
    for wanted in (SD, LINEAR, zero_snr(SD)):
        p = step_weights(torch.from_numpy(wanted))
        snr = wanted[:-1] / (1 - wanted[:-1])
        share = np.append(np.minimum(snr, 1) / snr, 1.0)
        np.testing.assert_allclose(p.numpy(), 0.8 * share / share.sum() + 0.2 / 1000, rtol=1e-6)
    assert torch.equal(step_weights(), step_weights(ALPHAS))
