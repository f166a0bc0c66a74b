"""Fitting: the solver against the trainer's, the loss by hand, and a small network that is learned."""

import math

import pytest
import torch
from torch import nn

from asdm_core import fit
from asdm_core.architecture import Architecture
from tests.core.narrow import SD
from train.diffusion import ALPHAS, simple_times
from train.rollout import Solver

V = fit.Diffusion(ALPHAS, "v")


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_solver_is_the_trainers(steps):
    torch.manual_seed(0)
    times = simple_times(steps)
    assert fit.times_of(steps, 1000) == [*times, -1]
    solver, x = Solver(times, "dpmpp_2m"), torch.randn(3, 4, 5, 5)
    mine, before, came = x, None, None
    for k, (now, to) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        v = torch.randn(3, 4, 5, 5)
        x = solver.step(k, x, v)
        t, then = torch.full((3,), now), torch.full((3,), to)
        mine, before = V.step(mine, v, t, then, before, came)
        came = t
        assert torch.allclose(mine, x, atol=2e-4)


def test_samples_of_a_batch_stand_at_steps_of_their_own():
    torch.manual_seed(0)
    x, v, before = (torch.randn(3, 4, 5, 5) for _ in range(3))
    t, to, came = torch.tensor([999, 500, 200]), torch.tensor([749, 250, -1]), torch.tensor([-1, 749, 500])
    both, seen = V.step(x, v, t, to, before, came)
    for i in range(3):
        earlier = (before[i : i + 1], came[i : i + 1]) if came[i] >= 0 else (None, None)
        one, x0 = V.step(x[i : i + 1], v[i : i + 1], t[i : i + 1], to[i : i + 1], *earlier)
        assert torch.allclose(one[0], both[i], atol=1e-5) and torch.allclose(x0[0], seen[i])


def test_a_prediction_of_noise_is_the_same_v():
    torch.manual_seed(0)
    x0, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([100, 900])
    a, s = V.coefficients(t)
    x = a * x0 + s * noise
    assert torch.allclose(fit.Diffusion(ALPHAS, "eps").v(noise, x, t), a * noise - s * x0, atol=1e-4)


def test_a_schedule_that_ends_in_noise_alone_is_finite():
    zero = fit.Diffusion(torch.cat([ALPHAS[:-1], torch.zeros(1)]), "v")
    x, v, t = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.tensor([999])
    moved, x0 = zero.step(x, v, t, torch.tensor([500]), None, None)
    assert moved.isfinite().all() and torch.allclose(x0, -v)


def test_the_loss_by_hand():
    v, wanted = torch.zeros(4, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    settings = fit.Settings(guidance=3.0, features=0.5)
    f, g = {"a": torch.ones(4, 2)}, {"a": 2 * torch.ones(4, 2)}
    guided = [-(3 * 1 - 2 * 3), -(3 * 2 - 2 * 4)]
    by_hand = (1 + 4 + 9 + 16) / 4 + sum(e**2 for e in guided) / 2 / 13 + 0.5 * 1 / 4
    assert float(fit.loss_of(v, wanted, f, g, settings)) == pytest.approx(by_hand)


@pytest.mark.parametrize("preset", ["m2", "base", "tiny"])
def test_levels_are_kept_units_in_their_order(preset):
    chosen = Architecture.preset(preset, SD)
    found = fit.levels(chosen)
    order = [u.address for u in chosen.kept]
    assert [a for a in order if a in found] == list(found) and len(found) >= 6
    assert not any(a.startswith("stem") for a in found)


class Small(nn.Module):
    """A denoiser with a state for each prompt."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
        self.inner = nn.Conv2d(4, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 4, 3, padding=1)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)

    def forward(self, x, t, prompts):
        added = self.table[[n + 1 for n in prompts]][:, :, None, None]
        return self.outer(torch.tanh(self.inner(x + added + t[:, None, None, None] / 1000)))


SETTINGS = fit.Settings(walks=4, lr=1e-2, warmup=5)


def a_fit(settings=SETTINGS, student=None):
    teacher, student = Small(0).requires_grad_(False), student or Small(1)
    taps = fit.Taps({"inner": teacher.inner}, {"inner": student.inner})
    parameters = dict(student.named_parameters())
    return fit.Fit(teacher, student, taps, parameters, V, (4, 6, 6), 8, settings), teacher, student


def by_steps(fitting):
    return lambda: float(fitting.told.steps)


def test_a_student_learns_and_its_pictures_come_near():
    fitting, teacher, student = a_fit()
    noise, prompts = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(3)), list(range(8))

    def apart():
        theirs, its = (fit.draw(net, V, noise, prompts, 4, 3.0) for net in (teacher, student))
        return float((theirs - its).square().mean())

    before = apart()
    told = fitting.run(400, by_steps(fitting))
    assert told.steps == 400 and told.samples == 400 * 8
    assert apart() < 0.2 * before
    assert all(p.grad is None for p in student.parameters())


def test_a_student_that_is_the_teacher_stays_to_the_last_bit():
    fitting, _, student = a_fit(student=Small(0))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    losses = []
    fitting.run(10, by_steps(fitting), lambda told: losses.append(told.loss))
    assert losses == [0.0] * 10
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_the_same_seed_gives_the_same_and_another_does_not():
    found = []
    for seed in (0, 0, 1):
        fitting, _, student = a_fit(fit.Settings(walks=2, lr=1e-2, seed=seed))
        fitting.run(8, by_steps(fitting))
        found.append(student.outer.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_whoever_stops_it_finds_the_average():
    fitting, _, student = a_fit()

    def stop(told):
        if told.steps == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitting.run(1000, by_steps(fitting), stop)
    assert all(torch.equal(p, fitting._average[name]) for name, p in student.named_parameters())


def test_a_look_at_the_average_puts_the_weights_back():
    fitting, _, student = a_fit()
    fitting._step(0.0)
    before = student.outer.weight.detach().clone()
    with fitting.averaged():
        assert torch.equal(student.outer.weight, fitting._average["outer.weight"])
    assert torch.equal(student.outer.weight, before)


def test_every_batch_holds_other_noises_and_each_prompt_comes_once_a_round():
    fitting, *_ = a_fit(fit.Settings(walks=4, steps=(4, 4)))
    seen, teacher = [], fitting.teacher

    def watched(x, t, prompts):
        seen.append((t[:4].tolist(), prompts))
        return teacher(x, t, prompts)

    fitting.teacher = watched
    fitting.run(8, by_steps(fitting))
    assert all(len(set(times)) == 4 for times, _ in seen)
    assert all(prompts[4:] == [fit.EMPTY] * 4 and fit.EMPTY not in prompts[:4] for _, prompts in seen)
    begun = [prompts[i] for (times, prompts) in seen for i in range(4) if times[i] == 999]
    assert len(set(begun[:5])) == 5  # of eight prompts, three went to walks that began on their way


@pytest.mark.parametrize("steps, lengths", [(3, {3}), (12, {12}), (0, set(range(3, 9)))])
def test_a_fit_for_runs_of_some_steps_sees_their_noises_alone(steps, lengths):
    fitting, *_ = a_fit(fit.Settings(walks=4, steps=fit.walks_for(steps)))
    seen, teacher = set(), fitting.teacher

    def watched(x, t, prompts):
        seen.update(t.tolist())
        return teacher(x, t, prompts)

    fitting.teacher = watched
    fitting.run(200, by_steps(fitting))
    assert seen == {t for n in lengths for t in simple_times(n)}


def test_numbers_that_are_not_finite_end_it_and_what_was_learned_is_kept():
    fitting, _, student = a_fit()
    teacher = fitting.teacher
    fitting.teacher = lambda x, t, prompts: teacher(x, t, prompts) * (math.nan if fitting.told.steps == 5 else 1)
    with pytest.raises(FloatingPointError, match="what was learned until then is kept"):
        fitting.run(100, by_steps(fitting))
    assert fitting.told.steps == 5 and all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("wrong", [{"walks": 0}, {"steps": (4, 3)}, {"lr": 0.0}, {"lr": math.nan}, {"cooldown": 2.0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="a fit|of a fit"):
        fit.Settings(**wrong)
    with pytest.raises(ValueError, match="needs prompts"):
        fit.Fit(Small(0), Small(1), fit.Taps({}, {}), dict(Small(1).named_parameters()), V, (4, 6, 6), 0)
