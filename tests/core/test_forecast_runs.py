"""Fits on runs of a network that sees its latents: that what they predict ranks what happens, whatever the network
predicts.

The network is the exact denoiser of a mixture of Gaussians, whose v depends on the latent at every noise level, and a
random one that predicts eps. Samplers are those written out in test_forecast_fit.
"""

import itertools

import numpy as np
import pytest

from asdm_core.forecast import FULL, RESULT, denoised_of, v_of
from asdm_core.forecast_fit import PlanFit, Recording, best_of, fits_of, gram_of, response

from .test_forecast_fit import SAMPLERS

WIDE, PICTURES = 12, 16


def karras(steps, high=14.6, low=0.03):
    ramp = np.linspace(high ** (1 / 7), low ** (1 / 7), steps)
    return np.append(ramp**7, 0.0)


def normal(steps, high=14.6, low=0.03):
    """As of equal steps of time in Stable Diffusion's schedule, nearly: sparse at the end."""
    t = np.linspace(1, 0, steps)
    return np.append(np.exp(np.log(low) + (np.log(high) - np.log(low)) * (0.35 * t + 0.65 * t**0.5)), 0.0)


class Mixture:
    """x0 of a latent (pictures, WIDE) at a noise level, exactly: of data that lies round some points.

    The negative prompt knows all points, the positive one the first ones.
    """

    def __init__(self, seed, points=9, spread=0.5):
        self._points = np.random.default_rng(seed).standard_normal((points, WIDE))
        self._spread = spread

    def denoised(self, x, sigma, of):
        points, s2 = self._points[:of], self._spread**2
        away = ((x[:, None] - points) ** 2).sum(-1) / (2 * (s2 + sigma**2))
        weights = np.exp(away.min(1, keepdims=True) - away)
        nearest = (weights / weights.sum(1, keepdims=True)) @ points
        return nearest + s2 / (s2 + sigma**2) * (x - nearest)

    def __call__(self, x, sigma):
        return self.denoised(x, sigma, 4), self.denoised(x, sigma, None)


class Random:
    """A random network that predicts eps, from a latent scaled as Stable Diffusion scales it."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self._layers = [rng.standard_normal((WIDE + 2, 48)) / WIDE**0.5, rng.standard_normal((48, WIDE)) / 48**0.5]
        self._prompts = rng.standard_normal((2, WIDE))

    def eps(self, x, sigma, prompt):
        scaled = x / (1 + sigma**2) ** 0.5
        time = np.broadcast_to([np.cos(np.log(sigma)), np.sin(np.log(sigma))], (len(x), 2))
        inner = np.tanh(np.concatenate([scaled + 0.3 * self._prompts[prompt], time], 1) @ self._layers[0])
        return scaled * sigma / (1 + sigma**2) ** 0.5 + 0.3 * inner @ self._layers[1]

    def __call__(self, x, sigma):
        return tuple(x - sigma * self.eps(x, sigma, prompt) for prompt in (0, 1))


class AsV:
    """The same network, made to predict v and read as such."""

    def __init__(self, network):
        self._network = network

    def __call__(self, x, sigma):
        alpha = 1 / (1 + sigma**2) ** 0.5
        found = []
        for prompt in (0, 1):
            eps = self._network.eps(x, sigma, prompt)
            v = alpha * eps - alpha * sigma * (x - sigma * eps)  # Salimans and Ho
            found.append(alpha**2 * x - alpha * sigma * v)
        return tuple(found)


class Run:
    """Runs of a network with guidance, in full and with forecasts, written out from the plan's weights."""

    def __init__(self, network, sampler, sigmas, guidance, seed):
        self.network, self.sampler, self.sigmas, self.guidance = network, sampler, sigmas, guidance
        rng = np.random.default_rng(seed)
        self.start = (rng.standard_normal((PICTURES, WIDE)) + sigmas[0] * rng.standard_normal((PICTURES, WIDE))).ravel()
        self.positions = []

    def __call__(self, actions=None):
        number = itertools.count()
        self.seen = []  # v of both prompts
        self.at = []

        def denoise(x, sigma):
            k = next(number)
            x = x.reshape(PICTURES, WIDE)
            self.at.append(float(np.abs(self.sigmas - sigma).argmin()))
            if actions is not None and actions[k].kind == RESULT:
                action = actions[k]
                cond = sum(w * self.seen[q][0] for q, w in action.weights)
                of = action.difference or action.weights
                uncond = cond - sum(w * (self.seen[q][0] - self.seen[q][1]) for q, w in of)
            else:
                cond, uncond = (v_of(x, denoised, sigma) for denoised in self.network(x, sigma))
            self.seen.append((cond, uncond))
            if actions is not None and actions[k].kind == FULL and actions[k].weights:
                of = actions[k].difference or actions[k].weights
                cond = sum(w * self.seen[q][0] for q, w in actions[k].weights)
                uncond = cond - sum(w * (self.seen[q][0] - self.seen[q][1]) for q, w in of)
            positive, negative = denoised_of(x, cond, sigma), denoised_of(x, uncond, sigma)
            return (negative + self.guidance * (positive - negative)).ravel()

        return SAMPLERS[self.sampler](denoise, self.start, self.sigmas)

    def recording(self):
        result = self()
        gram = gram_of([c for c, _ in self.seen], [c - u for c, u in self.seen])
        found = response(lambda denoise, rows: SAMPLERS[self.sampler](denoise, np.zeros(rows), self.sigmas))
        size = float((result**2).mean() ** 0.5)
        return Recording(found, gram, self.guidance, tuple(self.at), size, PICTURES)

    def error(self, actions):
        return off(self(actions), self())


def off(result, full):
    """How far a result is from another, as a share of its size."""
    return float(((result - full) ** 2).mean() ** 0.5 / (full**2).mean() ** 0.5)


NETWORKS = {"mixture": Mixture, "random eps": Random}


def schedule(spacing, steps, denoise):
    """The last part of a longer schedule where denoise is below 1, as the host has it."""
    return spacing(int(steps / denoise))[-steps - 1 :]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_forecasts_are_the_same_whether_the_network_predicts_eps_or_v(sampler, apart):
    eps = Random(3)
    runs = [Run(network, sampler, karras(15), 5.0, 0) for network in (eps, AsV(eps))]
    assert runs[0]() == pytest.approx(runs[1](), abs=1e-8)
    ours, theirs = (run.recording() for run in runs)
    assert ours.gram == pytest.approx(theirs.gram, abs=1e-7)
    kinds = [FULL if k % 3 == 0 or k < 2 else RESULT for k in range(len(ours))]
    actions = PlanFit(ours, apart=apart).weights(kinds).plan.actions
    full = runs[0]()
    skipped = runs[0](actions)
    assert np.abs(skipped - full).max() > 1e-3
    assert skipped == pytest.approx(runs[1](actions), abs=1e-8)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network, lowest, helps", [("mixture", 0.95, 0.9), ("random eps", 0.98, 1.0)])
def test_the_predicted_error_ranks_plans_over_schedules_steps_guidance_and_denoise(sampler, network, lowest, helps):
    predicted, actual, fit_was_better = [], [], []
    cases = itertools.product((karras, normal), (10, 20, 50), (3.0, 5.0, 8.0), (1.0, 0.6))
    for spacing, steps, guidance, denoise in cases:
        run = Run(NETWORKS[network](1), sampler, schedule(spacing, steps, denoise), guidance, 0)
        fit = PlanFit(run.recording())
        for every in (2, 4):
            kinds = [FULL if k % every == 0 or k < 2 else RESULT for k in range(len(fit.recording))]
            errors = []
            for fitted in (False, True):
                found = fit.weights(kinds, fitted)
                errors.append(run.error(found.plan.actions))
                predicted.append(found.error)
            actual += errors
            fit_was_better.append(errors[1] < errors[0])
    ranks = (np.argsort(np.argsort(values)) for values in (predicted, actual))
    assert np.corrcoef(*ranks)[0, 1] > lowest
    assert np.mean(fit_was_better) >= helps
    # Hardly ever far below what happens.
    assert np.percentile(np.array(predicted) / np.array(actual), 5) > 0.4


@pytest.mark.sweep(2)
@pytest.mark.parametrize("guidance", [3.0, 7.0])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sampler, spacing", [("euler", normal), ("dpmpp_2m", karras)])
def test_what_is_offered_for_half_of_the_work_is_no_worse_than_half_as_many_steps(network, sampler, spacing, guidance):
    # Calibrated on one start, judged on another. "Fewer steps" is one of the offers, and the better one at times.
    net = NETWORKS[network](2)

    def runs(seed):
        return [Run(net, sampler, spacing(steps), guidance, seed) for steps in (20, 10)]

    long, short = runs(0)
    best, fewer = best_of(fits_of(long.recording()), 10), off(short(), long())
    takes_fewer = fewer < best.error
    assert not takes_fewer or network == "mixture"
    long, short = runs(7)
    if not takes_fewer:
        assert long.error(best.plan.actions) < (0.7 if network == "random eps" else 1.0) * off(short(), long())


def test_small_errors_are_not_lost_between_large_products():
    # Ninety evaluations along a straight line but for a ripple of 1e-4.
    rng = np.random.default_rng(0)
    start, slope, ripple = rng.standard_normal((3, 4096)).astype(np.float32)
    rows = np.stack([start + 0.01 * k * slope + np.float32(1e-4) * np.sin(k) * ripple for k in range(90)])
    gram = gram_of(rows, rows)
    assert gram.shape == (180, 180)
    wanted = rows.astype(float)
    for k in (2, 40, 89):
        second = np.zeros(180)
        second[[k - 2, k - 1, k]] = 1, -2, 1
        exact = ((wanted[k] - 2 * wanted[k - 1] + wanted[k - 2]) ** 2).mean()
        assert second @ gram @ second == pytest.approx(exact, rel=1e-5)
