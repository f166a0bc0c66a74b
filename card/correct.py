"""What must hold on any machine, exactly where it can be exact, else within the rounding of the type.

Each check compares runs of the host's own sampling. Where two runs must be the same, not a bit may differ.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import comfy.model_management as management
import torch
from safetensors.torch import load_file, save_file

from .faces import execute
from .narrow import difference
from .techniques import NETWORKS, NONE, Network, Technique, of

# Runs of every check: one picture, and four of an odd size.
RUNS = {"1 of 16 x 16": {}, "4 of 13 x 19": {"size": (13, 19), "batch": 4}}
TIMES = 4  # what a technique may be further from the CPU than the network alone is
# How far the network alone may be from fp32 on the CPU, and what is not worth a comparison.
ROUNDING = {"fp32": (1e-3, 1e-4), "fp16": (0.05, 5e-3), "bf16": (0.3, 3e-2)}

Check = Callable[[], dict]


@dataclass
class Setting:
    """Where checks run. reference: a file of latents of fp32 on the CPU, for comparisons. only: the names of the
    techniques that are played; empty for all. again: whether all of them are played twice, to see what they leave.
    """

    folder: Path
    dtype: str
    networks: tuple[str, ...] = ("emoji", "narrow SD1.5", "narrow SDXL")
    runs: tuple[str, ...] = tuple(RUNS)
    reference: Path | None = None
    only: tuple[str, ...] = ()
    again: bool = True
    built: dict = field(default_factory=dict)

    def once(self, key, make: Callable[[], object]):
        """What `make` makes, made once."""
        if key not in self.built:
            self.built[key] = make()
        return self.built[key]

    def network(self, name: str) -> Network:
        return self.once(name, lambda: NETWORKS[name](self.folder))

    @cached_property
    def wanted(self) -> dict[str, torch.Tensor]:
        return load_file(str(self.reference))

    def plain(self, network: str, run: str, steps: int = 0) -> torch.Tensor:
        """Latents of the network alone. steps: see `Technique.steps`."""
        n = self.network(network)
        return self.once((network, run, steps), lambda: n.sample(n.model, **settings(run, steps)))

    def techniques(self, known: Iterable[Technique]) -> list[Technique]:
        """Those of the known techniques that are played here."""
        return [t for t in known if not self.only or t.name in self.only]

    @property
    def rounding(self) -> tuple[float, float]:
        """Bounds of the type. What convolutions of fp32 round to on a card is the mantissa of fp16 (TF32)."""
        coarse = self.dtype == "fp32" and management.get_torch_device().type != "cpu"
        return ROUNDING["fp16" if coarse else self.dtype]


def settings(run: str, steps: int) -> dict:
    """What a run is sampled with."""
    return RUNS[run] | ({"steps": steps} if steps else {})


def equal(found: torch.Tensor, wanted: torch.Tensor) -> dict:
    return verdict(torch.equal(found, wanted), off(found, wanted), "0")


def near(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> dict:
    distance = off(found, wanted)
    return verdict(distance is not None and distance <= bound, distance, f"at most {bound:.2g}")


def off(found: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """The largest difference over the largest value; None where there is something that is no number."""
    return difference(found, wanted) if found.isfinite().all() and wanted.isfinite().all() else None


def verdict(passed: bool, found: float | None, wanted: str) -> dict:
    return {"kind": "check", "passed": bool(passed and found is not None), "found": found, "wanted": wanted}


# The exact limits ------------------------------------------------------------------------------------


def never(n: Network):
    """Feature Inheritance with interval 1."""
    settings = {
        "preset": "custom",
        "what": "deepcache",
        "branch": 0,
        "targets": "",
        "reuse": "forecast",
        "when": "uniform",
        "interval": 1,
        "power": 1.4,
        "centre": 0.3,
        "windows": "",
        "steps": "",
        "threshold": 0.1,
        "max_run": 4,
        "first_steps": 1,
        "last_steps": 0,
    }
    return n.inheriting(settings)


PRESETS = {"sd15": "m2", "sdxl": "vega"}
EXACT: dict[str, Callable[[Network], object]] = {
    "the same run again": lambda n: n.model,
    "a pack of the checkpoint's own weights": lambda n: n.applied(n.own_weights()),
    "experts that add nothing": lambda n: n.applied(n.experts("zero")),
    "experts at strength 0": lambda n: n.applied(n.experts("random"), strength=0.0),
    "a pack whose window is empty": lambda n: n.applied(n.preset(PRESETS[n.family]), end_percent=0.0),
    "GRI with a window as large as the map": lambda n: n.attending(window=64, pool=4),
    "inheritance with interval 1": never,
    "a switch to itself": lambda n: n.switched(n.model, 1, "step"),
}


def limits(s: Setting, network: str, run: str) -> Iterator[tuple[str, Check]]:
    def exact(make):
        n = s.network(network)
        return equal(n.sample(make(n), **RUNS[run]), s.plain(network, run))

    def one_token():
        n = s.network(network)
        found = n.sample(n.attending(pool=1), **RUNS[run])
        return near(found, s.plain(network, run), s.rounding[0])

    for name, make in EXACT.items():
        yield f"{name} changes no bit", partial(exact, make)
    yield "GRI with cells of one token is full attention", one_token


def techniques(s: Setting, network: str, run: str) -> Iterator[tuple[str, Check]]:
    """Each technique leaves the MODEL as it was; and, with a reference, makes what it makes on the CPU."""
    ours = [t for t in s.techniques(of_network(network)) if t.ours]

    def made(technique):
        if technique is NONE:
            return s.plain(network, run)
        n, of_run = s.network(network), settings(run, technique.steps)
        return s.once((network, run, technique.name), lambda: n.sample(technique.make(n), **of_run))

    def left(technique):
        n = s.network(network)
        acts = off(made(technique), s.plain(network, run, technique.steps))
        row = equal(n.sample(n.model, **RUNS[run]), s.plain(network, run))
        return row if acts else verdict(False, acts, "a technique that acts, and leaves the MODEL as it was")

    def against_cpu(technique):
        steps = technique.steps
        alone = off(s.plain(network, run, steps), s.wanted[key(network, run, NONE.name, steps)])
        most, floor = s.rounding
        bound = most if technique is NONE else max(TIMES * (alone or 0), floor, technique.jump)
        return near(made(technique), s.wanted[key(network, run, technique.name, technique.steps)], bound)

    for t in ours:
        yield f"{t.name} leaves the MODEL as it was", partial(left, t)
    if s.reference:
        for t in (NONE, *ours):
            yield f"{t.name} as in fp32 on the CPU", partial(against_cpu, t)


def of_network(name: str):
    """The techniques of a network, before it is loaded."""
    return of(Network(name, "sdxl" if "SDXL" in name else "sd15", None, None))


# Pictures and memory ---------------------------------------------------------------------------------


def picture(s: Setting) -> dict:
    """A prompt through the family's own text encoder, its teacher with its pack, and its decoder."""
    model, clip, vae = execute("ASDMCheckpointLoader", ckpt_name="emoji-teacher.safetensors")
    n = s.network("emoji")

    def encoded(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    with torch.inference_mode():
        latents = n.sample(
            n.applied("emoji-m2.safetensors", model), positive=encoded("a red heart"), negative=encoded(""), steps=8
        )
        found = vae.decode(latents).float().cpu()
    spread = float(found.std()) if found.isfinite().all() else None
    return verdict(spread is not None and spread > 0.02, spread, "a picture that is not of one colour: above 0.02")


def memory() -> int:
    """Bytes on the card, or the tensors that Python knows where there is none."""
    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()
    if torch.cuda.is_available() and management.get_torch_device().type == "cuda":
        return torch.cuda.memory_allocated()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def left_over(s: Setting, network: str) -> dict:
    """What the second time of everything leaves behind."""
    n, made = s.network(network), []
    for _ in range(2):
        for technique in s.techniques(of(n)):
            if technique.ours:
                n.sample(technique.make(n))
        made.append(memory())
    more = made[1] - made[0]
    on_card = torch.cuda.is_available() and management.get_torch_device().type == "cuda"
    return verdict(more <= (2**20 if on_card else 0), float(more), "no bytes more" if on_card else "no tensors more")


# All of them ----------------------------------------------------------------------------------------


def checks(s: Setting) -> Iterator[tuple[str, Check]]:
    for network in s.networks:
        for run in s.runs:
            for name, check in (*limits(s, network, run), *techniques(s, network, run)):
                yield f"{network}, {run}: {name}", check
    if "emoji" in s.networks:
        yield "emoji: a prompt makes a picture", lambda: picture(s)
    if s.again:
        yield f"{s.networks[0]}: nothing is left behind", lambda: left_over(s, s.networks[0])


def key(network: str, run: str, technique: str, steps: int = 0) -> str:
    return f"{network}/{run}/{technique}" + (f"/{steps}" if steps else "")


def write_reference(s: Setting, path: Path) -> None:
    """Latents of every technique, to compare with on a card and in other types."""
    found = {}
    for network in s.networks:
        n = s.network(network)
        for run in s.runs:
            for steps in {0, *(t.steps for t in s.techniques(of(n)))}:
                found[key(network, run, NONE.name, steps)] = n.sample(n.model, **settings(run, steps))
            for t in s.techniques(of(n)):
                if t.ours:
                    found[key(network, run, t.name, t.steps)] = n.sample(t.make(n), **settings(run, t.steps))
    save_file(found, path)
