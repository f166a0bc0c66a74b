"""Profiles: what a calibration found out, bound to what it was made for, as a file to keep and to share.

A profile holds offers (see `forecast_fit`): plans for several savings with the error that is predicted for each, and
fewer steps of the same sampler with the error that was measured. It is JSON, and what other people's files may hold is
bounded and checked before anything is made of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .forecast import ForecastPlan
from .forecast_fit import Offer
from .text import printable, read_json

FORMAT = 1
TECHNIQUE = "profile"
SUFFIX = ".json"
LARGEST = 4 * 2**20  # bytes of a file
LONGEST = 120  # bytes of a name: file systems take 255, with an ending and a mark while it is written
FEWEST = 4  # pictures to learn from; with fewer, plans fit these pictures more than the model
_MOST = 1000  # steps, offers
_ALIKE = 1e-3  # of noise levels, relative
# Of CFG, relative. What is forecast of a prompt's difference is multiplied by it, in each result and again in the later
# ones that are made from it, so that errors grow faster than CFG does. A tenth moves them by less than one position of
# the dial does.
_GUIDANCE = 0.1


class BadProfile(ValueError):
    """A file that is no profile: one sentence for people."""


@dataclass(frozen=True)
class Circumstances:
    """What a run is, as far as a plan depends on it.

    model: fingerprint of its weights and of what stands on it. sampler: name of its function, with its options.
    sigmas: noise levels, one more than the run has steps. cfg: guidance. size: (height, width) of the latents.
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if not 2 <= len(self.sigmas) <= _MOST + 1 or not all(math.isfinite(s) and s >= 0 for s in self.sigmas):
            raise ValueError(f"profiles are for 1 to {_MOST} steps, with finite noise levels of at least 0")
        if not math.isfinite(self.cfg) or len(self.size) != 2 or not all(0 < n < 2**20 for n in self.size):
            raise ValueError(f"profiles are for a CFG and a height and width, got {self.cfg} and {self.size}")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def size_class(self) -> int:
        """Sizes of one class have half to twice as many latent pixels as a power of four: 512 x 512 and 640 x 512 are
        of one, 1024 x 1024 is of the next.
        """
        return round(math.log(self.size[0] * self.size[1], 4))

    def same_steps(self, other: Circumstances) -> bool:
        """Whether a plan for one is one for the other at all: the same sampler at the same noise levels."""
        return (
            self.sampler == other.sampler
            and len(self.sigmas) == len(other.sigmas)
            and all(abs(a - b) <= _ALIKE * max(a, b) + 1e-4 for a, b in zip(self.sigmas, other.sigmas, strict=True))
        )

    def same_guidance(self, run: Circumstances) -> bool:
        """Whether the errors of a plan for one are about those that it has in the other. At CFG 1 nobody asks for the
        negative prompt, so that nothing is learned of it.
        """
        near = abs(self.cfg - run.cfg) <= _GUIDANCE * min(abs(self.cfg), abs(run.cfg)) + 1e-9
        return near and math.isclose(self.cfg, 1) == math.isclose(run.cfg, 1)

    def differences(self, run: Circumstances) -> list[str]:
        """What it was made for that a run is not, in words; the gravest first."""
        found = []
        if self.sampler != run.sampler:
            found.append(f"for the sampler {self.sampler}, and this run has {run.sampler}")
        elif not self.same_steps(run):
            found.append(
                f"for {self.steps} steps, and this run has {run.steps}"
                if self.steps != run.steps
                else "for other noise levels (scheduler, denoise or sampling settings)"
            )
        if self.model != run.model:
            found.append("for another model, or for other LoRAs and patches on it")
        if abs(self.cfg - run.cfg) > 0.01 or not self.same_guidance(run):
            found.append(f"for CFG {self.cfg:g}, and this run has {run.cfg:g}")
        if self.size_class != run.size_class:
            found.append(f"for latents of {self.size[1]} x {self.size[0]}, and these are {run.size[1]} x {run.size[0]}")
        return found

    def distance(self, run: Circumstances) -> tuple[float, ...]:
        """How far it is from a run; only to be compared with others' of the same steps."""
        return (
            float(self.model != run.model),
            float(abs(self.size_class - run.size_class)),
            abs(math.log(max(self.cfg, 0.1) / max(run.cfg, 0.1))),
        )


@dataclass(frozen=True)
class Profile:
    """offers: what a calibration found, by saving. scheduler, title: as it was called, for people. pictures: learned
    from.
    """

    made_for: Circumstances
    offers: tuple[Offer, ...]
    pictures: int
    scheduler: str = ""
    title: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.offers) <= _MOST:
            raise ValueError(f"profile: wanted 1 to {_MOST} offers, got {len(self.offers)}")
        if self.pictures < 1:
            raise ValueError(f"profile: it is learned from 1 picture or more, got {self.pictures}")
        steps = self.made_for.steps
        for offer in self.offers:
            if not (math.isfinite(offer.error) and offer.error >= 0 and 0 <= offer.saving <= 1):
                raise ValueError(f"profile: an offer saves 0 to 1 with an error of at least 0, got {offer.saving}")
            if offer.plan is not None and offer.plan.steps != steps:
                raise ValueError(f"profile: a plan for {offer.plan.steps} steps, and it has {steps}")

    def plan(self, error: float) -> Offer | None:
        """The plan that saves most with a predicted error of at most so much; None where none does."""
        near = [o for o in self.offers if o.plan is not None and o.error <= error and o.saving > 0]
        return max(near, key=lambda o: (o.saving, -o.error), default=None)

    def fewer_steps(self, error: float) -> Offer | None:
        """Fewer steps of the same sampler, where that saves more than any plan with so small an error; else None."""
        near = [o for o in self.offers if o.plan is None and o.error <= error]
        best, plan = max(near, key=lambda o: o.saving, default=None), self.plan(error)
        return best if best is not None and (plan is None or best.saving > plan.saving) else None

    def to_json(self) -> str:
        made = self.made_for
        return json.dumps(
            {
                "technique": TECHNIQUE,
                "format": FORMAT,
                "title": self.title,
                "made_for": {
                    "model": made.model,
                    "sampler": made.sampler,
                    "scheduler": self.scheduler,
                    "steps": made.steps,
                    "sigmas": list(made.sigmas),
                    "cfg": made.cfg,
                    "size": list(made.size),
                },
                "pictures": self.pictures,
                "offers": [
                    {"saving": o.saving, "error": o.error, "steps": o.steps}
                    | ({} if o.plan is None else {"plan": o.plan.to_dict()})
                    for o in self.offers
                ],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Inverse of `to_json`. Raises ValueError, for a person to read."""
        try:
            data = read_json(text)
        except (ValueError, UnicodeDecodeError):
            raise ValueError("this is not valid JSON") from None
        if not isinstance(data, Mapping) or data.get("technique") != TECHNIQUE:
            raise ValueError("this is no profile of Calibrate")
        if data.get("format") != FORMAT:
            raise ValueError(f"a profile of format {printable(data.get('format'), 20)}; this asdm reads {FORMAT}")
        try:
            made, found = data["made_for"], data["offers"]
            circumstances = Circumstances(
                printable(made["model"]),
                printable(made["sampler"]),
                tuple(float(s) for s in made["sigmas"]),
                float(made["cfg"]),
                (int(made["size"][0]), int(made["size"][1])),
            )
            offers = tuple(
                Offer(
                    float(o["saving"]),
                    float(o["error"]),
                    int(o["steps"]),
                    ForecastPlan.from_dict(o["plan"]) if "plan" in o else None,
                )
                for o in found
            )
            names = printable(made["scheduler"]), printable(data.get("title", ""))
            return cls(circumstances, offers, int(data["pictures"]), *names)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as e:
            raise ValueError(f"a broken profile ({printable(e, 60)})") from None


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in a file. Raises BadProfile: one sentence with the file's name."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"{size // 2**20} MB, and a profile has at most {LARGEST // 2**20}")
        return Profile.from_json(path.read_bytes())
    except OSError as e:
        raise BadProfile(f"{printable(path.name)} cannot be read: {e.strerror or e}.") from None
    except ValueError as e:
        raise BadProfile(f"{printable(path.name)} is no profile that can be used: {printable(e, 200)}.") from None


def file_name(name: str) -> str:
    """The name of a profile's file in its folder. Raises ValueError for a name that would lie elsewhere."""
    name = name.strip().removesuffix(SUFFIX)
    if (
        not name
        or len(name.encode("utf-8", "surrogatepass")) > LONGEST
        or name != printable(name)
        or name.strip(". ") != name
    ):
        raise ValueError(
            f"a profile needs a name of 1 to {LONGEST} letters (Chinese and Japanese ones count three) that does not "
            "begin or end in a dot."
        )
    if any(c in name for c in '/\\:*?"<>|'):
        raise ValueError(f'the name of a profile is no path: {printable(name)!r} has one of / \\ : * ? " < > | in it.')
    return name + SUFFIX


def write_profile(profile: Profile, name: str, folders: Sequence[str | os.PathLike[str]]) -> Path:
    """Write a profile into the first of some folders that can be written to. Raises ValueError.

    It is there whole or not at all.
    """
    file, refused = file_name(name), []
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            half = folder / f".{file}.{os.getpid()}"
            half.write_text(profile.to_json(), "utf-8")
            half.replace(folder / file)
        except OSError as e:
            refused.append(f"{folder} ({e.strerror or e})")
            continue
        return folder / file
    raise ValueError(f"the profile could not be written: {'; '.join(refused) or 'there is no folder for profiles'}.")


def nearest(profiles: Mapping[str, Profile], run: Circumstances) -> str | None:
    """The name of the profile that fits a run best; None where none is for its model, sampler, noise levels and about
    its CFG.
    """
    made = {name: p.made_for for name, p in profiles.items()}
    fits = [n for n, m in made.items() if m.same_steps(run) and m.model == run.model and m.same_guidance(run)]
    return min(fits, key=lambda name: (made[name].distance(run), name), default=None)
