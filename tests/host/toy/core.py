"""When the middle of a UNet is held: every other step, or at a longer interval."""

from __future__ import annotations

from dataclasses import dataclass

from .addresses import UNetConfig, walk


@dataclass(frozen=True)
class Hold:
    """The middle transformer computes at every `interval`-th step and adds what it added then at the others."""

    interval: int = 2

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval: wanted 1 or more, got {self.interval}")

    def computes(self, step: int) -> bool:
        return step % self.interval == 0

    def unit(self, config: UNetConfig) -> str:
        """Address of the unit that is held. Raises ValueError for a UNet without a transformer in the middle."""
        found = [u.address for u in walk(config) if u.side == "mid" and u.kind == "transformer"]
        if not found:
            raise ValueError("this UNet has no transformer in the middle")
        return found[0]
