"""Cut UNets in the host's own UNetModel: names, detection, and equality with the renumbered networks."""

import comfy.model_detection
import comfy.ops
import pytest
import reference
import small
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from in_host import module
from small import Architecture

addresses, architecture, surgery = small.addresses, small.architecture, small.surgery
units = module("nodes.engine.units")
PRESETS = [pytest.param(preset, id=preset) for preset in architecture.PRESETS]


def narrow(preset):
    family = architecture.PRESETS[preset].family
    return small.SDXL if family == "sdxl" else small.SD


def build(config, **more):
    return UNetModel(**config.to_host(), dtype=torch.float32, operations=comfy.ops.disable_weight_init, **more)


def shapes(network):
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def slot_shapes(table):
    return {k: s.shape for k, s in table.items()}


def network(config, weights, device="cpu"):
    unet = build(config, device=device)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def cut_and_renumbered(config, chosen, seed=0):
    """The same pruned UNet twice: a cut skeleton, and the host's UNetModel of the renumbered config."""
    weights, _ = surgery.cut(small.weights(config, seed), chosen)
    skeleton = build(config, device="meta")
    surgery.cut_modules(skeleton, chosen, "ldm", units.stand_in)
    skeleton.load_state_dict(weights, assign=True)
    renumbered = surgery.convert(weights, chosen, surgery.ADDRESSED, surgery.Form("ldm", "renumbered"))
    return skeleton.eval(), network(chosen.renumbered.config, renumbered)


def inputs(config, height, width, batch=2):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    context = torch.randn(batch, 7, config.context_dim, generator=generator)
    y = torch.randn(batch, config.adm_channels, generator=generator) if config.adm_channels else None
    return {"x": x, "timesteps": torch.linspace(900, 100, batch), "context": context, "y": y}


@pytest.mark.parametrize("family", architecture.FAMILIES)
def test_host_has_the_keys_of_every_family(family):
    config = architecture.FAMILIES[family]
    assert shapes(build(config, device="meta")) == slot_shapes(addresses.keys(config))


@pytest.mark.parametrize("preset", PRESETS)
def test_host_has_the_keys_of_every_renumbered_preset(preset):
    chosen = Architecture.preset(preset)
    assert shapes(build(chosen.renumbered.config, device="meta")) == slot_shapes(chosen.keys("ldm", "renumbered"))


@pytest.mark.parametrize("preset", PRESETS)
def test_host_detects_renumbered_presets(preset):
    chosen = Architecture.preset(preset)
    weights = {k: torch.empty(s.shape, device="meta") for k, s in chosen.keys("ldm", "renumbered").items()}
    found = comfy.model_detection.detect_unet_config(weights, "")
    wanted = chosen.renumbered.config.to_host()
    told = (found.keys() & wanted.keys()) - {"num_heads", "num_head_channels"}
    assert told >= {
        "num_res_blocks",
        "transformer_depth",
        "transformer_depth_output",
        "transformer_depth_middle",
        "channel_mult",
    }
    assert {k: found[k] for k in told} == {k: wanted[k] for k in told}
    detected = comfy.model_detection.model_config_from_unet(weights, "")
    assert detected is not None
    # The family's own class fills in the heads.
    assert {k: detected.unet_config[k] for k in ("num_heads", "num_head_channels")} == {
        k: wanted[k] for k in ("num_heads", "num_head_channels")
    }


@pytest.mark.sweep(2)
@pytest.mark.parametrize("preset", PRESETS)
def test_cut_equals_renumbered(preset):
    config = narrow(preset)
    skeleton, renumbered = cut_and_renumbered(config, Architecture.preset(preset, config))
    for size in ((16, 16), (13, 19)):
        with torch.no_grad():
            assert torch.equal(skeleton(**inputs(config, *size)), renumbered(**inputs(config, *size))), size


@pytest.mark.parametrize("preset", ["tiny", "koala-700m"])
def test_cut_unit_changes_the_output(preset):
    config = narrow(preset)
    skeleton, renumbered = cut_and_renumbered(config, Architecture.preset(preset, config))
    full = network(config, small.weights(config))
    with torch.no_grad():
        assert small.difference(skeleton(**inputs(config, 16, 16)), full(**inputs(config, 16, 16))) > 0.01


# Who counts layers ------------------------------------------------------------------------------------------


def counted(unet, name):
    """The layers of a class as other packs find them: by the class's name, in order."""
    return [path for path, module in unet.named_modules() if type(module).__name__ == name]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "config, preset", [(small.SD, "base"), (small.SD, "small"), (small.SDXL, "koala-700m"), (small.SDXL, "ssd-1b")]
)
def test_packs_that_count_transformer_blocks_count_all_of_them(folder, config, preset):
    chosen = small.Architecture.preset(preset, config)
    path = folder / f"{preset}-counted.safetensors"
    description = small.packs.Description("unet", chosen, prediction="eps")
    small.packs.write_unet(path, small.surgery.cut(small.weights(config), chosen)[0], description)
    pruned, full = small.models.load_unet(str(path)), small.model(folder, config)
    cut, whole = pruned.model.diffusion_model, full.model.diffusion_model
    for name in ("BasicTransformerBlock", "CrossAttention", "SpatialTransformer", "ResBlock"):
        assert counted(cut, name) == counted(whole, name)
    for at in counted(whole, "BasicTransformerBlock"):
        mine, its = cut.get_submodule(at), whole.get_submodule(at)
        assert isinstance(mine, type(its))
        for attention in ("attn1", "attn2"):
            a, b = getattr(mine, attention), getattr(its, attention)
            assert isinstance(a, type(b)) and (a.heads, a.dim_head) == (b.heads, b.dim_head)
            for layer in (lambda m: m.to_q, lambda m: m.to_k, lambda m: m.to_v, lambda m: m.to_out[0]):
                assert layer(a).weight.shape == layer(b).weight.shape
                assert (layer(a).bias is None) == (layer(b).bias is None)
                assert (layer(a).in_features, layer(a).out_features) == (layer(b).in_features, layer(b).out_features)
        assert mine.ff.net[0].proj.weight.shape == its.ff.net[0].proj.weight.shape
        assert mine.norm1.weight.shape == its.norm1.weight.shape
        assert (mine.n_heads, mine.d_head) == (its.n_heads, its.d_head)
    # They are no weights: what is saved, moved and patched is what the file holds.
    held = set(cut.state_dict())
    assert held == {key for key, slot in small.addresses.keys(config).items() if chosen.has(slot)}


def test_a_pack_that_numbers_layers_by_counting_changes_the_same_ones(model, folder, combined):
    def changed(m):
        """The forward of every third cross-attention, by number, scaled by its number."""
        clone = m.clone()
        paths = [p for p in counted(m.model.diffusion_model, "CrossAttention") if p.endswith("attn2")]
        for number, path in enumerate(paths):
            if number % 3 == 0:
                own = m.get_model_object(f"diffusion_model.{path}").forward
                clone.add_object_patch(
                    f"diffusion_model.{path}.forward",
                    lambda *args, own=own, n=number, **more: (1 + n) * own(*args, **more),
                )
        return clone

    base = small.combined(folder, preset="base")
    chosen = small.Architecture.preset("base", small.SD)
    # The same network as forward hooks make it of an unpruned one.
    whole = folder / "whole-of-base.safetensors"
    weights = small.surgery.combine(small.weights(small.SD, 0), small.weights(small.SD, 1), chosen, chosen.pack_units())
    description = small.packs.Description("unet", small.Architecture.full(small.SD), prediction="eps")
    small.packs.write_unet(whole, {**small.weights(small.SD, 0), **weights}, description)
    full = small.models.load_unet(str(whole))
    with reference.cut(full, chosen):
        wanted = small.sample(changed(full))
        assert small.difference(wanted, small.sample(full)) > 1e-3
    assert small.difference(small.sample(changed(base)), wanted) < 1e-5
