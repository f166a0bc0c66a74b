import torch

from train.emoji.captions import held_out
from train.emoji.codec import Codec
from train.emoji.teacher import TEACHER_STYLES, plain_latents


@torch.no_grad()
def test_plain_latents_are_one_upright_picture_of_each_taught_glyph(glyphs):
    torch.manual_seed(0)
    codec = Codec().eval()
    data = plain_latents(glyphs, codec)
    kept = [(s, i) for s in TEACHER_STYLES for i, c in enumerate(glyphs.concepts) if not held_out(c.code, "style", s)]
    assert [(v.style, v.concept) for v in data.variants] == kept and len(data.latents) == len(kept) < 2 * len(glyphs.concepts)
    assert {v.background for v in data.variants} == {"white"}
    i = len(kept) - 3
    wanted = codec.encode(glyphs.pictures(data.variants[i].style, [data.variants[i].concept])).half()
    torch.testing.assert_close(data.latents[i : i + 1], wanted, rtol=1e-2, atol=1e-2)
