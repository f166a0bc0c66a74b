"""Fit Pack within the host: what is learned, what stays as it was, and what is refused."""

import dataclasses
import json
import sys
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import pytest
import small
import torch
from in_host import module, node_classes

SD = small.SD
fit_pack, fitting = module("nodes.fit_pack"), module("nodes.engine.fitting")
differences, identity, packs = module("asdm_core.differences"), module("asdm_core.identity"), small.packs
tensor_file = module("asdm_core.tensor_file")
core = module("asdm_core.fit")
unpatched = module("nodes.engine.unpatched")
M2 = small.Architecture.preset("m2", SD)


class Clip:
    """As the host's CLIP answers; long prompts have more states."""

    def tokenize(self, text):
        return text

    def encode_from_tokens(self, text, return_pooled=False):
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        return torch.randn(1, 14 if len(text) > 20 else 7, 48, generator=generator), None


class Vae:
    def decode(self, latents):
        return latents[:, :3].movedim(1, -1).sigmoid().repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture(autouse=True)
def by_steps(monkeypatch):
    """A minute is sixty steps, however fast the machine is."""
    monkeypatch.setattr(fit_pack.Fitting, "clock", lambda self: float(self.fit.told.steps))


@pytest.fixture(scope="module")
def loaded(folder):
    with torch.inference_mode():  # as nodes load it
        return small.model(folder)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded


@pytest.fixture
def folder_of_packs(tmp_path, monkeypatch):
    node_classes()
    monkeypatch.setattr(fit_pack.folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    return tmp_path


def run(model, path, monkeypatch, learning=40, **given):
    """The node, on a pack file; returns MODEL, name of the file, comparison."""
    monkeypatch.setattr(fit_pack.files, "pack_path", lambda name: path)
    monkeypatch.setattr(fit_pack.comparison, "view", lambda *_: {})
    settings = {
        "clip": Clip(),
        "vae": Vae(),
        "pack_name": path.name,
        "prompts": "a cat\n\n a very long prompt about a dog \na bird",
        "minutes": learning / 60,
        "width": 128,
        "height": 128,
        "filename_prefix": "fitted",
        "cfg": 3.0,
        "batch": 2,
        "learning_rate": 2e-3,
        "seed": 0,
    }
    with torch.inference_mode():
        return node_classes()["ASDMFitPack"].execute(model=model, **settings | given).args


def test_a_pack_for_runs_of_few_steps_is_shown_in_so_many(model, m2, folder_of_packs, monkeypatch):
    drawn, draw = [], fit_pack.fit.draw
    monkeypatch.setattr(fit_pack.fit, "draw", lambda *args: drawn.append(args[4]) or draw(*args))
    _, name, _ = run(model, m2, monkeypatch, learning=2, steps=3)
    assert set(drawn) == {3}
    assert packs.open_pack(folder_of_packs / name).description.training["fit"]["steps"] == 3
    drawn.clear()
    run(model, m2, monkeypatch, learning=2)
    assert set(drawn) == {fit_pack.STEPS}


def weights_of(model):
    return {k: v.clone() for k, v in model.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def like(model, samples, **more):
    return small.difference(small.sample(model, **more), samples)


def test_the_pack_comes_nearer_and_the_model_stays(model, m2, plain_samples, folder_of_packs, monkeypatch):
    before = weights_of(model)
    started = small.with_pack(model, m2)
    (played, name, picture) = run(model, m2, monkeypatch, learning=25, learning_rate=4e-3)
    assert same(before, weights_of(model)) and torch.equal(small.sample(model), plain_samples)
    assert name == "fitted_00001.safetensors" and picture.shape[0] == 1
    assert like(played, plain_samples) < 0.8 * like(started, plain_samples)
    told = packs.open_pack(folder_of_packs / name).description
    assert told.units == M2.pack_units() and told.training["fit"]["samples"] == 25 * 4
    assert unpatched.plays(model, told.made_for) and told.difference_of == told.made_for
    assert not comfy.model_management.in_training


def test_a_pack_that_lacks_nothing_learns_nothing(model, folder, folder_of_packs, monkeypatch):
    """Student and teacher are one, LoRA included, so every error is exactly 0."""
    full, units = small.Architecture.full(SD), M2.pack_units()
    zero = {k: torch.zeros_like(t) for k, t in small.surgery.extract(small.weights(SD), full, units).items()}
    path = folder / "zero.safetensors"
    teacher = identity.Checkpoint.of("teacher", small.weights(SD), SD)
    packs.write_pack(path, zero, packs.Description("pack", full, units, difference_of=teacher), None)
    with_lora = small.add_lora(model, small.lora())
    losses = []
    monkeypatch.setattr(fit_pack, "say_progress", losses.append)
    (_, name, _) = run(with_lora, path, monkeypatch, learning=5)
    assert any("difference 0.0000" in text for text in losses)
    assert not any(t.any() for t in packs.open_pack(folder_of_packs / name).tensors.values())


def test_loras_are_learned_with_and_act_as_on_the_checkpoint(model, m2, folder_of_packs, monkeypatch):
    """At a learning rate of next to nothing, what is kept is what was there: the pack as Apply Pack plays it."""
    with_lora = small.add_lora(model, small.lora())
    (played, name, _) = run(with_lora, m2, monkeypatch, learning=1, learning_rate=1e-7)
    wanted = small.sample(small.with_pack(with_lora, m2))
    assert like(played, wanted) < 0.01 < like(small.with_pack(model, m2), wanted)
    path = folder_of_packs / name
    assert like(small.with_pack(model, path), small.sample(small.with_pack(model, m2))) < 0.01


def test_bypass_loras_are_learned_with_as_others(model, m2, folder_of_packs, monkeypatch):
    lora, before = small.lora(), weights_of(model)
    bypassed = small.comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    own = small.sample(bypassed)
    (played, name, _) = run(bypassed, m2, monkeypatch, learning=1, learning_rate=1e-7)
    assert like(played, small.sample(small.with_pack(bypassed, m2))) < 0.01
    taught = {}
    for kind, teacher in (("plain", model), ("bypass", bypassed), ("weights", small.add_lora(model, lora))):
        with fitting.learning():
            copy = fitting.Copy(teacher, packs.open_pack(m2))
            x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            context = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                taught[kind] = copy.unet(x, torch.tensor([500.0]), context, None, transformer_options={})
            copy.close()
    assert torch.equal(taught["bypass"], taught["weights"])
    assert small.difference(taught["bypass"], taught["plain"]) > 0.1
    assert same(before, weights_of(model)) and torch.equal(small.sample(bypassed), own)


@pytest.mark.parametrize("form", ["comfy_quant", "scaled_fp8"])
def test_a_quantised_checkpoint_is_fitted_to(m2, folder_of_packs, monkeypatch, form):
    held, numbers = small.quantised(small.weights(SD), form)
    with torch.inference_mode():
        model = small.comfy.sd.load_diffusion_model_state_dict(dict(held))
    again = small.comfy.sd.load_diffusion_model_state_dict
    model.cached_patcher_init = (lambda disable_dynamic=False: again(dict(held), disable_dynamic=disable_dynamic), ())
    (played, name, _) = run(model, m2, monkeypatch, learning=1, learning_rate=1e-7)
    kept = packs.open_pack(folder_of_packs / name).tensors
    for key, weight in small.surgery.extract(small.weights(SD, 1), M2, M2.pack_units()).items():
        assert torch.allclose(kept[key].float(), weight - numbers[key], rtol=1e-3, atol=1e-3), key
    assert like(played, small.sample(small.with_pack(model, m2))) < 0.01


def test_cancel_keeps_what_was_learned(model, m2, folder_of_packs, monkeypatch):
    calls = []

    def interrupt():
        calls.extend([1] * (sys._getframe(1).f_code.co_name == "_each"))  # the host asks while it loads, too
        if len(calls) == 7:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(fit_pack.comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    before = weights_of(model)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, m2, monkeypatch)
    monkeypatch.undo()
    (path,) = folder_of_packs.glob("*.safetensors")
    assert packs.open_pack(path).description.training["fit"]["samples"] == 7 * 4
    assert same(before, weights_of(model)) and not comfy.model_management.in_training


def test_memory_is_said_and_refused(model, m2, folder_of_packs, monkeypatch):
    said = []
    monkeypatch.setattr(fit_pack, "say_progress", said.append)
    run(model, m2, monkeypatch, learning=1)
    assert "GiB beside the model" in said[0]
    free = comfy.model_management.get_free_memory
    sizes = iter([2**40] * 8)
    monkeypatch.setattr(fitting, "check_copy", lambda model: None)
    monkeypatch.setattr(
        fit_pack.comfy.model_management,
        "get_free_memory",
        lambda *args, **more: 1000 if _caller() == "make_room" else free(*args, **more),
    )
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"needs .* GiB beside the model.*Make width and height smaller"):
        run(model, m2, monkeypatch)
    assert next(sizes) and same(before, weights_of(model)) and not comfy.model_management.in_training


def _caller():
    return sys._getframe(2).f_code.co_name


def test_a_copy_that_does_not_fit_is_refused(model, m2, folder_of_packs, monkeypatch):
    monkeypatch.setattr(fitting.comfy.model_management, "get_free_memory", lambda *_: 1000)
    with pytest.raises(ValueError, match="works on a copy of this MODEL's network"):
        run(model, m2, monkeypatch)


@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a very long prompt about a dog"]])
def test_memory_is_foretold(model, m2, prompts):
    """From small states to those as large as SD1.5's, whatever the attention of this machine keeps."""
    with fitting.learning():
        texts = fitting.Texts(Clip(), prompts)
        texts.prepare(model, 512, 384)
        copy = fitting.Copy(model, packs.open_pack(m2))
        student = copy.network(copy.student, texts)
        x, t = torch.zeros(2, 4, 48, 64), torch.zeros(2)
        real = core.saved_bytes(lambda: student(x, t, [0, core.EMPTY]))
        beside = core.learning_bytes(copy.parameters.values())
        foretold = copy.memory(student, (4, 48, 64), 3) - beside
        copy.close()
    assert foretold == pytest.approx(3 * real, rel=0.2)


def test_measured_memory_is_what_autograd_keeps():
    layer = torch.nn.Linear(10, 20)
    x = torch.zeros(5, 10)
    kept = core.saved_bytes(lambda: layer(layer.weight.new_zeros(5, 10) + x).exp())
    assert kept == 5 * 20 * 4 + 5 * 10 * 4  # the result of exp, and the input of the layer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": " \n "}, "one a line, and none came"),
        ({"filename_prefix": "there/is/none"}, "there is no folder"),
        ({"filename_prefix": "../up"}, "filename_prefix is the beginning of a file's name in models/asdm_packs"),
        ({"filename_prefix": "/tmp/up"}, "or in a folder there; got /tmp/up"),
        ({"filename_prefix": " "}, "Write one such as fitted"),
    ],
)
def test_bad_input(model, m2, folder_of_packs, monkeypatch, given, message):
    with pytest.raises(ValueError, match=message):
        run(model, m2, monkeypatch, **given)


def test_the_name_has_its_folder(model, m2, folder_of_packs, monkeypatch):
    (folder_of_packs / "mine").mkdir()
    (_, name, _) = run(model, m2, monkeypatch, learning=1, filename_prefix="mine/fitted")
    assert name == str(Path("mine", "fitted_00001.safetensors")) and (folder_of_packs / name).is_file()


def test_what_cannot_be_fitted(model, folder, m2, folder_of_packs, monkeypatch):
    pruned = small.models.load_unet(small.write_unet(folder / "pruned.safetensors", cut="down.0-2.1, up.1-3.1"))
    with pytest.raises(ValueError, match="pruned UNet.*Connect the unpruned checkpoint"):
        run(pruned, m2, monkeypatch)
    nowhere = model.clone()
    nowhere.cached_patcher_init = None
    with pytest.raises(ValueError, match="cannot be read a second time"):
        run(nowhere, m2, monkeypatch)
    lcm = model.clone()

    class Lcm(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
        pass

    lcm.add_object_patch("model_sampling", Lcm(model.model.model_config))
    with pytest.raises(ValueError, match="predict the noise or v"):
        run(lcm, m2, monkeypatch)
    few = {"few_step": {"steps": 2, "sampler": "ddim", "scheduler": "simple", "cfg": 1.0, "times": [999, 499]}}
    tensors = dict(packs.open_pack(m2).tensors)
    two_steps = folder / "two-steps.safetensors"
    packs.write_pack(two_steps, tensors, packs.Description("pack", M2, M2.pack_units(), training=few), None)
    with pytest.raises(ValueError, match="trained for a run of few steps.*any number of steps"):
        run(model, two_steps, monkeypatch)
    other = folder / "v.safetensors"
    packs.write_pack(other, tensors, packs.Description("pack", M2, M2.pack_units(), prediction="v"), None)
    with pytest.raises(ValueError, match="for networks that predict v, and this MODEL predicts eps. Choose a pack for"):
        run(model, other, monkeypatch)
    with torch.inference_mode():
        config = dataclasses.replace(SD, in_channels=8)
        editing = small.models.load_unet(small.write_unet(folder / "editing.safetensors", config))
    with pytest.raises(ValueError, match="for inpainting or editing"):
        run(editing, m2, monkeypatch)


@pytest.mark.sweep(0)
def test_sdxl(folder, folder_of_packs, monkeypatch):
    class Wide(Clip):
        def encode_from_tokens(self, text, return_pooled=False):
            return super().encode_from_tokens(text)[0], torch.full((1, 1280), 0.1 * len(text))

    with torch.inference_mode():
        model = small.model(folder, small.SDXL)
    path = small.write_pack(folder / "xl.safetensors", small.SDXL, preset="koala-700m", seed=1)
    own = small.sample(model, small.SDXL)
    (played, name, _) = run(model, path, monkeypatch, learning=8, clip=Wide())
    assert like(played, own, config=small.SDXL) < like(small.with_pack(model, path), own, config=small.SDXL)
    assert json.loads(tensor_file.read_header(folder_of_packs / name).metadata["asdm"])["format"] == 3
