"""GRI attention inside a run: where it enters the host's forward, and when it leaves a block alone.

It enters as the host's attn1 replace, put into the options of each forward and not into the MODEL: by then everybody
else has entered his own, before or after our node, and keeps what he has. Nobody is overwritten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from comfy.ldm.modules import attention
from torch import Tensor

from ...asdm_core.addresses import UNetConfig, walk
from ...asdm_core.assignment import Window
from ...asdm_core.gri import GRI, PAYS_FROM, gri_attention


@dataclass(frozen=True)
class Regional:
    """GRI attention on a MODEL: window and pool (0: by the size of the map), on so many of the shallowest levels that
    have attention, within a stretch of the run. shifted: every other layer's windows lie half a window further.

    Raises ValueError for a window that does not consist of whole cells.
    """

    window: int = 0
    pool: int = 0
    stages: int = 2
    shifted: bool = False
    when: Window = Window()

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


class Attention:
    """The self-attention of one UNet object during one run."""

    def __init__(self, settings: Regional, config: UNetConfig):
        self._settings = settings
        self.blocks = settings.blocks(config)
        self._said: set[str] = set()
        self.log_gains: dict[
            str, dict[int, Callable[[Tensor], Tensor]]
        ] = {}  # transformer -> block -> log gains of its heads
        self.name = f"gri{settings.window}x{settings.pool}x{settings.stages}{'s' * settings.shifted}"

    def enter(self, options: dict) -> dict:
        """The options of a forward with GRI in all blocks whose self-attention nobody else replaces."""
        replace = options.get("patches_replace", {})
        theirs = replace.get("attn1", {})
        taken = [address for block, address in self.blocks.items() if any(key[:2] == block for key in theirs)]
        if taken:
            self._say(f"another node replaces the self-attention of {', '.join(taken)}; GRI leaves it to that node")
        return {**options, "patches_replace": {**replace, "attn1": {**dict.fromkeys(self.blocks, self.play), **theirs}}}

    def play(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        """The host's attn1 replace: (B, N, heads * dim) in and out."""
        heads, precision = options["n_heads"], options["attn_precision"]
        height, width = options["activations_shape"][-2:]
        is_map = q.shape[1] == height * width and q.shape == k.shape == v.shape
        if not is_map:
            self._say(
                "another node (HyperTile, Token Merging, a reference) changes what self-attention sees; there GRI is "
                "off"
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
        log_gain = self.log_gains.get(self.blocks.get(options["block"]), {}).get(options["block_index"])
        return gri_attention(q, k, v, height, width, gri, log_gain=log_gain and log_gain(q), attend=attend).flatten(2)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logging.warning(f"asdm: {text}.")
