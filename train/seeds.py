"""Random numbers that depend on what they are for, never on what was drawn before."""

from __future__ import annotations

import torch


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on the numbers only: (seed, step) makes a resumed run draw what an unbroken
    one draws.
    """
    # Weyl-style mixing keeps neighbouring steps apart; the generator scrambles the rest.
    state = 0
    for n in numbers:
        state = (state * 6364136223846793005 + n + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)
