"""GRI attention inside a run: where it enters the host's forward, and when it leaves a block alone.

It enters as the host's attn1 replace, put into the options of each forward and not into the MODEL: by then everybody
else has entered his own, before or after our node, and keeps what he has. Nobody is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from comfy.ldm.modules import attention
from torch import Tensor, nn

from ...asdm_core.addresses import UNetConfig, walk
from ...asdm_core.architecture import Architecture
from ...asdm_core.assignment import Window
from ...asdm_core.gri import GRI, PAYS_FROM, gri_attention
from ...asdm_core.measure import costs, sizes
from ...asdm_core.steps import Moment
from . import notes, units
from .assigned import Players
from .carried import is_bare
from .technique import PLAYED, AtUNet, InRun, Measured, Say, Start, Technique, UNetInRun

COMPILED = "torch.compile"  # the host's key of the wrapper by which a MODEL is compiled
# The host's attention functions that a compiled graph takes in whole.
_TRACED = [getattr(attention, f"attention_{name}", None) for name in ("basic", "pytorch", "xformers", "flash")]


@dataclass(frozen=True)
class Regional(Technique):
    """GRI attention on a MODEL: window and pool (0: by the size of the map), on so many of the shallowest levels that
    have attention, within a stretch of the run. shifted: every other layer's windows lie half a window further.

    Raises ValueError for a window that does not consist of whole cells.
    """

    window: int = 0
    pool: int = 0
    stages: int = 2
    shifted: bool = False
    when: Window = Window()

    key: ClassVar[str] = "regional"
    role: ClassVar[str] = "regional"

    def __post_init__(self):
        if self.window and self.pool:
            GRI(self.window, self.pool)

    def blocks(self, config: UNetConfig) -> dict[tuple[str, int], str]:
        """The host's names of the blocks it plays in, ("input", 1), with the addresses of their transformers."""
        transformers = [u for u in walk(config) if u.kind == "transformer" and u.side != "mid"]
        levels = sorted({u.scale for u in transformers})[: self.stages]
        paths = {u.address: u.ldm.split(".") for u in transformers if u.scale in levels}
        return {(side.removesuffix("_blocks"), int(n)): address for address, (side, n, _) in paths.items()}

    def on(self, height: int, width: int, shifted: bool) -> GRI | None:
        """Settings for a map of this size; None where full attention is as good or as quick."""
        if not self.window and height * width < PAYS_FROM:
            return None
        gri = GRI.choose(height, width, self.window, self.pool, shifted)
        return None if gri.covers(height, width) else gri

    def bind(self, start: Start, say: Say) -> InRun:
        return _InRun(self, start.stretch(self.when), say)

    def label(self) -> str:
        return "GRI attention"

    def tells(self, model) -> list[str]:
        return [
            "GRI Attention is on, in pictures as large as its node says; bypass that node for full attention.",
        ]

    def left_out(self, architecture: Architecture, height: int, width: int) -> dict[str, float]:
        shapes, cost, found = sizes(architecture, height, width), costs(architecture, height, width), {}
        for address in self.blocks(architecture.config).values():
            if address in architecture.cut:
                continue
            h, w = shapes[address]
            gri = self.on(h, w, False)
            if gri is not None:
                own = gri.window**2
                seen = own + max(0, h * w - own) / gri.pool**2  # tokens of its own window, cells of the rest
                found[address] = max(0.0, 1 - seen / (h * w)) * cost[address].attention["attn1"]
        return found

    def saved(self, measured: Measured) -> list[tuple[str, float, str]]:
        left_out = measured.left_out[self.role]
        seconds = sum(
            measured.needed(address, calls * left_out[address])
            for (address, role), (_, calls) in measured.layers.items()
            if role == self.role and address in left_out
        )
        return [("GRI attention", seconds, "estimated")] if seconds > 0 else []


def _is_the_hosts(transformer: nn.Module | None) -> bool:
    """Whether the self-attentions of a transformer are the host's own, and nobody has put anything on their modules."""

    def is_own(attn: Any) -> bool:
        if isinstance(attn, units.CrossAttention):  # of a cut unit, which nobody runs
            return True
        if type(attn) is not attention.CrossAttention or not is_bare(attn):
            return False
        return attention.CrossAttention.forward.__module__ == attention.__name__

    return all(is_own(getattr(block, "attn1", None)) for block in getattr(transformer, "transformer_blocks", ()))


class _InRun(InRun):
    def __init__(self, settings: Regional, stretch: tuple[float, float], say: Say):
        self._settings, self._stretch, self._say = settings, stretch, say

    def begin_evaluation(self, moment: Moment) -> None:
        high, low = self._stretch
        self.circumstances = low < moment.sigma <= high

    def at(self, unet: UNetInRun, model) -> AtUNet:
        part = Attention(self._settings, unet.config, self._stretch, unet.find(Players), self._say)
        of_text = {address for address, layer in unet.layers.items() if units.attends_to_text(layer)}
        part.blocks = {block: address for block, address in part.blocks.items() if address not in of_text}
        part.videos = {block for block, address in part.blocks.items() if hasattr(unet.layers[address], "time_stack")}
        part.layers = unet.layers
        if not part.blocks:
            self._say("GRI Attention has nothing to do in this UNet: no layer of these stages has a self-attention.")
        return part


class Attention(AtUNet):
    """The self-attention of one UNet object during one run.

    stretch: noise levels between which it plays, see `Start.stretch`. players: whose log gains join it.
    """

    def __init__(
        self,
        settings: Regional,
        config: UNetConfig,
        stretch: tuple[float, float] = (math.inf, -math.inf),
        players: Players | None = None,
        say: Say | None = None,
    ):
        self._settings, self._stretch, self._players = settings, stretch, players
        self._say = say or notes.speaker()
        self._whole = Architecture.full(config)
        self.blocks = settings.blocks(config)
        self.layers: Mapping[str, nn.Module] = {}
        self.videos: set[tuple[str, int]] = set()  # blocks that attend over the frames too, by the same door
        self._on, self._traced, self._gains = False, True, ""
        self._entered: dict[tuple[str, int], str] = {}  # of the blocks, those that it plays in this forward
        self.log_gains: dict[
            str, dict[int, Callable[[Tensor], Tensor]]
        ] = {}  # transformer -> block -> log gains of its heads

    def begin_evaluation(self, moment: Moment) -> None:
        high, low = self._stretch
        self._on, self._entered, self._gains, self.log_gains = low < moment.sigma <= high, {}, "", {}
        if self._on and self._players:
            self._gains, self.log_gains = self._players.log_gains()

    @property
    def name(self) -> str:  # type: ignore[override]
        if not self._entered:
            return ""
        s, without = self._settings, [n for n, block in enumerate(self.blocks) if block not in self._entered]
        return f"gri{s.window}x{s.pool}x{s.stages}{'s' * s.shifted}{self._gains}{'_'.join(map(str, ['', *without]))}"

    def defies_graphs(self, patches: Mapping[str, list]) -> bool:
        """Where the host's attention breaks a graph (split and sub-quadratic ask for free memory, Sage is not traced),
        its pieces are compiled block by block, and TorchCompileModel leaves out the guards by which a block of the same
        shape would notice that GRI is not in it.
        """
        return bool(self._entered) and not self._traced

    def role(self, address: str, role: str) -> str:
        return self._settings.role if role == PLAYED and address in self._entered.values() else role

    def options(self, options: dict, x: Tensor) -> dict:
        self._traced = attention.optimized_attention in _TRACED and "optimized_attention_override" not in options
        self._entered = self._plays(options, x.shape[-2], x.shape[-1]) if self._on else {}
        if self._entered and not self._traced and COMPILED in options.get("wrappers", {}).get("apply_model", {}):
            self._say(
                "GRI plays without torch.compile here: the attention of this run breaks a compiled graph in pieces, "
                "which would mix up blocks. For both, start ComfyUI with --use-pytorch-cross-attention, "
                "without a node that exchanges attention."
            )
        return self.entered(options, self._entered)

    def _plays(self, options: dict, height: int, width: int) -> dict[tuple[str, int], str]:
        """The blocks whose maps are large enough in latents of this size, and whose self-attention is the host's own
        and replaced by nobody: the host never calls the module of one that is.
        """
        shapes, shifted = sizes(self._whole, height, width), self._settings.shifted
        large = {
            block: address
            for block, address in self.blocks.items()
            for h, w in [shapes[address]]
            if self._settings.on(h, w, shifted)
        }
        theirs = {key[:2] for key in options.get("patches_replace", {}).get("attn1", {})}
        taken = {
            block: address
            for block, address in large.items()
            if block in theirs or not _is_the_hosts(self.layers.get(address))  # carried over to who plays it
        }
        if taken:
            self._say(
                f"another node changes or replaces the self-attention of {', '.join(taken.values())}; GRI leaves it to "
                "that node."
            )
        return {block: address for block, address in large.items() if block not in taken}

    def entered(self, options: dict, blocks: Mapping[tuple[str, int], str]) -> dict:
        """The options with GRI in some blocks."""
        if not blocks:
            return options
        replace = options.get("patches_replace", {})
        attn1 = {**dict.fromkeys(blocks, self.play), **replace.get("attn1", {})}
        return {**options, "patches_replace": {**replace, "attn1": attn1}}

    def close(self) -> None:
        self.layers, self.log_gains = {}, {}

    def play(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        """The host's attn1 replace: (B, N, heads * dim) in and out."""
        heads, precision = options["n_heads"], options.get("attn_precision")
        height, width = options["activations_shape"][-2:]
        is_map = q.shape[1] == height * width and q.shape == k.shape == v.shape
        if options["block"] in self.videos:
            # Frames lie in the batch of a map, and the map in the batch of frames. Where both fit nobody can tell.
            batch = options["activations_shape"][0]
            is_map = is_map and q.shape[0] == batch and batch % (height * width) != 0
        elif not is_map:
            self._say(
                "another node (HyperTile, Token Merging, a reference) changes what self-attention sees; there GRI is "
                "off."
            )
        # The host counts transformers, so neighbours alternate.
        gri = (
            self._settings.on(height, width, self._settings.shifted and options["transformer_index"] % 2 == 1)
            if is_map
            else None
        )
        if gri is None:
            return attention.optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)

        def attend(q, k, v, scale, bias):
            out = attention.optimized_attention(
                q,
                k,
                v,
                heads,
                mask=bias,
                attn_precision=precision,
                skip_reshape=True,
                scale=scale,
                transformer_options=options,
            )
            return out.unflatten(2, (heads, -1)).transpose(1, 2)

        q, k, v = (t.unflatten(2, (heads, -1)) for t in (q, k, v))
        log_gain = self.log_gains.get(self.blocks.get(options["block"], ""), {}).get(options.get("block_index", 0))
        return gri_attention(q, k, v, height, width, gri, log_gain=log_gain and log_gain(q), attend=attend).flatten(2)
