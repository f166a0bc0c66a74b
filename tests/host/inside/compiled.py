"""The host's TorchCompileModel on MODELs with a pack: right images, one graph per cast."""

import pytest
import small
import torch
from in_host import module

inheritance, host = module("asdm_core.inheritance"), module("nodes.host")
CONFIG = small.TWO_LEVELS
CHOSEN = small.Architecture.choose(CONFIG, "down.0.1, up.1.1", "down.0, up.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


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


def test_pack_applied_after_the_compile_node(model, pack, graphs):
    assert torch.equal(sample(small.with_pack(compiled(model), pack)), sample(small.with_pack(model, pack)))
    assert graphs


def test_a_measured_model_compiled_has_steps_and_no_layers(model, pack, graphs):
    packed = small.with_pack(model, pack)
    measured = host.with_speed(packed)
    assert torch.equal(sample(compiled(measured)), sample(packed))
    record = host.setup_of(measured).speed.last
    assert [step for step, _ in record.evaluations] == [0, 1] and not record.layers
    assert len(graphs) == 1


def test_pruned_unet_compiled(folder, graphs):
    pruned = small.models.load_unet(small.write_unet(folder / "pruned.safetensors", CONFIG, "down.0.1, up.1.1"))
    assert torch.equal(sample(compiled(pruned)), sample(pruned))
    assert graphs


PLANS = {
    "units": inheritance.Plan((inheritance.Rule("down.1, mid, up.0"),)),
    "forecast": inheritance.Plan((inheritance.Rule("down.1, mid, up.0", "forecast"),)),
    "branch": inheritance.Plan((inheritance.Rule("mid, up.0.0", "branch"),)),
    "parts": inheritance.Plan((inheritance.Rule("down.0.0.transformer.*.attn1|ff"),)),
}


@pytest.mark.parametrize("name", PLANS)
def test_inherited_steps_compiled(model, graphs, name):
    """Right pictures. Graphs are not shared between steps yet: what was remembered is part of what is traced."""
    m, plain = small.host.with_plan(model, PLANS[name]), sample(model, steps=4)
    wanted = sample(m, steps=4)
    assert small.difference(wanted, plain) > 1e-3
    assert torch.equal(sample(compiled(m), steps=4), wanted) and graphs
    assert torch.equal(sample(compiled(model), steps=4), plain)
