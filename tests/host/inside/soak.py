"""Many runs one after another with inherited features: nothing stays behind, and each equals a fresh one."""

import gc
import random
import weakref

import comfy.model_management
import pytest
import small
import torch
from in_host import module

inheritance, replay = module("asdm_core.inheritance"), module("nodes.engine.feature_cache")
Schedule = inheritance.Schedule
RUNS = 12
PLANS = [
    inheritance.deepcache(small.SD, 1),
    inheritance.attention(small.SD),
    inheritance.deepcache(small.SD, 0).reusing("forecast"),
    inheritance.deepcache(small.SD, 2, Schedule("adaptive", threshold=0.5)),
]
# Few enough that the fresh runs, one of each, do not take longer than the others.
CASES = [
    {"size": size, "batch": batch, "sampler": sampler, "steps": 4}
    for size, batch, sampler in (
        ((8, 8), 1, "euler"),
        ((8, 16), 2, "heun"),
        ((16, 8), 1, "dpmpp_2m"),
        ((8, 8), 3, "dpmpp_sde"),
    )
]


def interrupt(i, x0, x, n):
    comfy.model_management.interrupt_current_processing(i == 2)


def tensors():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def test_many_runs_leave_nothing_and_equal_fresh_ones(tmp_path, monkeypatch):
    memories = []
    create = replay.FeatureCache.__init__
    monkeypatch.setattr(
        replay.FeatureCache,
        "__init__",
        lambda self, *args: (memories.append(weakref.ref(self)), create(self, *args))[1],
    )
    fresh = {
        (p, c): small.sample(small.with_plan(small.model(tmp_path), plan), **case)
        for p, plan in enumerate(PLANS)
        for c, case in enumerate(CASES)
    }
    models = [small.with_plan(small.model(tmp_path), plan) for plan in PLANS]
    choose = random.Random(0)
    counts = []
    for n in range(RUNS):
        p, c = choose.randrange(len(PLANS)), choose.randrange(len(CASES))
        if n % 5 == 3:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                small.sample(models[p], **CASES[c], callback=interrupt)
        else:
            assert torch.equal(small.sample(models[p], **CASES[c]), fresh[p, c]), (n, p, c)
        counts.append(tensors())
        assert not any(memory() for memory in memories)
    assert len(memories) == len(fresh) + RUNS
    # The host keeps a model loaded after its first run; from then on the count must not move.
    assert len(set(counts[RUNS // 2 :])) == 1, counts
