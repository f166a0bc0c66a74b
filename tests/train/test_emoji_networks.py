import json

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open

from asdm_core.architecture import FAMILIES
from asdm_core.tensor_file import dequantise, quantise
from train.emoji import unet as unets
from train.diffusion import ALPHAS, coefficients, ddim, noised, schedule, step_weights
from train.emoji.text import LENGTH, TextEncoder, host_folder

TABLE = "text_model.embeddings.token_embedding.weight"


@torch.no_grad()
def test_own_attention_equals_fused_attention(tiny):
    torch.manual_seed(0)
    net = unets.build(tiny).eval()
    x = torch.randn(2, 4, 16, 16)
    t = torch.tensor([3, 900])
    context = torch.randn(2, 77, 32)
    ours = net(x, t, context).sample
    net.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(ours, net(x, t, context).sample, rtol=1e-4, atol=1e-5)


def test_the_family_has_the_shape_of_sd15():
    net = unets.build()
    config = FAMILIES["emoji"]
    assert set(unets.addressed(net)) == set(unets.addressed(net, config))
    assert [b.heads for b in net.modules() if hasattr(b, "heads")] == [4] * 32
    assert net.time_embedding.linear_1.out_features == 4 * 64


@torch.no_grad()
def test_a_stored_unet_is_the_network_after_int8(tiny, tmp_path):
    torch.manual_seed(0)
    net = unets.build(tiny)
    unets.save_unet(tmp_path / "a.safetensors", net, "CC0-1.0", {"steps": 1}, tiny)
    back = unets.load_unet(tmp_path / "a.safetensors")
    # After a round trip through int8 storage: the network everything later starts from.
    wanted = {
        k: v.detach().float() if v.dim() < 2 else dequantise(*quantise(v))
        for k, v in unets.addressed(net, tiny).items()
    }
    for key, value in unets.addressed(back, tiny).items():
        assert torch.equal(value, wanted[key]), key
    # Once stored, storing again changes nothing: everything later starts from the same network.
    unets.save_unet(tmp_path / "b.safetensors", back, "CC0-1.0", {"steps": 1}, tiny)
    again = unets.load_unet(tmp_path / "b.safetensors")
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, back.state_dict()[key], rtol=1e-6, atol=1e-9)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as f:
        description = json.loads(f.metadata()["asdm"])
        assert f.get_tensor("input_blocks.1.0.in_layers.2.weight").dtype == torch.int8
        assert f.get_tensor("input_blocks.1.0.in_layers.2.weight.scale").shape == (32,)
    assert description["prediction"] == "v" and description["companions"]["vae"] == "emoji-vae.safetensors"


@torch.no_grad()
def test_the_text_encoder_reads_from_left_to_right():
    torch.manual_seed(0)
    encoder = TextEncoder(list(range(8))).eval()
    a, b = torch.randint(0, 7, (1, LENGTH)), torch.randint(0, 7, (1, LENGTH))
    b[:, :5] = a[:, :5]
    torch.testing.assert_close(encoder(a)[:, :5], encoder(b)[:, :5])


def test_a_wrong_host_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="sd1_tokenizer"):
        host_folder(tmp_path)


def test_noise_schedule_is_sd15s():
    from diffusers import DDIMScheduler

    wanted = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    torch.testing.assert_close(ALPHAS, wanted, rtol=1e-4, atol=1e-7)


def test_v_and_x0_are_two_views_of_one_thing():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 4, 8, 8, generator=g)
    t = torch.tensor([0, 500, 999])
    x, v = noised(x0, eps, t)
    a, s = coefficients(t)
    torch.testing.assert_close(a * x - s * v, x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s * x + a * v, eps, rtol=1e-4, atol=1e-5)


def test_a_perfect_network_samples_the_picture():
    x0 = torch.randn(2, 4, 8, 8)

    def predict_v(x, t, context):
        a, s = coefficients(t)
        target = x0.repeat(len(x) // 2, 1, 1, 1)
        return a * (x - a * target) / s - s * target

    out = ddim(predict_v, torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 1), torch.zeros(1, 1, 1), steps=5, cfg=3.0)
    torch.testing.assert_close(out, x0, rtol=1e-4, atol=1e-4)
    assert schedule(20)[0] == 999 and len(schedule(20)) == 20


def test_time_steps_are_drawn_where_there_is_noise():
    p = step_weights()
    assert abs(float(p.sum()) - 1) < 1e-4 and float(p.min()) >= 0.2 / 1000
    assert p[900] > 4 * p[10]
