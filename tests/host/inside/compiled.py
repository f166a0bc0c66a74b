"""The host's TorchCompileModel: right images with every technique, one graph per assignment and role of a step."""

import dataclasses

import matrix
import pytest
import small
import torch
from comfy.ldm.modules import attention
from comfy_extras import nodes_model_downscale
from in_host import module
from torch._dynamo.utils import counters

inheritance, switching = (
    module("asdm_core.inheritance"),
    module("asdm_core.switching"),
)
regional, switch = module("nodes.engine.regional"), module("nodes.engine.switch")
Plan, Rule, Schedule = inheritance.Plan, inheritance.Rule, inheritance.Schedule
CONFIG = small.TWO_LEVELS
CHOSEN = small.Architecture.choose(CONFIG, "down.0.1, up.1.1", "down.0, up.1")


@pytest.fixture(scope="module")
def model(folder):
    return small.models.load_unet(small.write_unet(folder / "two-levels.safetensors", CONFIG))


@pytest.fixture(scope="module")
def pack(folder):
    return small.write_pack(folder / "pack.safetensors", CONFIG, seed=1, chosen=CHOSEN)


@pytest.fixture(scope="module")
def other(folder):
    return small.write_pack(folder / "other.safetensors", CONFIG, seed=2, chosen=CHOSEN)


graphs = pytest.fixture(small.fresh_graphs)
compiled = small.compiled


def sample(model, **more):
    return small.sample(model, CONFIG, **more)


def test_every_cast_has_a_graph_of_its_own(model, pack, other, graphs):
    first, second = small.with_pack(model, pack), small.with_pack(model, other)
    window = small.with_pack(small.with_pack(model, pack, 0.0, 0.3), other, 0.6, 1.0)  # first, nobody, second
    cases = [(m, sample(m, steps=4)) for m in (first, model, second, window)]
    for m, wanted in cases:
        assert torch.equal(sample(compiled(m), steps=4), wanted)
    count = len(graphs)
    assert count >= 3
    for m, wanted in cases:  # bypassed, and compiled again: now without new graphs
        assert torch.equal(sample(m, steps=4), wanted)
        assert torch.equal(sample(compiled(m), steps=4), wanted)
    assert torch.equal(
        sample(small.with_pack(compiled(model), pack), steps=4), cases[0][1]
    )  # the pack behind the compile node
    assert len(graphs) == count
    assert len({tuple(w.flatten().tolist()) for _, w in cases}) == 4


def test_lora_on_a_compiled_pack(model, pack, graphs):
    lora = small.lora(CONFIG)
    played = small.with_pack(model, pack)
    for strength in (1.0, 0.5):
        wanted = sample(small.add_lora(played, lora, strength))
        assert torch.equal(sample(compiled(small.add_lora(played, lora, strength))), wanted)
        assert torch.equal(sample(small.add_lora(compiled(played), lora, strength)), wanted)
    assert torch.equal(sample(compiled(played)), sample(played))


def test_a_forward_of_others_on_a_compiled_pack_breaks_no_graph(model, pack, graphs):
    played = small.with_pack(model, pack).clone()
    for block in (1, 2):
        path = f"diffusion_model.input_blocks.{block}.0.forward"
        own = model.get_model_object(path)
        played.add_object_patch(path, lambda *args, own=own: 1.1 * own(*args))
    wanted = sample(played)
    assert small.difference(wanted, sample(small.with_pack(model, pack))) > 1e-3
    assert torch.equal(sample(compiled(played)), wanted) and len(graphs) == 1


def test_a_measured_model_compiled_has_steps_and_no_layers(model, pack, graphs):
    packed = small.with_pack(model, pack)
    measured = small.with_speed(packed)
    assert torch.equal(sample(compiled(measured)), sample(packed))
    record = small.last_times(measured)
    assert [step for step, *_ in record.evaluations] == [0, 1] and not record.layers
    assert len(graphs) == 1


def test_a_compiled_second_model_plays_its_own_network(model, graphs):
    """It is the first with a LoRA, so it gets a network of its own, which must be what is compiled."""
    second = small.add_lora(model, small.lora(CONFIG))
    wanted = sample(at(model, second, 1))
    assert not torch.equal(wanted, sample(model))
    assert torch.equal(sample(at(compiled(model), compiled(second), 1)), wanted) and graphs


# Feature inheritance --------------------------------------------------------------------------------

DEEP = "down.1, mid, up.0"
PLANS = {
    "output": Plan((Rule(DEEP),)),
    "forecast": Plan((Rule(DEEP, "forecast"),)),
    "residual": Plan((Rule("mid, up.0.0", "residual"),)),
    "parts": Plan((Rule("down.0.0.transformer.*.attn1|ff"),)),
}


def test_every_plan_on_one_unet_has_graphs_of_its_own(model, pack, graphs):
    """One for steps that remember, also for the last, from which nobody inherits, and one for steps that inherit."""
    cases = [small.with_plan(model, PLANS[name]) for name in ("output", "parts")]
    cases.append(small.with_plan(small.with_pack(model, pack), PLANS["residual"]))
    plain = sample(model, steps=3)
    wanted = [sample(m, steps=3) for m in cases]
    assert all(small.difference(samples, plain) > 1e-3 for samples in wanted)
    for first in (True, False):
        for i, (m, samples) in enumerate(zip(cases, wanted, strict=True), 1):
            assert torch.equal(sample(compiled(m), steps=3), samples)
            assert len(graphs) == 2 * (i if first else len(cases))
    assert not counters["graph_break"]


def test_forecasts_of_any_size_have_four_graphs(model, graphs):
    """Also the first forecast, which has one step to draw on, and the last step; torch keeps no more than 8 of a
    network.
    """
    m = small.with_plan(model, PLANS["forecast"])
    for size, count in (((16, 16), 2), ((24, 20), 4), ((20, 28), 4)):
        assert torch.equal(sample(compiled(m), size=size, steps=5), sample(m, size=size, steps=5))
        assert len(graphs) == count
    assert not counters["graph_break"]


def test_a_step_that_looks_first_runs_uncompiled(model, graphs):
    m = small.with_plan(model, Plan((Rule(DEEP),), Schedule("adaptive", threshold=0.3, max_run=2)))
    wanted = sample(m, steps=6)
    roles = small.last_run(m).roles()
    assert {"computed", "inherited"} == set(roles)
    assert torch.equal(sample(compiled(m), steps=6), wanted)
    assert small.last_run(m).roles() == roles
    assert len(graphs) == 1 and not counters["graph_break"]


def test_gri_runs_uncompiled_beside_attention_that_breaks_graphs(folder, graphs, monkeypatch, caplog):
    """In pieces, the mid block, which has no GRI, would be played by the graph of another block of its shape."""
    config = dataclasses.replace(CONFIG, family="small-short", down=((1,), (1,)), mid=1, up=((1, 1), (1, 1)))
    monkeypatch.setitem(small.architecture.FAMILIES, config.family, config)
    model = small.models.load_unet(small.write_unet(folder / "short.safetensors", config))
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_sub_quad)
    m = small.with_technique(model, regional.Regional(4, 2))
    wanted = small.sample(m, config, steps=1)
    assert not torch.equal(small.sample(model, config, steps=1), wanted)
    said = "GRI plays without torch.compile here"
    assert said not in caplog.text
    assert torch.equal(small.sample(compiled(m), config, steps=1), wanted) and not graphs
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("after_skip", [True, False])
def test_inheriting_beside_deep_shrink_runs_uncompiled(model, graphs, after_skip):
    """It breaks the graph within, and the second piece would not notice that the step is another kind of step; nor is
    the step compiled that computes in full because maps have changed their size.
    """

    def shrunk(m):
        return nodes_model_downscale.PatchModelAddDownscale.execute(
            m, 1, 2.0, 0.0, 0.5, after_skip, "bicubic", "bicubic"
        )[0]

    m = shrunk(small.with_plan(model, PLANS["output"]))
    wanted = sample(m, steps=6)
    assert torch.equal(sample(compiled(m), steps=6), wanted) and not graphs
    assert small.difference(sample(small.with_plan(model, PLANS["output"]), steps=6), wanted) > 0.01


# The table ------------------------------------------------------------------------------------------


def at(first, second, step):
    return switch.with_switch(first, second, switching.SwitchPoint(step, "step"))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("technique", matrix.GRAPHS)
def test_every_technique_has_so_many_graphs(folder, model, pack, graphs, technique):
    """Right pictures, and the graphs that docs/compatibility.md names for a first and a second run."""
    if technique == matrix.SWITCH:
        second = small.models.load_unet(small.write_unet(folder / "second.safetensors", CONFIG, seed=2))
        made = at(compiled(model), compiled(second), 2)
        plain = at(model, second, 2)
    else:
        plain = {
            matrix.ALONE: lambda: model,
            matrix.PRUNED: lambda: small.models.load_unet(
                small.write_unet(folder / "pruned.safetensors", CONFIG, "down.0.1, up.1.1")
            ),
            matrix.PACK: lambda: small.with_pack(model, pack),
            matrix.EXPERTS: lambda: small.with_pack(
                model,
                small.write_experts(
                    folder / "experts.safetensors",
                    small.condconv.CondConv(dict.fromkeys(small.condconv.convolutions(CONFIG), 2)),
                    CONFIG,
                ),
            ),
            matrix.INHERITANCE: lambda: small.with_plan(model, PLANS["output"]),
            matrix.GRI: lambda: small.with_technique(model, regional.Regional(8, 8)),
        }[technique]()
        made = compiled(plain)
    wanted = sample(plain, steps=4)
    counts = []
    for _ in range(2):
        assert small.difference(sample(made, steps=4), wanted) <= 1e-5
        counts.append(len(graphs) - sum(counts))
    assert tuple(counts) == matrix.GRAPHS[technique] and not counters["graph_break"]
    assert torch.equal(sample(plain, steps=4), wanted)
