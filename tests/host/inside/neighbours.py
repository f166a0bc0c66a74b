"""What others do to a UNet still works, at the right places, when units are cut or played by a pack."""

import comfy.ops
import pytest
import small
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras import nodes_freelunch, nodes_hypertile, nodes_pag, nodes_sag
from in_host import module
from nodes import ControlNetApplyAdvanced  # type: ignore[attr-defined]  # ComfyUI's nodes.py

units = module("nodes.engine.units")
addresses, surgery, Architecture, SD = small.addresses, small.surgery, small.Architecture, small.SD


@pytest.fixture(params=["pack", "file"])
def pruned(request, folder):
    """M2 as a pack on a stock MODEL, and as a MODEL of its own."""
    if request.param == "file":
        return request.getfixturevalue("combined")
    return small.with_pack(request.getfixturevalue("model"), request.getfixturevalue("m2"))


def network(config):
    return UNetModel(**config.to_host(), dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)


def cut_and_renumbered(chosen):
    weights, _ = surgery.cut(small.weights(chosen.config), chosen)
    skeleton = network(chosen.config)
    renumbered = network(chosen.renumbered.config)
    surgery.cut_modules(skeleton, chosen, "ldm", units.stand_in)
    skeleton.load_state_dict(weights, assign=True)
    renumbered.load_state_dict(
        surgery.convert(weights, chosen, surgery.ADDRESSED, surgery.Form("ldm", "renumbered")), assign=True
    )
    return skeleton, renumbered


# Control residuals ----------------------------------------------------------------------------------


def skip_layers(config):
    """Address, channels and scale of the layers that feed the skip stack, shallow first."""
    layers = {"stem.conv_in": (config.model_channels, 1)}
    for u in addresses.walk(config):
        if u.side == "down":
            layers[u.layer] = (u.channels_out, u.scale)
    return layers


def residuals(layers, height, width, seed):
    def shrunk(size, scale):
        while scale > 1:
            size, scale = (size + 1) // 2, scale // 2
        return size

    generator = torch.Generator().manual_seed(seed)
    return {
        at: torch.randn(1, c, shrunk(height, s), shrunk(width, s), generator=generator) for at, (c, s) in layers.items()
    }


PRUNED = [("sd", name) for name in ("base", "small", "tiny", "m1", "m2", "m3")] + [
    ("sdxl", "koala-700m"),
    ("sdxl", "vega"),
]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("family, preset", PRUNED)
def test_control_residuals_reach_their_own_positions(family, preset):
    config = small.CONFIGS[family]
    chosen = Architecture.preset(preset, config)
    skeleton, renumbered = cut_and_renumbered(chosen)
    layers = list(skip_layers(config))
    into_skips = residuals(skip_layers(config), 16, 16, 1)
    # Adapters add theirs in the encoder, in place, on what also lies on the skip stack. A cut layer has a
    # position of its own, which the renumbered network lacks: nothing is added there for the comparison.
    own = {at.rpartition(".")[0] if at.endswith("resnet") else at for at in chosen.renumbered.origin.values()}
    into_encoder = {at: r if at in own else None for at, r in residuals(skip_layers(config), 16, 16, 2).items()}
    mid = torch.randn(
        1,
        config.channels(config.levels - 1),
        *[16 >> config.levels - 1] * 2,
        generator=torch.Generator().manual_seed(3),
    )
    middle = [mid] if preset != "tiny" else []  # on tiny's resolution it has no place

    walk = addresses.walk(config)
    kept_skips = [
        addresses.unit(config, chosen.renumbered.origin[u.address]).skip
        for u in addresses.walk(chosen.renumbered.config)
        if u.skip
    ]
    assert kept_skips != [u.skip for u in walk if u.skip] or family == "sdxl"
    small_layers = [
        chosen.renumbered.origin.get(f"{at}.resnet", chosen.renumbered.origin.get(at, at))
        for at in skip_layers(chosen.renumbered.config)
    ]
    whole = {
        "output": [into_skips[at] for at in layers],
        "input": [into_encoder[at] for at in layers][::-1],
        "middle": middle,
    }
    reindexed = {
        "output": [into_skips[at] for at in kept_skips][::-1],
        "input": [into_encoder[at.removesuffix(".resnet")] for at in small_layers][::-1],
    }

    def after_middle(args):
        # Without a mid block the host's h is the last skip itself, and what is added to one comes into both.
        return {"h": args["h"] + middle[0] if middle else args["h"].clone()}

    inputs = {
        "x": torch.randn(1, 4, 16, 16),
        "timesteps": torch.tensor([500.0]),
        "context": small.cond(config)[0][0],
        "y": torch.randn(1, config.adm_channels) if config.adm_channels else None,
    }

    def run(unet, control, patches={}):
        with torch.no_grad():
            return unet(
                **inputs,
                transformer_options={"patches": patches},
                control={k: [r if r is None else r.clone() for r in v] for k, v in control.items()},
            )

    wanted = run(renumbered, reindexed, {"middle_block_after_patch": [after_middle]})
    assert torch.equal(run(skeleton, whole), wanted)
    for part in whole:
        assert not whole[part] or small.difference(run(skeleton, {**whole, part: []}), wanted) > 0.001, part


def test_residual_at_a_cut_layer_does_not_reach_the_layer_before():
    chosen = Architecture.preset("base", SD)
    skeleton, _ = cut_and_renumbered(chosen)
    layers = skip_layers(SD)
    # down.0.1 is cut and pushes a copy of down.0.0; what is added to the copy must not be in the original.
    seen = {}

    def look(h, hsp, transformer_options):
        seen[transformer_options["block"][1]] = hsp.clone()
        return h, hsp

    inputs = {"x": torch.randn(1, 4, 16, 16), "timesteps": torch.tensor([500.0]), "context": small.cond()[0][0]}
    runs = []
    for residual in (None, torch.ones(1, 32, 16, 16)):
        with torch.no_grad():
            skeleton(
                **inputs,
                control={"output": [residual if at == "down.0.1" else None for at in layers]},
                transformer_options={"patches": {"output_block_patch": [look]}},
            )
        runs.append(dict(seen))
    changed = [n for n in seen if not torch.equal(runs[0][n], runs[1][n])]
    assert changed == [9]  # the output block that takes the skip of down.0.1


@pytest.fixture(scope="module")
def control_net():
    return small.control_net()


def test_control_net_on_a_pack(model, m2, combined, control_net):
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(5))
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        small.cond(seed=1), small.cond(seed=2), control_net, hint, 0.8, 0.0, 1.0
    )
    run = {"positive": positive, "negative": negative}
    samples = small.sample(small.with_pack(model, m2), **run)
    assert torch.equal(samples, small.sample(combined, **run))
    assert small.difference(samples, small.sample(combined)) > 0.001


# Positions that others see --------------------------------------------------------------------------


def seen_by_attention(model):
    """(block, transformer_index) of every self-attention of one evaluation, in order."""
    seen = []

    def look(n, context, value, extra_options):
        seen.append((extra_options["block"], extra_options["transformer_index"]))
        return n, context, value

    clone = model.clone()
    clone.set_model_attn1_patch(look)
    small.sample(clone, steps=1)
    return seen


def test_attention_is_seen_at_the_place_it_has_in_the_unpruned_unet(model, pruned):
    everywhere = seen_by_attention(model)
    assert [index for _, index in everywhere] == list(range(16))
    cut = Architecture.preset("m2", SD).cut
    transformers = [u.address for u in addresses.walk(SD) if u.kind == "transformer"]
    kept = [place for place, address in zip(everywhere, transformers, strict=True) if address not in cut]
    assert [index for _, index in kept] == [0, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15]
    assert seen_by_attention(pruned) == kept


def test_attention_replaced_by_block_number(model, pruned, combined):
    def nothing(q, k, v, extra_options, mask=None):
        return v * 0.5

    def replaced(model, *place):
        clone = model.clone()
        clone.set_model_attn1_replace(nothing, *place)
        return small.sample(clone)

    wanted = {place: replaced(combined, *place) for place in (("input", 1), ("output", 11))}
    for place, samples in wanted.items():
        assert torch.equal(replaced(pruned, *place), samples)
        assert not torch.equal(samples, small.sample(combined))
    for cut in (("input", 2), ("output", 10)):
        assert torch.equal(replaced(pruned, *cut), small.sample(combined))


# Nodes of both interfaces: the result is a tuple or acts like one.
NEIGHBOURS = {
    "FreeU": lambda m: nodes_freelunch.FreeU.execute(m, 1.1, 1.2, 0.9, 0.2),
    "FreeU_V2": lambda m: nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2),
    "PAG": lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0),
    "SAG": lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0),
    "HyperTile": lambda m: nodes_hypertile.HyperTile.execute(m, 64, 1, 0, False),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_stock_patches_before_and_after_the_pack(model, m2, combined, neighbour):
    def apply(model):
        return NEIGHBOURS[neighbour](model)[0]

    torch.manual_seed(0)
    wanted = small.sample(apply(combined))
    for played in (apply(small.with_pack(model, m2)), small.with_pack(apply(model), m2)):
        torch.manual_seed(0)
        assert torch.equal(small.sample(played), wanted)
    assert not torch.equal(wanted, small.sample(combined))


# Modules that others insert -------------------------------------------------------------------------


class VanillaTemporalModule(torch.nn.Module):
    """Like a motion module: placed by the class of its neighbours, called by its own entry."""

    def __init__(self, channels):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1), requires_grad=False)
        self.calls = 0

    def forward(self, x, transformer_options):
        assert "block" in transformer_options
        self.calls += 1
        return x * self.scale


def insert(unet):
    """Two per encoder level and three per decoder level, after the transformer or else after the resnet of a block."""
    inserted = []

    def place(blocks, channels):
        for block, c in zip(blocks, channels, strict=True):
            after = [i for i, layer in enumerate(block) if type(layer) is SpatialTransformer]
            after = after or [i for i, layer in enumerate(block) if type(layer).__name__ == "ResBlock"][:1]
            inserted.append(VanillaTemporalModule(c))
            block.insert(after[-1] + 1, inserted[-1])

    place([unet.input_blocks[i] for i in (1, 2, 4, 5, 7, 8, 10, 11)], [32, 32, 64, 64, 128, 128, 128, 128])
    place(unet.output_blocks, [128] * 6 + [64] * 3 + [32] * 3)
    return inserted


def remove(unet):
    for block in (*unet.input_blocks, *unet.output_blocks):
        for i in reversed([i for i, layer in enumerate(block) if isinstance(layer, VanillaTemporalModule)]):
            block.pop(i)


def with_motion(model):
    def handler(
        layer, x, emb, context, transformer_options, output_shape, time_context, num_video_frames, image_only_indicator
    ):
        return layer(x, transformer_options=transformer_options)

    clone = model.clone()
    clone.set_model_forward_timestep_embed_patch((VanillaTemporalModule, handler))
    return clone


@pytest.mark.parametrize("motion_first", [False, True])
def test_inserted_modules_are_called_by_their_owner(model, m2, combined, motion_first):
    results = []
    for played in (
        with_motion(combined),
        small.with_pack(with_motion(model), m2) if motion_first else with_motion(small.with_pack(model, m2)),
    ):
        unet = played.model.diffusion_model
        inserted = insert(unet)
        try:
            results.append(small.sample(played))
        finally:
            remove(unet)
        assert [m.calls for m in inserted] == [2] * 20
    # On cut layers they act on what passes through, in both alike.
    assert torch.equal(*results)
    assert not torch.equal(results[0], small.sample(combined))
