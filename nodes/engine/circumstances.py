"""What must be as it was for what one call of the network made to be right in another.

What it shows must be the same part of the picture (`Content`). Who plays is said by the techniques themselves. What
others do is read off the call: where control acts, what they patch, and on which side of the noise levels at which a
patch begins or ends by itself a call lies.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from ...asdm_core.content import SURE, Places, located, spectrum, verdict

REMEMBERED = 2  # evaluations by which the next one is judged
MOST_FRAMES = 64  # pairs of frames that are compared to find an altered part
# So far a patch is searched for noise levels (an object, its list of settings, the settings), and in so many parts.
DEPTH, MOST_PARTS, MOST_PATCHES = 3, 2000, 1000
SEARCHES = 2  # evaluations in which a patch is searched; after that its levels are where they were
_OURS = __name__.rpartition(".")[0]


def adds_noise(sampler) -> bool:
    """Whether a sampler draws fresh noise on its way (ancestral and SDE samplers)."""
    return "noise_sampler" in inspect.signature(sampler.sampler_function).parameters


def draws_noise(sampler) -> bool:
    """Whether it does so as it is set."""
    return adds_noise(sampler) and sampler.extra_options.get("eta") != 0


def keeps_its_noise(sampler) -> bool:
    """Whether a sampler is one of the host's own that draws none, as it is set."""
    function, settings = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    known = function is not None and function.__module__.startswith("comfy.")
    return known and not adds_noise(sampler) and not any(settings.get(name) for name in ("s_churn", "eta"))


def of_call(options: Mapping, gates: Gates, sigma: float) -> tuple:
    """What others patch in a call with these transformer_options, and the window of frames of the host."""
    window = options.get("context_window")
    return (
        frozenset((name, len(found)) for name, found in options.get("patches", {}).items() if found),
        frozenset((kind, place) for kind, places in options.get("patches_replace", {}).items() for place in places),
        tuple(window.index_list) if window else (),
        gates.passed(options, sigma),
    )


def of_forward(control: Mapping | None, hooks, options: Mapping, gates: Gates, sigma: float) -> tuple:
    """The same of one forward, with where control acts and the strengths of hook LoRAs."""
    return (
        frozenset(
            (kind, i) for kind, residuals in (control or {}).items() for i, r in enumerate(residuals) if r is not None
        ),
        tuple(hook.strength for hook in hooks.hooks) if hooks else (),
        of_call(options, gates, sigma),
    )


class Content:
    """What the calls of the network in one run show: a part of the latent that is sampled, which lies where it lay in
    the evaluation before, or does not.

    A call shows its part exactly, or it shows something made of it (noise or blur on top, another size). Then the part
    is found by its likeness to the whole, and where that tells nothing, what counts is the likeness to the same call
    one evaluation before. The whole itself is compared with the evaluations before, because whoever stands round the
    evaluation may move it. Whatever is compared, nothing is found to have moved because a sampler has added noise.

    steady: whether the sampler adds no noise. Then each latent is surely like the ones before.
    """

    def __init__(self, steady: bool):
        self._steady = steady
        self._whole: Tensor | None = None
        self._wanted = self._rises = False
        self._sigma = float("inf")
        self._now: Tensor | None = None
        self._before: list[tuple[Tensor, Tensor]] = []  # spectra of latents and results, the newest first
        self._moves = 0  # of the whole
        self._places: dict[tuple, Places] = {}
        self._altered: dict[Hashable, tuple[Tensor, Hashable]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # several devices evaluate in threads

    def begin_evaluation(self, x: Tensor, sigma: float) -> None:
        """An evaluation of a latent (B, C, H, W) begins."""
        self._whole = x if x.ndim == 4 else None
        self._now, self._rises, self._sigma = None, sigma > self._sigma, sigma
        self._places = {}
        if self._wanted:
            self._follow()

    def end_evaluation(self, denoised: Tensor) -> None:
        if self._now is not None and denoised.shape == self._now.shape:
            self._before = [(self._now, spectrum(_at_hand(denoised))), *self._before[: REMEMBERED - 1]]
        self._whole, self._now, self._places = None, None, {}

    def _follow(self) -> None:
        self._wanted = True
        if self._whole is None or self._now is not None:
            return
        self._now = spectrum(_at_hand(self._whole))
        if not self._before:
            return
        found = "moved"
        if self._before[0][0].shape == self._now.shape:
            found = verdict(self._now, [s for pair in self._before for s in pair])
        if found == "moved" or found == "unsure" and self._steady and not self._rises:
            self._moves += 1
            self._before = []

    def shown(self, key: Hashable, part: Tensor) -> Hashable:
        """What a call shows, in a word: equal ones show the same part of the picture. part: its latents (b, C, h, w).
        key: tells the call from others of the evaluation.
        """
        with self._lock:
            self._follow()
        whole = self._whole
        if whole is None:
            return None
        if part.shape == whole.shape and torch.equal(part, whole.to(part)):
            return self._moves
        if part.ndim != 4 or part.shape[1] != whole.shape[1]:
            return self._by_its_past(key, part)
        kind = part.dtype, part.device
        if kind not in self._places:
            self._places[kind] = Places(_at_hand(whole.to(part)))
        places = self._places[kind].of(_at_hand(part)).cpu()
        if 2 * int((places >= 0).sum()) >= places.numel():
            return self._moves, hash(places.numpy().tobytes()), tuple(places.shape)
        fits = part.shape[-2] <= whole.shape[-2] and part.shape[-1] <= whole.shape[-1]
        if fits and len(part) * len(whole) <= MOST_FRAMES:
            places, sure = located(_at_hand(part), _at_hand(whole.to(part)))
            if float(sure.min()) > 2 * SURE:  # the best of very many
                return self._moves, *places.tolist()
        return self._by_its_past(key, part)

    def _by_its_past(self, key: Hashable, part: Tensor) -> Hashable:
        now = spectrum(_at_hand(part)) if part.ndim == 4 else None
        with self._lock:
            before, word = self._altered.get(key, (None, None))
            alike = now is not None and before is not None and before.shape == now.shape
            if not (alike and verdict(now, [before]) == "stays"):
                word = "altered", next(self._numbers)
            if now is not None:
                self._altered[key] = now, word
        return word

    def close(self) -> None:
        self._whole, self._now, self._before, self._places = None, None, [], {}
        self._altered.clear()


def _at_hand(latent: Tensor) -> Tensor:
    """A latent where its frequencies can be had: not all devices know them."""
    return latent if latent.device.type in ("cpu", "cuda") else latent.cpu()


class Gates:
    """Noise levels at which patches of other packs begin or end by themselves, as far as they keep them under a name
    with "sigma" in it: what a range of percents becomes in almost all of them. One for a run.

    They are read anew in each evaluation, because many know their levels from their first call on. What they keep there
    may also be the noise level of now, which in a second run is at first that of the one before. So nothing counts
    before the first evaluation has been made, and never what changes later, or is met as a level that was evaluated.
    """

    def __init__(self) -> None:
        self._sigmas: list[float] = []  # of the evaluations so far
        # Patches made anew for each call are many. With the patch, so that its id stays its own.
        self._known: dict[tuple[int, int], _Levels] = {}
        self._lock = threading.Lock()  # several devices evaluate in threads

    def passed(self, options: Mapping, sigma: float) -> frozenset[tuple[float, int]]:
        """The levels among a call's patches on another side of which the first evaluation of the run lies, and the side
        of the call.
        """
        with self._lock:
            if not self._sigmas or sigma != self._sigmas[-1]:
                self._sigmas.append(sigma)
            levels = {level for patch in _patches(options) for level in self._of(patch)}
        return frozenset(
            (level, side)
            for level in levels
            for first, side in [(_side(self._sigmas[0], level), _side(sigma, level))]
            if first != side
        )

    def _of(self, patch) -> set[float]:
        # A method is another object each time one asks for it.
        key = id(getattr(patch, "__self__", patch)), id(getattr(patch, "__func__", patch))
        if key not in self._known:
            if len(self._known) >= MOST_PATCHES:
                self._known.clear()
            self._known[key] = _Levels(patch)
        return self._known[key].now(self._sigmas)

    def close(self) -> None:
        self._known.clear()


def _side(sigma: float, level: float) -> int:
    """Patches differ in whether they act at the level itself."""
    return (sigma > level) - (sigma < level)


class _Levels:
    """The levels in one patch. What is met first may be left over from another run, and is met again in the evaluation
    after that.
    """

    def __init__(self, patch: object):
        self._patch = patch
        self._reads, self._evaluations = 0, 0
        self._holders: dict[tuple, object] = {}
        self._values: dict[tuple, float] = {}
        self._silent: set[tuple] = set()

    def now(self, sigmas: Sequence[float]) -> set[float]:
        """sigmas: of the evaluations of the run, with that which begins."""
        if self._evaluations != len(sigmas):
            self._evaluations = len(sigmas)
            self._read(sigmas)
        return {value for at, value in self._values.items() if at not in self._silent}

    def _read(self, sigmas: Sequence[float]) -> None:
        self._reads += 1
        if self._reads <= SEARCHES:
            self._holders = dict(_holders(self._patch, (), DEPTH, set()))
        before, self._values = (
            self._values,
            {
                (*place, name): float(value)
                for place, holder in self._holders.items()
                for name, value in _named(holder)
                if _is_level(name, value) and isinstance(value, int | float)
            },
        )
        evaluated = sigmas if self._reads == 1 else sigmas[:-1]
        for at, value in self._values.items():
            if before.get(at) != value and any(math.isclose(value, sigma, rel_tol=1e-6) for sigma in evaluated):
                self._silent.add(at)
        if self._reads > SEARCHES:
            self._silent |= {at for at, value in before.items() if self._values.get(at) != value}


def _patches(options: Mapping) -> Iterator:
    for found in options.get("patches", {}).values():
        yield from found
    for places in options.get("patches_replace", {}).values():
        yield from places.values()
    for by_key in options.get("wrappers", {}).values():
        for wrappers in by_key.values():
            yield from wrappers


def _holders(thing, place: tuple, depth: int, seen: set[int]) -> Iterator[tuple[tuple, object]]:
    """What in a patch holds levels, or has a place for them, by the names that lead there."""
    if id(thing) in seen or len(seen) > MOST_PARTS or type(thing).__module__.startswith(_OURS):
        return
    seen.add(id(thing))
    found = _named(thing)
    if any(_is_level(name, value) for name, value in found):
        yield place, thing
    for i, (name, value) in enumerate(found):
        leaf = isinstance(value, int | float | str | bytes | type | ModuleType | Tensor | nn.Module)
        if depth and not leaf:
            yield from _holders(value, (*place, name or i), depth - 1, seen)


def _is_level(name: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "sigma" in name.lower() and (is_number or value is None)


def _named(thing) -> list[tuple[str, object]]:
    """What a function, an object or a collection holds, by name."""
    if isinstance(thing, Mapping):
        return [(str(name), value) for name, value in thing.items()]
    if isinstance(thing, list | tuple):
        return [("", value) for value in thing]
    if isinstance(thing, functools.partial):
        return [("", thing.func), ("", thing.args), ("", thing.keywords)]
    found = list(getattr(thing, "__dict__", {}).items())
    if getattr(thing, "__self__", None) is not None:  # a method
        found.append(("", thing.__self__))
    code, cells = getattr(thing, "__code__", None), getattr(thing, "__closure__", None)
    for name, cell in zip(code.co_freevars, cells, strict=True) if code and cells else ():
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not assigned yet
            continue
    return found
