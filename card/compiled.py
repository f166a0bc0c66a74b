"""Every technique under the host's TorchCompileModel, by inductor, against itself uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel

from .correct import Check, Setting, near, of_network
from .techniques import NONE

NEAR = 4  # as many times the rounding of the type: a compiled graph adds in another order


def missing() -> str:
    """Why inductor cannot work here; "" where it can."""
    try:
        torch.compile(lambda x: x.sin() + x, backend="inductor")(torch.ones(8))
        if torch.cuda.is_available():
            torch.compile(lambda x: x.cos() + x, backend="inductor")(torch.ones(8, device="cuda"))
    except Exception as error:  # of its many kinds: no compiler, no triton, headers that are not there
        return f"inductor does not work on this machine ({type(error).__name__})"
    return ""


def checks(s: Setting, network: str) -> Iterator[tuple[str, Check]]:
    def compiled(technique):
        torch._dynamo.reset()
        n = s.network(network)
        model = technique.make(n)
        steps = technique.steps or 3
        wanted = n.sample(model, steps=steps)
        found = n.sample(TorchCompileModel.execute(model, "inductor")[0], steps=steps)
        return near(found, wanted, max(NEAR * s.rounding[1], technique.jump))

    for t in s.techniques(of_network(network)):
        if t.ours or t is NONE:
            yield f"{network}: {t.name}, compiled", partial(compiled, t)
