"""`python -m train fit`: what is shared, what is learned, what is written and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from asdm_core import differences, few_step, fit, packs, surgery
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.identity import Checkpoint
from asdm_core.packs import ZERO_SNR_MARKER, Description, open_pack, open_unet
from tests.train.conftest import TINY
from train.encoders import Text
from train.fit import Pair, main, memory
from train.networks import assembled
from train.rollout import table

M2 = Architecture.preset("m2", TINY)
FULL = Architecture.full(TINY)


def random_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(s.shape, generator=generator) / max(1, s.tensor.numel / s.shape[0]) ** 0.5
        for k, s in FULL.keys().items()
    }


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, TINY.family, TINY)
    packs.write_unet(
        tmp_path / "mine.safetensors", random_weights(0), Description("unet", FULL, prediction="v", licence="free")
    )
    units = M2.pack_units()
    tensors = surgery.extract(random_weights(1), M2, units)
    packs.write_pack(tmp_path / "pack.safetensors", tensors, Description("pack", M2, units, licence="free"), None)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    return tmp_path


def to_text(captions):
    return Text(torch.stack([torch.full((7, 32), 0.1 * len(c)) for c in captions]))


def pair(files, pack="pack"):
    checkpoint = open_unet(files / "mine.safetensors")
    return Pair(checkpoint, open_pack(files / f"{pack}.safetensors"), torch.device("cpu"), torch.float32)


def run(files, *more, pack="pack", encoder=to_text):
    named = [str(files / f"{name}.safetensors") for name in ("mine", pack, "fitted")]
    arguments = [*named, "--prompts", str(files / "prompts.txt"), "--size", "128", "--minutes", "0.01", "--cpu"]
    main([*arguments, "--stored", "float32", *more], lambda path: encoder)
    return open_pack(files / "fitted.safetensors")


def test_teacher_and_student_share_all_but_the_units_and_play_what_the_files_say(files):
    both = pair(files)
    shared = {id(p) for p in both.whole.parameters()} & {id(p) for p in both.student.parameters()}
    own = {id(p) for p in both.parameters.values()}
    assert {id(p) for p in both.student.parameters()} == shared | own and not shared & own
    texts, empty = [to_text(["a cat"])], to_text([""])
    teacher, student = both.networks(texts, empty, 128)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([999, 100])
    context = torch.cat([texts[0].states, empty.states])
    by_hand = assembled(both.whole, str(files / "pack.safetensors"))
    with torch.no_grad():
        wanted = by_hand(x, t, context).sample
        assert torch.allclose(student(x, t, [0, fit.EMPTY]), wanted, atol=1e-5)
        assert torch.allclose(teacher(x, t, [0, fit.EMPTY]), both.whole(x, t, context).sample, atol=1e-6)


def test_it_learns_and_writes_a_pack_that_is_bound(files, capsys):
    found = run(files, "--walks", "2", "--steps", "3")
    told = found.description
    whose = Checkpoint.of("mine.safetensors", open_unet(files / "mine.safetensors").tensors, TINY)
    assert told.difference_of == told.made_for == whose and told.licence == "free" and told.units == M2.pack_units()
    assert told.training["fit"]["samples"] >= 4 and told.training["fit"]["steps"] == 3
    said = capsys.readouterr().out
    assert said.index("GiB beside the networks") < said.index("wrote")
    # What was written is what is played: the pack's units, a little further on.
    played = differences.played_in(found, open_unet(files / "mine.safetensors").tensors, "mine").tensors
    before = open_pack(files / "pack.safetensors").tensors
    moved = [float((played[k] - before[k]).abs().max()) for k in before]
    assert 0 < max(moved) < 0.1


def test_a_pack_of_differences_goes_on_from_where_it_was(files):
    description, tensors = differences.to_difference(
        open_pack(files / "pack.safetensors"), open_unet(files / "mine.safetensors").tensors, "mine"
    )
    packs.write_pack(files / "changed.safetensors", tensors, description, None)
    both, other = pair(files), pair(files, "changed")
    assert all(torch.allclose(p, other.parameters[k], atol=1e-6) for k, p in both.parameters.items())


def test_a_difference_of_zero_learns_nothing(files):
    units = M2.pack_units()
    whose = Checkpoint.of("mine", random_weights(0), TINY)
    zero = {k: torch.zeros_like(t) for k, t in surgery.extract(random_weights(0), FULL, units).items()}
    description = Description("pack", FULL, units, difference_of=whose)
    packs.write_pack(files / "zero.safetensors", zero, description, None)
    found = run(files, pack="zero")
    assert not any(t.any() for t in found.tensors.values())


def test_the_memory_of_a_step_is_refused_where_it_is_not_free(files, monkeypatch):
    monkeypatch.setattr("train.fit.free_bytes", lambda device: 1000)
    with pytest.raises(SystemExit, match=r"more than the .* GiB that are free; give fewer --walks"):
        run(files)
    assert not (files / "fitted.safetensors").exists()


def test_long_prompts_have_more_states_than_others(files):
    """And than the empty one; repeated they are the same to attention."""

    def by_length(captions):
        (caption,) = captions
        return Text(torch.full((1, 14 if len(caption) > 9 else 7, 32), 0.1))

    (files / "prompts.txt").write_text("a cat\na very long prompt\n")
    assert run(files, "--walks", "2", encoder=by_length).description.training["fit"]["samples"] > 0


def test_what_was_learned_before_the_numbers_broke_is_kept(files, monkeypatch, capsys):
    step = fit.Fit._step

    def breaks(self, share):
        if self.told.steps == 2:
            student = self.student
            self.student = lambda *args: student(*args) * float("nan")
        step(self, share)

    monkeypatch.setattr(fit.Fit, "_step", breaks)
    with pytest.raises(SystemExit, match="not finite, so the fit ended; what was learned until then is kept"):
        run(files, "--walks", "1", "--minutes", "60")
    kept = open_pack(files / "fitted.safetensors")
    assert kept.description.training["fit"]["samples"] == 2 * 2
    assert all(t.isfinite().all() for t in kept.tensors.values())


@pytest.mark.parametrize("size", [128, 256])
def test_memory_is_foretold(files, size):
    both = pair(files)
    networks = both.networks([to_text(["a"])], to_text([""]), size)
    x, t = torch.zeros(2, 4, size // 8, size // 8), torch.zeros(2, dtype=torch.long)
    real = fit.saved_bytes(lambda: networks[1](x, t, [0, fit.EMPTY]))
    foretold = memory(both, networks, (4, size // 8, size // 8), 3)
    assert foretold - fit.learning_bytes(both.parameters.values()) == pytest.approx(3 * real, rel=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--size", "100"], "--size"),
        (["--walks", "0"], "a fit needs walks"),
        (["--steps", "-1"], "--steps"),
    ],
)
def test_bad_arguments(files, more, message):
    with pytest.raises(SystemExit, match=message):
        run(files, *more)


def test_what_cannot_be_fitted(files):
    cut, _ = surgery.cut(random_weights(0), Architecture.preset("base", TINY))
    packs.write_unet(files / "mine.safetensors", cut, Description("unet", Architecture.preset("base", TINY)))
    with pytest.raises(SystemExit, match="a pruned UNet of tiny; wanted an unpruned one of tiny"):
        run(files)


def test_packs_for_few_steps_are_not_fitted_to_whole_runs(files):
    few = few_step.FewStep(2, "euler", "simple", 1.0, (999, 499))
    loaded = open_pack(files / "pack.safetensors")
    description = replace(loaded.description, training={few_step.KEY: few.to_dict()})
    packs.write_pack(files / "few.safetensors", dict(loaded.tensors), description, None)
    with pytest.raises(SystemExit, match="few.safetensors was trained for a run of few steps"):
        run(files, pack="few")


def test_what_the_checkpoint_predicts_is_told_or_asked_for(files):
    loaded = open_pack(files / "pack.safetensors")
    packs.write_pack(
        files / "eps.safetensors", dict(loaded.tensors), replace(loaded.description, prediction="eps"), None
    )
    with pytest.raises(SystemExit, match="for networks that predict eps, and mine.safetensors predicts v"):
        run(files, pack="eps")
    with pytest.raises(SystemExit, match="--prediction: mine.safetensors says itself that it predicts v"):
        run(files, "--prediction", "eps")
    silent = Description("unet", FULL)
    packs.write_unet(files / "mine.safetensors", random_weights(0), silent, None, {ZERO_SNR_MARKER: torch.zeros(0)})
    with pytest.raises(SystemExit, match="ends in noise alone .* give --prediction v, and a pack for v"):
        run(files)
    assert run(files, "--prediction", "v", "--walks", "1").description.prediction == "v"


def test_the_licences_of_both_files_hold(files):
    loaded = open_pack(files / "pack.safetensors")
    packs.write_pack(
        files / "other.safetensors", dict(loaded.tensors), replace(loaded.description, licence="CC0"), None
    )
    assert run(files, "--walks", "1", pack="other").description.licence == "free AND CC0"


def test_the_solver_of_a_fit_stands_on_the_trainers_table():
    diffusion = fit.Diffusion(torch.linspace(0.99, 0.01, 1000), "v")
    a, s = diffusion.coefficients(torch.tensor([700, -1]))
    wanted = table([700], diffusion.alphas)
    assert torch.allclose(torch.stack([a.flatten(), s.flatten()], 1), wanted, atol=1e-6)
    assert json.dumps(fit.times_of(4, 1000)) == "[999, 749, 499, 249, -1]"
