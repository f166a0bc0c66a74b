"""Which features of teacher and student are compared, and how they are caught.

Student and teacher share their addresses, so most taps are the same module in both. Weights follow the
sources (train/losses.py); where these are silent the taps of a block share one.

`changed`: addresses of the units that are not the teacher's own: those of the student (the default), and those with
further experts or gains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from asdm_core.addresses import Unit, walk
from asdm_core.architecture import Architecture


@dataclass(frozen=True)
class Tap:
    """One compared feature: its name, the modules of a diffusers UNet that put it out, its weight in the loss."""

    name: str
    student: str
    teacher: str
    weight: float = 1.0


def blocks(architecture: Architecture, changed: Collection[str] = ()) -> tuple[Tap, ...]:
    """BK-SDM: the output of each changed down and up block, after its sampler, each with weight 1.

    In a block that lost its sampler (tiny's down.2) this is proj_out of the last transformer, before the residual.
    """
    taps = []
    changed = changed or architecture.own
    for name, units in _blocks(architecture):
        kept = [u for u in units if u.address not in architecture.cut]
        if name == "mid" or not set(changed).intersection(u.address for u in kept):
            continue
        side, number = name.split(".")
        path = f"{side}_blocks.{number}"
        if units[-1].address not in architecture.cut or "sampler" not in units[-1].kind:
            taps.append(Tap(name, path, path))
            continue
        last = kept[-1]
        whole = [u for u in units if u.kind == last.kind][-1]
        inner = ".proj_out" if last.kind == "transformer" else ""
        taps.append(Tap(name, last.diffusers + inner, whole.diffusers + inner))
    return tuple(taps)


def layers(architecture: Architecture, changed: Collection[str] = ()) -> tuple[Tap, ...]:
    """SSD-1B: the output of each changed resnet and transformer; those of a block share a weight of 1."""
    return _shared(
        architecture, changed, lambda u: [(u.address, u.diffusers)] if u.kind in ("resnet", "transformer") else []
    )


def attention(architecture: Architecture, changed: Collection[str] = ()) -> tuple[Tap, ...]:
    """KOALA: each changed self-attention before its residual; those of a block share a weight of 1."""
    return _shared(
        architecture,
        changed,
        lambda u: [
            (f"{u.address}.{i}.attn1", f"{u.diffusers}.transformer_blocks.{i}.attn1")
            for i in (architecture.kept_blocks(u) if u.depth else ())
        ],
    )


def mid(architecture: Architecture, changed: Collection[str] = ()) -> tuple[Tap, ...]:
    """A-SDM: the output of the mid block, whatever is changed. Raises ValueError where it is cut."""
    if not any(u.side == "mid" for u in architecture.kept):
        raise ValueError(f"loss.mid: {architecture.name or 'this student'} has no mid block; set it to 0")
    return (Tap("mid", "mid_block", "mid_block"),)


KINDS: dict[str, Callable[[Architecture, Collection[str]], tuple[Tap, ...]]] = {
    "blocks": blocks,
    "layers": layers,
    "attention": attention,
    "mid": mid,
}


def _blocks(architecture: Architecture) -> Iterator[tuple[str, list[Unit]]]:
    for name, units in groupby(walk(architecture.config), lambda u: u.block):
        if name != "stem":
            yield name, list(units)


def _shared(
    architecture: Architecture, changed: Collection[str], of: Callable[[Unit], list[tuple[str, str]]]
) -> tuple[Tap, ...]:
    taps = []
    for _, units in _blocks(architecture):
        found = [tap for u in units if u.address in (changed or architecture.own) for tap in of(u)]
        taps += [Tap(name, path, path, 1 / len(found)) for name, path in found]
    return tuple(taps)


# Catching them --------------------------------------------------------------------------------------


@contextmanager
def caught(net: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of modules by path, filled by a forward pass inside the `with`; no hook is left behind."""
    features: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module, args, output):
            # Down blocks put out (h, skips) and transformers (h,).
            features[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [net.get_submodule(path).register_forward_hook(keep(path)) for path in dict.fromkeys(paths)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


class Tapped(nn.Module):
    """A diffusers UNet that puts out its features with its prediction.

    As values, not through hooks that outlive the call: what wraps the module (DDP, autocast) then sees them.
    """

    def __init__(self, unet: nn.Module, paths: Iterable[str]):
        super().__init__()
        self.unet = unet
        self.paths = tuple(paths)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, added: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x: (B, C, H, W); t: (B,); context: (B, N, D); added: SDXL's further conditions.

        Returns the prediction and the features by path.
        """
        with caught(self.unet, self.paths) as features:
            predicted = self.unet(x, t, context, added_cond_kwargs=added, return_dict=False)[0]
        return predicted, features
