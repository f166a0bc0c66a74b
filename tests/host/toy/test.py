"""The toy against forward hooks that know nothing of the engine, and in everything that speaks of techniques."""

import json
from dataclasses import replace

import pytest
import small
import torch
from in_host import execute, module

inheritance = module("asdm_core.inheritance")
graphs = pytest.fixture(small.fresh_graphs)


def held(model, interval=2):
    return execute("ASDMToy", model=model, interval=interval)[0]


def by_hooks(model, steps, interval):
    """The same by hooks on the module itself; every evaluation is one forward here."""
    middle, kept, calls = model.model.diffusion_model.middle_block[1], [], []

    def hook(_, inputs, out):
        calls.append(1)
        if (len(calls) - 1) % interval == 0:
            kept[:] = [out - inputs[0]]
            return out
        return inputs[0] + kept[0]

    handle = middle.register_forward_hook(hook)
    try:
        return small.sample(model, steps=steps)
    finally:
        handle.remove()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_it_plays_what_hooks_make(model, interval):
    plain = small.sample(model, steps=5)
    wanted = by_hooks(model, 5, interval)
    made = small.sample(held(model, interval), steps=5)
    assert torch.equal(made, wanted) and torch.equal(made, plain) == (interval == 1)
    assert torch.equal(small.sample(held(model, interval), steps=5), made)
    assert torch.equal(small.sample(model, steps=5), plain)


def test_it_has_a_compiled_graph_for_each_way_of_playing(folder, graphs):
    few_layers = replace(small.TWO_LEVELS, mid=1)  # no stock loader knows it
    model = small.models.load_unet(small.write_unet(folder / "two-levels.safetensors", few_layers))
    m = held(model)
    assert torch.equal(small.sample(small.compiled(m), steps=4), small.sample(m, steps=4))
    assert len(graphs) == 2


def test_it_speaks_where_techniques_speak(model, caplog):
    m = held(model)
    facts, _ = module("nodes.inspect_model").describe(m, 128, 128, 0.0)
    assert facts["on"] == ["The middle computes at every step divisible by 2."]
    assert module("nodes.engine.comparison").techniques(m) == "held middle"
    small.sample(m, steps=3)
    assert caplog.text.count("the middle is held in 3 steps") == 1
    timed = small.with_speed(m)
    small.sample(timed, steps=4)
    assert small.last_times(timed).layers["mid.0.transformer", "held"][1] == 2
    json.loads(execute("ASDMSpeedReadout", model=timed)[1])


def test_it_lives_beside_the_others(model):
    plan = inheritance.deepcache(small.SD, 1, inheritance.Schedule("explicit", steps=(0, 1, 2, 3)))
    both = small.with_plan(held(model), plan)
    assert torch.equal(small.sample(both, steps=4), small.sample(held(model), steps=4))


def test_a_wrong_setting_is_refused(model):
    with pytest.raises(ValueError, match="interval: wanted 1 or more, got 0"):
        held(model, 0)
