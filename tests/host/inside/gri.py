"""GRI attention in the host's sampling: equal to full attention in its limits, linear elsewhere, and nobody
overwritten.
"""

import pytest
import small
import torch
from comfy.ldm.modules import attention
from comfy_extras import nodes_hypertile, nodes_pag, nodes_sag, nodes_tomesd
from in_host import execute, module

SD, SD2, SDXL, assigned = small.SD, small.SD2, small.SDXL, small.assigned
inheritance, core, regional = module("asdm_core.inheritance"), module("asdm_core.gri"), module("nodes.engine.regional")
AUTO = {"window": 0, "pool": 0, "stages": 2, "shifted": False, "start_percent": 0.0, "end_percent": 1.0}
EXACT, ROUGH = {"window": 4, "pool": 1}, {"window": 4, "pool": 4}
LARGE = (64, 64)


@pytest.fixture(scope="module")
def plain(model):
    return small.sample(model)


@pytest.fixture
def calls(monkeypatch):
    """Settings of every call of GRI attention."""
    seen = []

    def gri_attention(q, k, v, height, width, gri, **more):
        seen.append((height, width, gri))
        return core.gri_attention(q, k, v, height, width, gri, **more)

    monkeypatch.setattr(regional, "gri_attention", gri_attention)
    return seen


def gri(model, **more):
    return execute("ASDMGRIAttention", model=model, **{**AUTO, **more})[0]


def test_in_a_window_that_covers_the_map_nothing_changes(model, plain, calls):
    assert torch.equal(small.sample(gri(model, window=16, pool=4)), plain)
    assert calls == []


def test_below_the_size_where_it_pays_nothing_changes(model, plain, calls):
    assert torch.equal(small.sample(gri(model)), plain)
    assert calls == []


def test_an_empty_stretch_of_the_run_is_the_model_itself(model):
    assert gri(model, start_percent=0.3, end_percent=0.3) is model


def test_the_model_that_came_in_stays_as_it_was(model, plain):
    options = repr(model.model_options)
    assert small.difference(small.sample(gri(model, **ROUGH)), plain) > 1e-4
    assert repr(model.model_options) == options
    assert torch.equal(small.sample(model), plain)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("config", [SD, SD2, SDXL], ids=["sd", "sd2", "sdxl"])
@pytest.mark.parametrize("run", [{}, {"size": (13, 19)}, {"batch": 3}, {"cfg": 1.0}], ids=str)
def test_cells_of_one_token_are_full_attention(folder, calls, config, run):
    model = small.model(folder, config)
    run = {"steps": 1, **run}
    assert small.difference(small.sample(gri(model, **EXACT), config, **run), small.sample(model, config, **run)) < 1e-4
    assert calls


def test_automatic_choice_plays_from_the_size_where_it_pays(model, calls):
    small.sample(gri(model), size=LARGE, steps=1)
    assert {call[:2] for call in calls} == {LARGE}  # the level below has 32 x 32
    assert {call[2] for call in calls} == {core.GRI(16, 4)}
    assert len(calls) == 5  # two transformers down, three up


def test_stages_are_counted_from_the_shallowest(model, folder, calls):
    for stages, sizes in ((1, {16}), (2, {16, 8}), (3, {16, 8, 4})):
        calls.clear()
        small.sample(gri(model, window=2, pool=2, stages=stages), steps=1)
        assert {height for height, _, _ in calls} == sizes
    calls.clear()
    small.sample(gri(small.model(folder, SDXL), window=2, pool=2, stages=1), SDXL, steps=1)
    assert {height for height, _, _ in calls} == {8}, "SDXL's first level has no attention"


def test_shifted_windows_alternate(model, calls):
    small.sample(gri(model, window=4, pool=2, stages=1, shifted=True), steps=1)
    assert {call[2].shift for call in calls} == {0, 2}


def test_it_plays_within_its_stretch_of_the_run(model, calls):
    counts = []

    def count(*_):
        counts.append(len(calls))

    small.sample(gri(model, **ROUGH, stages=1, start_percent=0.3, end_percent=0.8), steps=4, callback=count)
    played = [b > a for a, b in zip([0, *counts], counts, strict=False)]
    assert True in played and False in played
    assert not played[0]


@pytest.mark.parametrize("preset", ["m2", "base"])
def test_on_pruned_networks_and_packs_alike(model, folder, calls, preset):
    pack = small.write_pack(folder / f"{preset}.safetensors", preset=preset, seed=1)
    combined = small.combined(folder, preset=preset)
    played = small.sample(gri(small.with_pack(model, pack), **ROUGH))
    wanted = small.sample(gri(combined, **ROUGH))
    assert torch.equal(played, wanted)
    assert torch.equal(small.sample(small.with_pack(gri(model, **ROUGH), pack)), wanted), (
        "the order of the nodes does not matter"
    )
    assert small.difference(wanted, small.sample(combined)) > 1e-4
    assert calls


@pytest.mark.parametrize("name", ["attention_pytorch", "attention_split", "attention_sub_quad", "attention_basic"])
def test_every_attention_of_the_host_gives_the_same(model, monkeypatch, name):
    def played(function):
        monkeypatch.setattr(attention, "optimized_attention", function)
        return small.sample(gri(model, window=8, pool=4), steps=1, size=(18, 16))

    assert small.difference(played(getattr(attention, name)), played(attention.attention_pytorch)) < 1e-4


# Gains ----------------------------------------------------------------------------------------------


def transformers(config):
    return tuple(u.address for u in small.addresses.walk(config) if u.kind == "transformer")


TRANSFORMERS = transformers(SD)


@pytest.fixture(scope="module")
def gains(folder):
    return small.write_gains(folder / "gains.safetensors", TRANSFORMERS)


def test_gains_of_zero_and_strength_zero_change_no_bit(model, folder, gains):
    zero = small.write_gains(folder / "zero.safetensors", TRANSFORMERS, scale=0.0)
    wanted = small.sample(gri(model, **ROUGH))
    assert torch.equal(small.sample(gri(small.with_pack(model, zero), **ROUGH)), wanted)
    assert small.with_pack(model, gains, strength=0.0) is model
    assert small.difference(small.sample(gri(small.with_pack(model, gains), **ROUGH)), wanted) > 1e-4


@pytest.mark.parametrize(
    "config, scale, strength", [(SD, 1, 1.0), (SD, 1, 0.5), (SDXL, 2, 1.0)], ids=["sd", "sd, half", "sdxl"]
)
def test_gains_join_the_heads_they_were_trained_for(folder, monkeypatch, config, scale, strength):
    path = small.write_gains(folder / f"gains-{config.family}.safetensors", transformers(config), config)
    loaded = small.packs.open_pack(path)
    blocks = [loaded.tensors[k] for k, s in loaded.description.keys().items() if s.unit.scale == scale]
    played = gri(small.with_pack(small.model(folder, config), path, strength=strength), **ROUGH, stages=1)
    seen = []

    def gri_attention(q, k, v, height, width, gri, log_gain, **more):
        seen.append(log_gain)
        return core.gri_attention(q, k, v, height, width, gri, log_gain, **more)

    monkeypatch.setattr(regional, "gri_attention", gri_attention)
    small.sample(played, config, steps=1, cfg=1.0)
    assert len(seen) == len(blocks) >= 5
    assert all(torch.equal(a, strength * b) for a, b in zip(seen, blocks, strict=True))


def test_gains_do_nothing_without_gri_and_in_its_limits(model, plain, gains):
    played = small.with_pack(model, gains)
    assert torch.equal(small.sample(played), plain)
    assert torch.equal(small.sample(gri(played, window=16, pool=4)), plain)


def test_gains_play_within_their_window_and_in_either_order(model, gains):
    one = gri(small.with_pack(model, gains, 0.3, 0.8), **ROUGH)
    other = small.with_pack(gri(model, **ROUGH), gains, 0.3, 0.8)
    assert torch.equal(small.sample(one, steps=4), small.sample(other, steps=4))
    assert (
        small.difference(small.sample(one, steps=4), small.sample(gri(small.with_pack(model, gains), **ROUGH), steps=4))
        > 1e-5
    )


def test_gains_with_units_of_another_pack(model, folder, gains):
    pack = small.write_pack(folder / "m2-and-gains.safetensors", seed=1)
    combined = gri(small.with_pack(small.combined(folder), gains), **ROUGH)
    assert torch.equal(
        small.sample(gri(small.with_pack(small.with_pack(model, gains), pack), **ROUGH)), small.sample(combined)
    )


def test_the_host_moves_and_casts_gains(model, gains):
    (patcher,) = assigned.packs_of(small.with_pack(model, gains)).values()
    movable = {f"{name}.{leaf}" for _, _, name, _, leaves in patcher._load_list() for leaf in leaves}
    assert movable == set(dict(patcher.model.named_parameters())) and len(movable) == len(TRANSFORMERS)
    assert {p.dtype for p in patcher.model.parameters()} == {torch.float32}


def test_inspect_model_names_the_pack_of_gains(model, gains):
    facts, _ = module("nodes.inspect_model").describe(small.with_pack(model, gains), 128, 128, 0.0)
    assert facts["packs"] == ["gains.safetensors"]
    assert tuple(row["unit"] for row in facts["units"] if row.get("log_gains_of")) == TRANSFORMERS


# Together with others -------------------------------------------------------------------------------


def replaced(model, where, first):
    """MODEL with somebody's replacement of the self-attention of one block; GRI before or after it."""

    def values(q, k, v, options):
        return v

    m = gri(model, **ROUGH) if first else model.clone()
    m = m.clone()
    m.set_model_attn1_replace(values, *where)
    return m if first else gri(m, **ROUGH)


@pytest.mark.parametrize("where", [("input", 1), ("input", 1, 0)])
def test_a_replaced_block_is_left_to_its_owner_in_either_order(model, calls, caplog, where):
    results = [small.sample(replaced(model, where, first), steps=1) for first in (True, False)]
    assert torch.equal(*results)
    assert len(calls) == 2 * (5 + 5 - 1)
    assert not torch.equal(results[0], small.sample(gri(model, **ROUGH), steps=1))
    assert "replaces the self-attention of down.0.0.transformer;" in caplog.text


ATTN1 = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"


class Damped(torch.nn.Module):
    """In the place of a self-attention, with no layer of its own by the host's names."""

    def __init__(self, attn1):
        super().__init__()
        self.holds = [attn1]

    def forward(self, x, *args, **kwargs):
        return 0.2 * self.holds[0](x, *args, **kwargs)


def damped(model, how):
    """MODEL with somebody's change of the module of one self-attention."""
    m = model.clone()
    if how == "module":
        m.add_object_patch(ATTN1, Damped(m.get_model_object(ATTN1)))
    else:
        theirs = m.get_model_object(f"{ATTN1}.forward")
        m.add_object_patch(f"{ATTN1}.forward", lambda *args, **kwargs: 0.2 * theirs(*args, **kwargs))
    return m


@pytest.mark.parametrize("how", ["forward", "module"])
def test_a_changed_self_attention_is_left_to_its_owner_in_either_order(model, plain, calls, caplog, how):
    """The host never calls the module of a self-attention that somebody replaces."""
    alone = small.sample(damped(model, how), steps=1)
    assert small.difference(alone, small.sample(model, steps=1)) > 1e-3
    both = [small.sample(m, steps=1) for m in (damped(gri(model, **ROUGH), how), gri(damped(model, how), **ROUGH))]
    assert torch.equal(*both) and len(calls) == 2 * (5 + 5 - 1)
    assert caplog.text.count("the self-attention of down.0.0.transformer; GRI leaves it to that node") == 2
    assert torch.equal(small.sample(gri(damped(model, how)), steps=1), alone), "in a picture too small for GRI"


def test_a_hooked_self_attention_is_left_to_its_owner(model, calls):
    seen = []
    hook = model.get_model_object(ATTN1).register_forward_hook(lambda *_: seen.append(1))
    try:
        small.sample(gri(model, **ROUGH), steps=1)
    finally:
        hook.remove()
    assert seen and len(calls) == 5 + 5 - 1


def test_blocks_that_are_called_as_hosts_did_before_have_gri(model, calls):
    """Some packs call the replacement themselves, with the numbers of heads alone."""
    m = gri(model, **ROUGH)
    wanted = small.sample(m, steps=1)

    def wrapper(executor, x, t, context=None, y=None, control=None, transformer_options={}, **more):
        replace = transformer_options["patches_replace"]

        def as_before(play):
            def called(q, k, v, options):
                return play(q, k, v, {n: o for n, o in options.items() if n not in ("attn_precision", "block_index")})

            return called

        attn1 = {block: as_before(play) for block, play in replace["attn1"].items()}
        options = {**transformer_options, "patches_replace": {**replace, "attn1": attn1}}
        return executor(x, t, context, y, control, options, **more)

    m.add_wrapper_with_key("diffusion_model", "theirs", wrapper)
    assert torch.equal(small.sample(m, steps=1), wanted) and calls


@pytest.mark.parametrize(
    "node, inputs",
    [(nodes_hypertile.HyperTile, (32, 2, 0, False)), (nodes_tomesd.TomePatchModel, (0.3,))],
    ids=["HyperTile", "ToMe"],
)
@pytest.mark.parametrize("first", [True, False])
def test_where_another_node_changes_the_queries_gri_is_off(model, calls, caplog, node, inputs, first):
    def other(m):
        out = node.execute(m, *inputs)
        return out[0] if isinstance(out, tuple) else out.args[0]

    def sample(m):
        torch.manual_seed(0)  # both draw from the global generator
        return small.sample(m, steps=1)

    m = other(gri(model, window=8, pool=8, stages=1)) if first else gri(other(model), window=8, pool=8, stages=1)
    assert torch.equal(sample(m), sample(other(model)))
    assert calls == [] and "there GRI is off" in caplog.text
    assert len([r for r in caplog.records if "GRI is off" in r.message]) == 1, "said once per run"


@pytest.mark.parametrize(
    "node, scale",
    [(nodes_pag.PerturbedAttentionGuidance, (3.0,)), (nodes_sag.SelfAttentionGuidance, (0.5, 2.0))],
    ids=["PAG", "SAG"],
)
def test_guidance_by_attention_keeps_its_own_pass_in_either_order(model, plain, calls, node, scale):
    def guided(m):
        return node.execute(m, *scale).args[0]

    # They replace attention in the mid block, PAG for an evaluation of its own: four levels of GRI reach it too.
    settings = {"window": 1, "pool": 1, "stages": 4}
    before = small.sample(guided(gri(model, **settings)))
    after = small.sample(gri(guided(model), **settings))
    assert torch.equal(before, after) and calls
    assert small.difference(before, small.sample(guided(model))) < 1e-4
    assert small.difference(before, plain) > 1e-4


def test_where_keys_come_from_a_reference_gri_is_off(model, calls, caplog):
    def beside(n, context, value, options):  # as reference-only nodes do
        return n, context.repeat(1, 2, 1), torch.cat([value, value.flip(1)], 1)

    def patched(m):
        m = m.clone()
        m.set_model_attn1_patch(beside)
        return m

    wanted = small.sample(patched(model), steps=1)
    assert torch.equal(small.sample(patched(gri(model, **ROUGH)), steps=1), wanted)
    assert torch.equal(small.sample(gri(patched(model), **ROUGH), steps=1), wanted)
    assert calls == [] and "there GRI is off" in caplog.text


def test_replaced_cross_attention_plays_beside_gri(model, calls):
    def doubled(q, k, v, options):  # as IP-Adapter nodes do: their own keys and values, added to the host's
        heads = options["n_heads"]
        return attention.optimized_attention(q, k, v, heads) + 0.5 * attention.optimized_attention(q, v, k, heads)

    def patched(m):
        m = m.clone()
        m.set_model_attn2_replace(doubled, "input", 1)
        return m

    both = [small.sample(m) for m in (patched(gri(model, **EXACT)), gri(patched(model), **EXACT))]
    assert torch.equal(*both) and calls
    assert small.difference(both[0], small.sample(patched(model))) < 1e-4
    assert small.difference(both[0], small.sample(model)) > 1e-4


def test_whole_layers_inherit_under_gri(model, calls):
    plan = inheritance.shallow_only(SD, inheritance.Schedule(interval=2))
    both = [
        small.sample(m, steps=4)
        for m in (gri(small.with_plan(model, plan), **EXACT), small.with_plan(gri(model, **EXACT), plan))
    ]
    assert torch.equal(*both)
    assert small.difference(both[0], small.sample(small.with_plan(model, plan), steps=4)) < 1e-4
    assert small.difference(both[0], small.sample(model, steps=4)) > 1e-4


def test_parts_of_blocks_are_computed_in_full_under_gri(model, calls):
    # A part that inherits would have to know how GRI computes; so none does, and GRI plays in all of them.
    plan = inheritance.attention(SD, "attn1|attn2", inheritance.Schedule(interval=2))
    assert torch.equal(
        small.sample(small.with_plan(gri(model, **ROUGH), plan), steps=4), small.sample(gri(model, **ROUGH), steps=4)
    )


def test_the_last_node_decides(model):
    assert torch.equal(small.sample(gri(gri(model, **EXACT), **ROUGH)), small.sample(gri(model, **ROUGH)))


def test_overrides_of_attention_are_honoured(model):
    seen = []

    def override(function, *args, **kwargs):
        seen.append(args[0].dim())
        return function(*args, **kwargs)

    m = gri(model, **ROUGH).clone()
    m.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(small.sample(m, steps=1), small.sample(gri(model, **ROUGH), steps=1))
    assert 4 in seen


def test_the_node_says_from_which_size_on_it_plays():
    node = module("nodes.gri_attention")
    settings = regional.Regional
    for config, side in ((SD, 512), (SDXL, 1024)):
        assert node.plays_from(settings(), config).startswith(f"plays in pictures of {side} x {side} and more")
        assert node.plays_from(settings(window=4, pool=2), config).startswith(
            f"plays in pictures of {6 * side // 64} x {6 * side // 64} and more"
        )
    assert not settings().on(63, 63, False) and not settings(window=4, pool=2).on(5, 5, False)


def test_a_window_of_broken_cells_is_refused(model):
    with pytest.raises(ValueError, match="multiples of pool"):
        gri(model, window=10, pool=4)


def test_caught_by_name_when_compiled(model):
    # TorchCompileModel only guards the names of keyword arguments: the name must tell GRI from none, and settings
    # apart.
    names = set()
    forward = model.model.diffusion_model.forward

    def look(*args, **kwargs):
        names.add(next((k for k in kwargs if k.startswith("asdm")), ""))
        return forward(*args, **kwargs)

    model.model.diffusion_model.forward = look
    try:
        for m in (model, gri(model, **ROUGH), gri(model, **EXACT), gri(model, **ROUGH, shifted=True)):
            small.sample(m, steps=1)
    finally:
        del model.model.diffusion_model.forward
    assert len(names) == 4
