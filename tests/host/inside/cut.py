"""Cut UNets in the host's own UNetModel: names, detection, and equality with the renumbered networks."""

import comfy.model_detection
import comfy.ops
import pytest
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
