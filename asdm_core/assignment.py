"""The assignment: who plays each unit of a UNet at each sampling step, as plain frozen data.

A technique writes overrides ("this pack plays these units, from 0 to 40% of the run"); assignments compose by
appending overrides, and where two overrides name the same unit at the same step the later one holds. What no
override names, the checkpoint plays itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .addresses import UNetConfig, in_order, unit

ROLES = ("checkpoint", "pack", "cut", "experts", "log_gains")
JOINING = ("experts", "log_gains")  # they play nothing themselves


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
class Provider:
    """Who plays a unit: role "checkpoint", "pack" (then `source` is the pack's id) or "cut".

    "experts" and "log_gains" play nothing themselves: what the pack `source` has of them, scaled by `strength`, joins
    whoever plays the unit: further experts its convolutions, log gains its self-attention where GRI plays.
    """

    role: str
    source: str = ""
    strength: float = 1.0


CHECKPOINT = Provider("checkpoint")


@dataclass(frozen=True)
class Override:
    """One entry of an assignment: these units are played by this provider, within this window."""

    units: tuple[str, ...]
    provider: Provider
    window: Window = Window()

    def __post_init__(self) -> None:
        if self.provider.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, got {self.provider.role!r}")
        if not self.units:
            raise ValueError("an override of an assignment must name at least one unit")


@dataclass(frozen=True)
class Assignment:
    """Who plays what in one UNet. Raises ValueError for units the UNet does not have."""

    config: UNetConfig
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for override in self.overrides:
            for address in override.units:
                if unit(self.config, address).address != address:
                    raise ValueError(f"an assignment is about whole units; {address} is inside one")

    def with_overrides(self, overrides: Iterable[Override]) -> Assignment:
        """This assignment with more overrides, which take precedence over its own."""
        return Assignment(self.config, self.overrides + tuple(overrides))

    @property
    def windows(self) -> tuple[Window, ...]:
        """The distinct windows of the overrides, in order of appearance."""
        return tuple(dict.fromkeys(override.window for override in self.overrides))

    def providers(self, active: Sequence[Window] | None = None) -> dict[str, Provider]:
        """Unit address -> provider, for every unit the checkpoint does not play itself while these windows are active.

        None: at every step, that is, only the overrides whose window is the whole run count.
        """
        providers: dict[str, Provider] = {}
        for override in self._active(active):
            if override.provider.role not in JOINING:
                providers.update(dict.fromkeys(override.units, override.provider))
        return {a: providers[a] for a in in_order(self.config, providers) if providers[a] != CHECKPOINT}

    def joining(self, role: str, active: Sequence[Window] | None = None) -> dict[str, Provider]:
        """Unit address -> whose experts or log gains join its player while these windows are active.

        Those of a unit that their pack has itself were trained for that unit: they join no other player.
        """
        providers = self.providers(active)
        found = {}
        own = {
            (override.provider.source, a)
            for override in self.overrides
            if override.provider.role == "pack"
            for a in override.units
        }
        for override in self._active(active):
            if override.provider.role == role:
                source = override.provider.source
                players = {a: providers.get(a, CHECKPOINT) for a in override.units}
                found.update(
                    {
                        a: override.provider
                        for a, player in players.items()
                        if player.role != "cut" and ((source, a) not in own or player.source == source)
                    }
                )
        return {a: found[a] for a in in_order(self.config, found)}

    def _active(self, windows: Sequence[Window] | None) -> list[Override]:
        on = {w for w in self.windows if w.whole} if windows is None else set(windows)
        return [override for override in self.overrides if override.window in on]


def fingerprint(providers: dict[str, Provider], extra: str = "") -> str:
    """Short name of an assignment of providers, the same for equal assignments."""
    text = ";".join(f"{a}={p.role}:{p.source}:{p.strength}" for a, p in sorted(providers.items()))
    return hashlib.sha256(f"{text}|{extra}".encode()).hexdigest()[:12]
