"""Captions in rows, clip skip, the encoders of a checkpoint; what the host makes of them: tests/host/inside/text.py."""

import pytest
import torch
from safetensors.torch import save_file

from train import encoders
from train.encoders import Text, alike, has_vae, its_clip_skip, joined
from train.prompts import Tokeniser, emphasised


class Letters:
    """A tokeniser whose words are letters: 1 and 2 begin and end."""

    def __call__(self, text):
        return {"input_ids": [1, *(ord(c) for c in text if c != " "), 2]}


def rows(prompt, length=12, most=9, pad=None):
    return [[tuple(token) for token in row] for row in Tokeniser(Letters(), length, most, pad)(prompt)]


def test_emphasis_multiplies_by_itself_and_is_set_by_a_number():
    assert emphasised("a (b) ((c)) (d:1.5) \\(e\\)") == [
        ("a ", 1.0),
        ("b", 1.1),
        (" ", 1.0),
        ("c", 1.1 * 1.1),
        (" ", 1.0),
        ("d", 1.5),
        (" (e)", 1.0),
    ]


def test_words_are_no_weights_and_a_year_is_told(capsys):
    for words in ("Avengers: Infinity", "a: nan"):
        assert emphasised(f"({words})") == [(words, 1.1)]
    tokenise = Tokeniser(Letters(), 12, 2)
    tokenise("(Berlin: 1945)"), tokenise("(Rome: 1946)")
    assert capsys.readouterr().out == (
        "captions: 'Berlin' has weight 1945, as ComfyUI reads it; \\( and \\) are plain\n"
    )


def test_a_row_begins_ends_and_is_filled():
    a = ord("a")
    assert rows("aa") == [[(1, 1.0), (a, 1.0), (a, 1.0), *[(2, 1.0)] * 9]]
    assert rows("aa", pad=0)[0][4:] == [(0, 1.0)] * 8 and rows("", pad=0)[0] == [(1, 1.0), (2, 1.0), *[(0, 1.0)] * 10]


def test_short_pieces_are_not_parted_and_long_ones_are():
    a, b = ord("a"), ord("b")
    short = rows("aaaaaaaaa (bbb)", length=12)  # 9 + 3 > 10 places: the second begins a row
    assert [t for t, _ in short[0]] == [1, *[a] * 9, 2, 2] and [t for t, _ in short[1]][:5] == [1, b, b, b, 2]
    long = rows("aaa (bbbbbbbbb)", length=12)
    assert [t for t, _ in long[0]] == [1, a, a, a, *[b] * 7, 2] and [t for t, _ in long[1]][:4] == [1, b, b, 2]
    assert {w for t, w in long[1] if t == b} == {1.1}


def test_what_is_too_long_is_cut_and_that_is_said_once(capsys):
    tokenise = Tokeniser(Letters(), 12, 2)
    assert len(tokenise("a" * 100)) == 2 and len(tokenise("a" * 100)) == 2 and len(tokenise("a" * 20)) == 2
    assert capsys.readouterr().out == "captions: cut after 20 tokens (encoders.rows)\n"
    tokenise("a, embedding:b")
    assert "embeddings are not loaded in training" in capsys.readouterr().out


def test_states_of_different_lengths_are_repeated_which_attention_does_not_see():
    g = torch.Generator().manual_seed(0)
    states = [torch.randn(1, length, 8, generator=g, dtype=torch.float64) for length in (4, 8, 12)]
    q = torch.randn(1, 5, 8, generator=g, dtype=torch.float64)
    together = alike(states)
    assert [s.shape[1] for s in together] == [24] * 3
    for one, other in zip(states, together, strict=True):
        torch.testing.assert_close(*(torch.nn.functional.scaled_dot_product_attention(q, s, s) for s in (one, other)))
    text = joined([Text(states[0]), Text(states[1])])
    dropped = text.where_not(torch.tensor([True, False]), Text(states[0][:, :2]))
    assert torch.equal(dropped.states[0], states[0][0, :2].repeat(4, 1)) and torch.equal(
        dropped.states[1], states[1][0]
    )


@pytest.mark.parametrize(
    ("metadata", "key", "wanted"),
    [
        ({}, "x", 1),
        ({}, encoders.XL_TEXT[1] + "ln_final.weight", 2),
        ({"modelspec.encoder_layer": "2"}, "x", 2),
        ({"ss_clip_skip": "2"}, "x", 2),
        ({"ss_clip_skip": "None"}, "x", 1),
        ({"modelspec.encoder_layer": "1"}, encoders.XL_TEXT[1] + "ln_final.weight", 1),
    ],
)
def test_a_checkpoint_says_its_clip_skip_or_its_family_does(metadata, key, wanted, tmp_path):
    save_file({key: torch.zeros(1)}, tmp_path / "a.safetensors", metadata or None)
    assert its_clip_skip(tmp_path / "a.safetensors") == wanted
    assert not has_vae(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors holds no VAE"):
        encoders.load_vae(tmp_path / "a.safetensors")
    for folder, skip in (("text_encoder", 1), ("text_encoder_2", 2)):
        (tmp_path / folder).mkdir()
        assert its_clip_skip(tmp_path) == skip
