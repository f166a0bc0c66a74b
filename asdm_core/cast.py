"""The cast: who plays each unit of a UNet at each sampling step, as plain frozen data.

A technique writes lines ("this pack plays these units, from 0 to 40% of the run"); casts compose by
appending lines, and where two lines name the same unit at the same step the later one holds. What no
line names, the host checkpoint plays itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .addresses import UNetConfig, in_order, unit

ROLES = ("host", "pack", "cut", "experts", "gains")
JOINING = ("experts", "gains")  # they play nothing themselves


@dataclass(frozen=True)
class Window:
    """A stretch of the sampling schedule, in percent as the host counts it: 0 = first step, 1 = end.

    Half open, [start, end): two windows that meet play every step exactly once.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= 1.0 or not 0.0 <= self.end <= 1.0:
            raise ValueError(f"a step window lies between 0 and 1, got {self.start} to {self.end}")
        if self.start >= self.end:
            raise ValueError(f"a step window must start before it ends, got {self.start} to {self.end}")

    @property
    def whole(self) -> bool:
        return self.start == 0.0 and self.end == 1.0


@dataclass(frozen=True)
class Part:
    """Who plays a unit: role "host", "pack" (then `source` is the pack's id) or "cut".

    "experts" and "gains" play nothing themselves: what the pack `source` has of them, scaled by `strength`, joins
    whoever plays the unit: further experts its convolutions, gains its self-attention where GRI plays.
    """

    role: str
    source: str = ""
    strength: float = 1.0


HOST = Part("host")


@dataclass(frozen=True)
class Line:
    """One entry of a cast: these units are played by this part, within this window."""

    units: tuple[str, ...]
    part: Part
    window: Window = Window()

    def __post_init__(self) -> None:
        if self.part.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, got {self.part.role!r}")
        if not self.units:
            raise ValueError("a line of a cast must name at least one unit")


@dataclass(frozen=True)
class Cast:
    """Who plays what in one UNet. Raises ValueError for units the UNet does not have."""

    config: UNetConfig
    lines: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        for line in self.lines:
            for address in line.units:
                if unit(self.config, address).address != address:
                    raise ValueError(f"a cast is about whole units; {address} is inside one")

    def with_lines(self, lines: Iterable[Line]) -> Cast:
        """This cast with more lines, which take precedence over its own."""
        return Cast(self.config, self.lines + tuple(lines))

    @property
    def windows(self) -> tuple[Window, ...]:
        """The distinct windows of the lines, in order of appearance."""
        return tuple(dict.fromkeys(line.window for line in self.lines))

    @property
    def sources(self) -> tuple[str, ...]:
        """Ids of the packs that play somewhere."""
        return tuple(dict.fromkeys(line.part.source for line in self.lines if line.part.role == "pack"))

    def parts(self, active: Sequence[Window] | None = None) -> dict[str, Part]:
        """Unit address -> part, for every unit the host does not play itself while these windows are active.

        None: at every step, that is, only the lines whose window is the whole run count.
        """
        parts: dict[str, Part] = {}
        for line in self._active(active):
            if line.part.role not in JOINING:
                parts.update(dict.fromkeys(line.units, line.part))
        return {a: parts[a] for a in in_order(self.config, parts) if parts[a] != HOST}

    def joining(self, role: str, active: Sequence[Window] | None = None) -> dict[str, Part]:
        """Unit address -> whose experts or gains join its player while these windows are active.

        Those of a unit that their pack has itself were trained for that unit: they join no other player.
        """
        parts = self.parts(active)
        found = {}
        own = {(line.part.source, a) for line in self.lines if line.part.role == "pack" for a in line.units}
        for line in self._active(active):
            if line.part.role == role:
                source = line.part.source
                players = {a: parts.get(a, HOST) for a in line.units}
                found.update(
                    {
                        a: line.part
                        for a, player in players.items()
                        if player.role != "cut" and ((source, a) not in own or player.source == source)
                    }
                )
        return {a: found[a] for a in in_order(self.config, found)}

    def _active(self, windows: Sequence[Window] | None) -> list[Line]:
        on = {w for w in self.windows if w.whole} if windows is None else set(windows)
        return [line for line in self.lines if line.window in on]


def fingerprint(parts: dict[str, Part], extra: str = "") -> str:
    """Short name of an assignment of parts, the same for equal assignments."""
    text = ";".join(f"{a}={p.role}:{p.source}:{p.strength}" for a, p in sorted(parts.items()))
    return hashlib.sha256(f"{text}|{extra}".encode()).hexdigest()[:12]
