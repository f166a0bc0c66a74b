"""UNets that are no text-to-image ones of SD: layers without self-attention, other inputs, frames of a video."""

from dataclasses import replace

import comfy.ldm.modules.attention as attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import pytest
import small
import torch
from in_host import execute, module

inheritance, units = module("asdm_core.inheritance"), module("nodes.engine.units")
GRI = {"window": 4, "pool": 2, "stages": 2, "shifted": False, "start_percent": 0.0, "end_percent": 1.0}
PIX2PIX, EXTRA = replace(small.SD, in_channels=8), {"concat_latent_image": torch.randn(1, 4, 16, 16)}


def model_of(base, **more):
    """A MODEL of a host class with a narrow UNet of SD's shape, its arguments changed, and random weights."""
    config = base({**small.SD.to_host(), **more})
    config.unet_config.update(num_heads=4, num_head_channels=-1)
    config.set_inference_dtype(torch.float32, None)
    built = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for name, weight in built.diffusion_model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            one = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(noise / weight[0].numel() ** 0.5 if weight.dim() > 1 else one + 0.1 * noise)
    return comfy.model_patcher.CoreModelPatcher(
        built,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def of_text(*levels):
    """A UNet whose first attentions on some levels attend to the text."""
    return model_of(comfy.supported_models.SD15, disable_self_attentions=[n in levels for n in range(4)])


# Layers without self-attention ----------------------------------------------------------------------


@pytest.fixture
def attended(monkeypatch):
    """{module of attention: calls} while the host runs its blocks."""
    seen = {}
    forward = attention.CrossAttention.forward

    def counted(self, *args, **given):
        seen[self] = seen.get(self, 0) + 1
        return forward(self, *args, **given)

    monkeypatch.setattr(attention.CrossAttention, "forward", counted)
    return seen


def test_gri_leaves_blocks_alone_that_attend_to_the_text(caplog):
    model = of_text(0)
    plain = small.sample(model)
    shallowest = execute("ASDMGRIAttention", model=model, **{**GRI, "stages": 1})[0]
    assert torch.equal(small.sample(shallowest), plain)
    assert "nothing to do" in caplog.text and "another node" not in caplog.text
    caplog.clear()
    both = execute("ASDMGRIAttention", model=model, **GRI)[0]
    assert small.difference(small.sample(both), plain) > 0.001
    assert not caplog.text


def test_attention_plans_leave_blocks_alone_that_attend_to_the_text(attended):
    model, steps = of_text(0, 1), 4
    kept = small.with_plan(model, inheritance.attention(small.SD))
    small.sample(kept, steps=steps)
    blocks = {
        address: [block for block in layer.transformer_blocks]
        for address, layer in units.layers(model.model.diffusion_model, small.SD).items()
        if units.passes_on(layer) is False and hasattr(layer, "transformer_blocks")
    }
    times = {address: {attended.get(b.attn1, 0) for b in found} for address, found in blocks.items()}
    deep = {a for a in times if a.startswith(("down.2", "up.1", "mid"))}
    assert deep and deep < times.keys()
    assert all(times[a] == {steps} for a in times.keys() - deep), times
    assert all(max(times[a]) < steps for a in deep), times


def test_where_all_blocks_attend_to_the_text_attention_plans_change_nothing_and_say_so(caplog):
    model = of_text(0, 1, 2, 3)
    model.model.diffusion_model.middle_block[1].transformer_blocks = torch.nn.ModuleList()
    kept = small.with_plan(model, inheritance.attention(small.SD, "attn1"))
    assert torch.equal(small.sample(kept, steps=4), small.sample(model, steps=4))
    assert caplog.text.count("feature inheritance did nothing in this run") == 1
    caplog.clear()
    small.sample(small.with_plan(of_text(0), inheritance.attention(small.SD, "attn1")), steps=4)
    assert "did nothing" not in caplog.text


def test_whole_layers_inherit_in_such_unets(folder):
    model = of_text(0)
    kept = small.with_plan(model, inheritance.deepcache(small.SD, 1))
    full, inherited = small.sample(model, steps=4), small.sample(kept, steps=4)
    assert not torch.equal(inherited, full)
    assert "inherited" in small.last_run(kept).roles()


def test_packs_with_self_attention_and_save_refuse_such_unets(m2):
    model = of_text(0)
    with pytest.raises(ValueError, match="attends to the text"):
        small.with_pack(model, m2)
    with pytest.raises(ValueError, match="attends to the text"):
        execute("ASDMSaveUNet", model=model, filename_prefix="x", dtype="fp16", dequantise=False)


# Other numbers of input channels --------------------------------------------------------------------


def test_eight_channels_are_an_image_beside_the_latents(folder):
    path = small.write_unet(folder / "pix2pix.safetensors", PIX2PIX)
    right = comfy.supported_models.SD15_instructpix2pix(PIX2PIX.to_host())
    right.unet_config.update(num_heads=4, num_head_channels=-1)
    right.set_inference_dtype(torch.float32, None)
    built = right.get_model({}, "")
    built.load_model_weights(dict(small.weights(PIX2PIX)), "")
    device = comfy.model_management.get_torch_device()
    stock = comfy.model_patcher.CoreModelPatcher(built, device, comfy.model_management.unet_offload_device())
    given = {"positive": small.cond(PIX2PIX, 1, **EXTRA), "negative": small.cond(PIX2PIX, 2, **EXTRA)}
    ours = small.models.load_unet(path)
    assert torch.equal(small.sample(ours, PIX2PIX, **given), small.sample(stock, PIX2PIX, **given))
    assert not torch.equal(small.sample(ours, PIX2PIX, **given), small.sample(ours, PIX2PIX))
    velocity = small.models.load_unet(small.write_unet(folder / "v.safetensors", PIX2PIX, prediction="v"))
    assert velocity.model.model_type == comfy.model_base.ModelType.V_PREDICTION


def test_nine_channels_are_inpainting_and_others_nothing_of_the_kind(folder, caplog):
    nine = small.models.load_unet(small.write_unet(folder / "nine.safetensors", replace(small.SD, in_channels=9)))
    assert nine.model.concat_keys == ("mask", "masked_image")
    assert not caplog.text
    for channels in (5, 7, 12):
        path = small.write_unet(folder / f"{channels}.safetensors", replace(small.SD, in_channels=channels))
        assert small.models.load_unet(path).model.concat_keys == ()
        assert f"{channels} channels" in caplog.text


# Frames ---------------------------------------------------------------------------------------------


@pytest.mark.sweep(1)
@pytest.mark.parametrize("frames", (3, 16))
def test_attention_over_frames_is_no_other_node(frames, caplog):
    """As many frames as a map of 4 x 4 has tokens is the case in which shapes tell nothing."""
    video = model_of(
        comfy.supported_models.SVD_img2vid,
        in_channels=8,
        adm_in_channels=768,
        num_classes="sequential",
        use_temporal_attention=True,
        use_temporal_resblock=True,
        video_kernel_size=[3, 1, 1],
        extra_ff_mix_layer=True,
        use_spatial_context=True,
        merge_strategy="learned_with_images",
        merge_factor=0.0,
    )
    given = {"size": (16, 16), "batch": frames, "cfg": 1.0}
    plain = small.sample(video, **given)
    regional = execute("ASDMGRIAttention", model=video, **{**GRI, "stages": 4})[0]
    found = small.sample(regional, **given)
    assert small.difference(found, plain) > 1e-4
    assert not caplog.text
    covering = execute("ASDMGRIAttention", model=video, **{**GRI, "window": 16, "stages": 4})[0]
    assert torch.equal(small.sample(covering, **given), plain)
