"""Text encoders of the embedded family on disk: CLIP's layout, with only the tokens in use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .surgery import StateDict
from .tensor_file import BadFile, TensorFile, check_values
from .text import printable, read_json

# What the config of one must say, with the largest value that is taken: some ten times what known ones have.
_TEXT_CONFIG = {
    "hidden_size": 8192,
    "intermediate_size": 65_536,
    "num_hidden_layers": 200,
    "num_attention_heads": 200,
    "max_position_embeddings": 4096,
    "projection_dim": 8192,
    "vocab_size": 500_000,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


def text_shapes(config: Mapping[str, Any], rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a text encoder in CLIP's layout, with so many rows in its table of tokens."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        TOKEN_TABLE: (rows, wide),
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], wide),
        "text_model.final_layer_norm.weight": (wide,),
        "text_model.final_layer_norm.bias": (wide,),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"text_model.encoder.layers.{i}"
        linears = {f"self_attn.{to}": (wide, wide) for to in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, shape in (linears | {"mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner)}).items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (wide,), f"{at}.{norm}.bias": (wide,)}
    return shapes


def open_text_encoder(path: str | os.PathLike[str]) -> tuple[dict[str, Any], StateDict]:
    """Config and weights of a text encoder of the embedded family, in CLIP's layout and with the whole table of tokens.

    Its file holds only the rows in use (`token_ids`); words that were never trained are zero vectors: they say nothing,
    instead of something random. Raises BadFile.
    """
    file = TensorFile(path)

    def bad(why: str) -> BadFile:
        return BadFile(f"{file.path.name}: this is no text encoder of the embedded family: {why}")

    if "text_config" not in file.metadata or "token_ids" not in file:
        raise bad("no text_config or no token_ids in it")
    try:
        config = read_json(file.metadata["text_config"])
    except ValueError:
        raise bad("its text_config is not valid JSON") from None
    if not isinstance(config, dict):
        raise bad("its text_config is not a JSON object")
    for name, highest in _TEXT_CONFIG.items():
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
            raise bad(f"{name} must be a whole number from 1 to {highest}, got {printable(repr(value))}")
    for name in _TOKENS:
        value = config.get(name, None if name == "eos_token_id" else 0)  # the one that ComfyUI reads
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < config["vocab_size"]:
            raise bad(f"{name} must be a token below {config['vocab_size']}, got {printable(repr(value))}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise bad(f"{config['num_attention_heads']} heads cannot share {config['hidden_size']} channels")
    epsilon = config.get("layer_norm_eps", 1e-5)
    if config.get("hidden_act") not in ("quick_gelu", "gelu") or not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise bad("hidden_act must be quick_gelu or gelu, and layer_norm_eps lie between 0 and 1")
    (rows, *rest), kind = file.shapes["token_ids"] or (0, 0), file.dtypes["token_ids"]  # a single number has no rows
    if rest or kind not in ("I32", "I64") or rows > config["vocab_size"]:
        raise bad(f"token_ids ({printable(kind)}, {list(file.shapes['token_ids'])}) must be a list of whole numbers")
    ids = file["token_ids"].long()
    wanted = text_shapes(config, rows)
    if rows and not 0 <= int(ids.min()) <= int(ids.max()) < config["vocab_size"]:
        raise bad(f"token_ids must lie below {config['vocab_size']}, got {int(ids.min())} to {int(ids.max())}")
    found = {k: s for k, s in file.shapes.items() if k != "token_ids"}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise bad(
                f"{printable(key)} has shape {printable(found.get(key, 'none (it is missing)'))}; wanted "
                f"{wanted.get(key, 'no such tensor')}"
            )
    check_values(file, found)
    weights = {key: file[key] for key in found}
    table = torch.zeros(config["vocab_size"], config["hidden_size"], dtype=weights[TOKEN_TABLE].dtype)
    table[ids] = weights[TOKEN_TABLE]
    return config, weights | {TOKEN_TABLE: table}
