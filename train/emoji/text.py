"""The text encoder: CLIP's layout and tokeniser, small, with only the token rows that are in use.

Conditioning is the last hidden state after the final norm, over 77 positions, padded with the end
token as SD1.5 does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from asdm_core.tensor_file import write_file

from ..encoders import Text, ToText

VOCABULARY, LENGTH, BEGIN, END = 49408, 77, 49406, 49407
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 128,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": END,
    "vocab_size": VOCABULARY,
}
_TABLE = "text_model.embeddings.token_embedding.weight"


def host_folder(given: str | Path | None = None) -> Path:
    """The ComfyUI folder, which brings the CLIP tokeniser: given, COMFYUI_PATH, or the one bootstrap.py manages."""
    folder = given or os.environ.get("COMFYUI_PATH")
    if folder is None:
        from bootstrap import host_path

        folder = host_path()
    folder = Path(folder)
    if not (folder / "comfy" / "sd1_tokenizer").is_dir():
        raise ValueError(
            f"{folder} is no ComfyUI folder (comfy/sd1_tokenizer is missing); give one with --host or COMFYUI_PATH"
        )
    return folder


class Tokens:
    """Texts to token ids, and ids to rows of the compact table. ids: the ids in use, ascending."""

    def __init__(self, host: Path, ids: Sequence[int] | None = None, texts: Iterable[str] = ()):
        self.tokenizer = CLIPTokenizer.from_pretrained(host / "comfy" / "sd1_tokenizer")
        if ids is None:
            ids = sorted({BEGIN, END}.union(*(self.tokenizer(t)["input_ids"] for t in texts)))
        self.ids = list(ids)
        self.row = {token: row for row, token in enumerate(self.ids)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Rows of the compact table, (B, 77). Raises ValueError for a word outside the vocabulary in use."""
        rows = torch.full((len(texts), LENGTH), self.row[END])
        for i, tokens in enumerate(self.tokenizer(list(texts))["input_ids"] if texts else []):
            unknown = [t for t in tokens if t not in self.row]
            if unknown:
                raise ValueError(
                    f"{texts[i]!r} holds {self.tokenizer.convert_ids_to_tokens(unknown)}, which the emoji family "
                    "never saw; use names and keywords of its concepts"
                )
            rows[i, : min(len(tokens), LENGTH)] = torch.tensor([self.row[t] for t in tokens[:LENGTH]])
        return rows


class TextEncoder(nn.Module):
    """CLIPTextModel with a compact token table. forward: rows (B, 77) -> (B, 77, 128)."""

    ids: Tensor

    def __init__(self, ids: Sequence[int], **changes: Any):
        super().__init__()
        # Special ids only steer the pooled output, which is not used; the compact table has other numbers.
        special = {"vocab_size": len(ids), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        settings: dict[str, Any] = CONFIG | special | changes
        config = CLIPTextConfig(**settings)
        config._attn_implementation = "eager"  # fused attention is slower on CPU at this size
        self.clip = CLIPTextModel(config)
        self.register_buffer("ids", torch.tensor(list(ids), dtype=torch.int32), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.clip(input_ids=rows).last_hidden_state


def _clip_key(key: str) -> str:
    """Parameter name in the file: the classic CLIP names, which newer transformers shorten."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def save_text(path: Path, encoder: TextEncoder, training: Mapping) -> None:
    """Write the encoder with its compact table: weights in fp16, `token_ids` beside them, the config in the
    metadata.
    """
    sd = {_clip_key(k): v.half() for k, v in encoder.clip.named_parameters()}
    write_file(
        path,
        sd | {"token_ids": encoder.ids},
        {"format": "pt", "text_config": json.dumps(CONFIG), "training": json.dumps(dict(training))},
    )


def load_text(path: Path) -> TextEncoder:
    """The encoder of a file of `save_text`, float32, still with the compact table."""
    if not path.exists():
        raise ValueError(f"{path} is missing; the teacher's training makes it: `python -m train.emoji.teacher`")
    with safe_open(path, framework="pt") as f:
        sd = {k: f.get_tensor(k) for k in f.keys()}
        config = json.loads(f.metadata()["text_config"])
    ids = sd.pop("token_ids").tolist()
    changes = {
        k: v for k, v in config.items() if k not in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    encoder = TextEncoder(ids, **changes)
    with torch.no_grad():
        for key, p in encoder.clip.named_parameters():
            p.copy_(sd[_clip_key(key)])
    return encoder.eval()


def encoder_beside(checkpoint: Path) -> ToText:
    """The text encoder that lies beside a checkpoint of the family."""
    encoder = load_text(checkpoint.parent / "emoji-text.safetensors")
    tokens = Tokens(host_folder(), ids=encoder.ids.tolist())

    @torch.no_grad()
    def to_text(captions: Sequence[str]) -> Text:
        return Text(encoder(tokens(captions)))

    return to_text
