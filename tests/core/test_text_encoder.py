"""Text encoders that come with a UNet: read in full, and refused when something is wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file

from asdm_core import text_encoder
from asdm_core.tensor_file import BadFile
from tests.core.narrow import equal

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 8,
    "bos_token_id": 18,
    "eos_token_id": 19,
    "pad_token_id": 19,
    "vocab_size": 20,
}


def write_text_encoder(path, config=TEXT, **changes):
    """As transformers' own model has it, with three rows of the table; changes: tensors by name, None for none."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**(TEXT | {"vocab_size": 3, "bos_token_id": 0, "eos_token_id": 2})))
    sd = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in model.named_parameters()}
    sd |= {"token_ids": torch.tensor([4, 18, 19], dtype=torch.int32)} | changes
    text = config if isinstance(config, str) else json.dumps(config)
    save_file({k: v.detach() for k, v in sd.items() if v is not None}, path, {"text_config": text})
    return sd


def test_text_encoders_get_their_whole_table(tmp_path):
    sd = write_text_encoder(tmp_path / "text.safetensors")
    config, weights = text_encoder.open_text_encoder(tmp_path / "text.safetensors")
    table = weights.pop(text_encoder.TOKEN_TABLE)
    assert config == TEXT and table.shape == (20, 8)
    assert torch.equal(table[[4, 18, 19]], sd[text_encoder.TOKEN_TABLE]) and table.count_nonzero() == 24
    assert equal(weights, {k: v for k, v in sd.items() if k not in (text_encoder.TOKEN_TABLE, "token_ids")})


BIAS = "text_model.encoder.layers.1.mlp.fc1.bias"


@pytest.mark.parametrize(
    "config, changes, message",
    [
        ("[" * 100_000, {}, "not valid JSON"),
        ("[]", {}, "not a JSON object"),
        ({k: v for k, v in TEXT.items() if k != "vocab_size"}, {}, "vocab_size must be"),
        (TEXT | {"vocab_size": 10**12}, {}, "vocab_size must be"),
        (TEXT | {"num_hidden_layers": "2"}, {}, "num_hidden_layers must be"),
        (TEXT | {"num_hidden_layers": 3}, {}, "missing"),
        (TEXT | {"num_attention_heads": 3}, {}, "cannot share"),
        (TEXT | {"eos_token_id": 20}, {}, "eos_token_id must be"),
        (TEXT | {"hidden_act": "rm"}, {}, "hidden_act"),
        (TEXT, {BIAS: None}, f"{BIAS} has shape none"),
        (TEXT, {BIAS: torch.zeros(13)}, f"{BIAS} has shape \\(13,\\)"),
        (TEXT, {BIAS: torch.full((12,), torch.nan)}, "not finite"),
        (TEXT, {BIAS: torch.zeros(12, dtype=torch.int64)}, "dtype I64"),
        (TEXT, {"more": torch.zeros(1)}, "no such tensor"),
        (TEXT, {"token_ids": torch.tensor([4, 18, 20])}, "must lie below 20"),
        (TEXT, {"token_ids": torch.tensor([-1, 18, 19])}, "must lie below 20"),
        (TEXT, {"token_ids": torch.tensor([4.0, 18.0, 19.0])}, "list of whole numbers"),
        (TEXT, {"token_ids": torch.tensor(4)}, "list of whole numbers"),
        (TEXT, {"token_ids": torch.tensor([4, 18], dtype=torch.int64)}, "token_embedding"),
        (TEXT, {"token_ids": None}, "no token_ids"),
    ],
)
def test_wrong_text_encoders(tmp_path, config, changes, message):
    write_text_encoder(tmp_path / "text.safetensors", config, **changes)
    with pytest.raises(BadFile, match=message):
        text_encoder.open_text_encoder(tmp_path / "text.safetensors")
