"""Feature inheritance in the host's sampling: against a reference made of forward hooks, and what must not change."""

import gc
import math
import weakref
from collections import Counter

import comfy.model_base
import comfy.sample
import comfy.samplers
import pytest
import reference
import small
import torch
from comfy.patcher_extension import WrappersMP
from in_host import module

SD, SDXL = small.SD, small.SDXL
inheritance, replay = module("asdm_core.inheritance"), module("nodes.engine.feature_cache")
steps = module("asdm_core.steps")
Schedule, Plan, Rule = inheritance.Schedule, inheritance.Plan, inheritance.Rule
EVERY_OTHER = Schedule(interval=2)


PLANS = {
    "shallow-only": inheritance.shallow_only(SD, EVERY_OTHER),
    "deepcache-0": inheritance.deepcache(SD, 0, EVERY_OTHER),
    "deepcache-3": inheritance.deepcache(SD, 3, EVERY_OTHER),
    "encoder": inheritance.encoder(SD, EVERY_OTHER),
    "one layer": Plan((Rule("up.1.1"),), EVERY_OTHER),
    "samplers": Plan((Rule("down.*.sampler, up.*.sampler"),), EVERY_OTHER),
    "residuals": Plan((Rule("down.1.1, up.2.0-1", "residual"),), EVERY_OTHER),
    "attention": inheritance.attention(SD, "attn1|attn2", EVERY_OTHER),
    "parts": Plan((Rule("mid.0.transformer.0.ff, up.3.*.transformer.*.attn1|ff"),), EVERY_OTHER),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", PLANS)
def test_a_run_equals_the_reference_by_hooks(model, name):
    plan = PLANS[name]
    inherited = small.sample(small.with_plan(model, plan), steps=4)
    with reference.Inheriting(model, SD, plan):
        wanted = small.sample(model, steps=4)
    assert torch.equal(inherited, wanted)
    assert not torch.equal(wanted, small.sample(model, steps=4))


def test_sdxl_parts_and_blocks_equal_the_reference(folder):
    model = small.model(folder, SDXL)
    for plan in (inheritance.deepcache(SDXL, 2, EVERY_OTHER), inheritance.attention(SDXL, "attn2", EVERY_OTHER)):
        inherited = small.sample(small.with_plan(model, plan), SDXL)
        with reference.Inheriting(model, SDXL, plan):
            assert torch.equal(inherited, small.sample(model, SDXL))


@pytest.mark.parametrize("how", ["file", "pack"])
def test_it_inherits_where_a_pair_of_samplers_is_cut(model, tmp_path, how):
    if how == "file":
        whole = small.combined(tmp_path, preset="tiny")
    else:
        whole = small.with_pack(model, small.write_pack(tmp_path / "tiny.safetensors", preset="tiny", seed=1))
    plan = inheritance.deepcache(SD, 0, EVERY_OTHER)
    m = small.with_plan(whole, plan)
    inherited = small.sample(m, steps=4)
    assert small.last_run(m).replayed == [False, True, False, True]
    same = small.combined(tmp_path, preset="tiny")  # the pack's units in one file are the same network
    with reference.Inheriting(same, SD, plan):
        assert torch.equal(inherited, small.sample(same, steps=4))


def test_interval_one_is_bit_identical_to_none(model):
    plan = inheritance.shallow_only(SD, Schedule(interval=1))
    for sampler in ("euler", "heun"):
        assert torch.equal(
            small.sample(small.with_plan(model, plan), steps=4, sampler=sampler),
            small.sample(model, steps=4, sampler=sampler),
        )


def test_recording_changes_nothing(model):
    # All steps but the last are full; what they make must be what they make without recording.
    plan = inheritance.attention(SD, "attn1|attn2|ff", Schedule("explicit", steps=tuple(range(3))))
    seen = {}
    for name, m in (("plain", model), ("plan", small.with_plan(model, plan))):
        small.sample(m, steps=4, callback=lambda i, x0, x, n, name=name: seen.setdefault(name, []).append(x0.clone()))
    equal = [torch.equal(a, b) for a, b in zip(seen["plain"], seen["plan"], strict=True)]
    assert equal == [True, True, True, False]


def test_a_forecast_on_a_straight_line_is_exact(model):
    memory = replay.FeatureCache(
        Plan((Rule("mid", "forecast"),), Schedule("explicit", steps=(0, 2), first=1)), SD, frozenset(), range(6, 0, -1)
    )
    x = torch.zeros(1, 4, 8, 8)
    options = {"uuids": ["a"], "cond_or_uncond": [0]}
    for step, wanted in ((0, replay.RECORD), (2, replay.RECORD), (4, replay.REPLAY)):
        memory.begin_evaluation(steps.Moment(6 - step, step, step))
        memory.begin_forward(small.technique.Forward(x, options, "", {}))
        assert memory.mode == wanted
        value = torch.full((1, 2), 10.0 + 3 * step)
        if wanted == replay.RECORD:
            memory.end_layer("mid.1.resnet", None, x, value)
        else:
            assert torch.equal(memory.recall("mid.1.resnet", value.shape), value)


def test_a_forecast_reaches_into_a_step(model):
    memory = replay.FeatureCache(Plan((Rule("mid", "forecast"),), EVERY_OTHER), SD, frozenset(), range(6, 0, -1))
    x = torch.zeros(1, 4, 8, 8)
    options = {"uuids": ["a"], "cond_or_uncond": [0]}
    values = []
    for position in (0, 2, 2.5, 3, 3.5):
        memory.begin_evaluation(steps.Moment(6 - position, int(position), position))
        value = torch.full((1, 2), 10.0 + 3 * position)
        memory.begin_forward(small.technique.Forward(x, options, "", {}))
        if memory.mode == replay.RECORD:
            memory.end_layer("mid.1.resnet", None, x, value)
        else:
            values.append((position, torch.equal(memory.recall("mid.1.resnet", value.shape), value)))
    assert values == [(2.5, True), (3.5, True)]  # coming back at 2.5 halves the interval, so step 3 computes


@pytest.mark.parametrize("repeats", [True, False])
def test_a_second_look_at_one_latent_costs_no_full_evaluation(model, repeats):
    m = small.with_plan(model, inheritance.deepcache(SD, 1, Schedule(interval=4, repeats=repeats)))
    seen = []

    def twice(network, x, sigmas, extra_args, **_):
        seen.extend(network(x, s[None], **extra_args) for s in sigmas[:-1] for _ in (1, 2))
        return x

    comfy.sample.sample_custom(
        m,
        torch.randn(1, 4, 16, 16),
        3.0,
        comfy.samplers.KSAMPLER(twice),
        torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5, 0.0]),
        small.cond(SD, 1),
        small.cond(SD, 2),
        torch.zeros(1, 4, 16, 16),
        disable_pbar=True,
    )
    C, R = False, True
    assert kept(m).replayed == ([C, C, R, R, C, R, R, R, C, R] if repeats else [C, C, R, R, R, R, R, R, C, C])
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "uni_pc"])
def test_steps_are_found_for_every_sampler(model, sampler, monkeypatch):
    plan = inheritance.deepcache(SD, 1, Schedule(interval=2, repeats=False))
    counts = []
    close = replay.FeatureCache.close
    monkeypatch.setattr(replay.FeatureCache, "close", lambda self: (counts.append(self.counts), close(self)))
    small.sample(small.with_plan(model, plan), steps=6, sampler=sampler)
    (found,) = counts
    assert {step for step, mode in found if mode == replay.REPLAY} == {1, 3, 5}
    assert {step for step, mode in found if mode != replay.REPLAY} == {0, 2, 4}


def test_conds_apart_inherit_their_own_features(model, monkeypatch):
    m = small.with_plan(model, inheritance.deepcache(SD, 1, EVERY_OTHER))
    together = small.sample(m, steps=4)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **more: 1e15)
    assert small.difference(small.sample(m, steps=4), together) < 1e-4


def test_a_second_run_of_another_size_or_batch_starts_from_nothing(model):
    m = small.with_plan(model, inheritance.deepcache(SD, 1, EVERY_OTHER))
    first = small.sample(m, steps=4)
    small.sample(m, steps=4, size=(24, 16), batch=2)
    assert torch.equal(small.sample(m, steps=4), first)


def test_nothing_is_left_after_a_run_or_an_error(model, monkeypatch):
    memories = []
    create = replay.FeatureCache.__init__
    monkeypatch.setattr(
        replay.FeatureCache,
        "__init__",
        lambda self, *args: (memories.append(weakref.ref(self)), create(self, *args))[1],
    )
    m = small.with_plan(model, inheritance.deepcache(SD, 1, EVERY_OTHER))
    small.sample(m)

    def stop(i, x0, x, n):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        small.sample(m, steps=4, callback=stop)
    gc.collect()
    assert len(memories) == 2 and all(memory() is None for memory in memories)


def test_a_pack_that_enters_in_mid_run_inherits_nothing_from_before(model, folder):
    # Uniform(3) would replay steps 1 and 2; the pack takes over at half of four steps, so step 2 must compute.
    pack = small.write_pack(folder / "late.safetensors", seed=1)
    plan = inheritance.deepcache(SD, 1, Schedule("explicit", steps=(0,)))
    late = small.with_pack(model, pack, 0.5, 1.0)
    counts = {}
    close = replay.FeatureCache.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.FeatureCache, "close", lambda self: (counts.update(self.counts), close(self)))
        small.sample(small.with_plan(late, plan), steps=4)
    modes = {step: mode for step, mode in counts}
    assert modes[0] == replay.RECORD and replay.REPLAY in modes.values() and modes[3] == replay.COMPUTE


def test_a_patched_block_computes_in_full(model):
    # Somebody reads every attention output: parts cannot be left out behind his back.
    plan = inheritance.attention(SD, "attn1", EVERY_OTHER)
    patched = model.clone()
    patched.set_model_attn1_output_patch(lambda n, extra: n)
    assert torch.equal(small.sample(small.with_plan(patched, plan), steps=4), small.sample(model, steps=4))


@pytest.mark.parametrize("threshold,equal", [(0.0, True), (1e9, False)])
def test_an_adaptive_plan_follows_its_threshold(model, threshold, equal):
    plan = inheritance.deepcache(SD, 1, Schedule("adaptive", threshold=threshold, max_run=2))
    assert torch.equal(small.sample(small.with_plan(model, plan), steps=4), small.sample(model, steps=4)) is equal


def test_an_adaptive_plan_forecasts_as_any_other(model):
    """With no limit to the change every other step is inherited, as a plan could say beforehand."""

    def made(schedule, reuse):
        played = small.with_plan(model, inheritance.deepcache(SD, 1, schedule).reusing(reuse))
        return small.sample(played, steps=6), small.last_run(played)

    decided = Schedule("adaptive", threshold=1e9, max_run=1)
    found = {reuse: made(decided, reuse)[0] for reuse in ("output", "forecast")}
    replayed = made(decided, "forecast")[1].replayed
    steps = [s for s in range(6) if not replayed[s]]
    for reuse, samples in found.items():
        assert torch.equal(samples, made(Schedule("explicit", steps=tuple(steps)), reuse)[0])
    assert not torch.equal(*found.values())


def test_in_an_adaptive_plan_the_picture_that_changes_most_counts(model, monkeypatch):
    changes, seen = [], []
    inherits = Schedule.inherits
    monkeypatch.setattr(Schedule, "inherits", lambda self, *args: (changes.append(args[-1]), inherits(self, *args))[1])
    handle = model.model.diffusion_model.input_blocks[1][0].register_forward_hook(
        lambda module, inputs, out: seen.append(out.clone())
    )
    plan = inheritance.deepcache(SD, 1, Schedule("adaptive", threshold=1e-9, max_run=2))
    latent = torch.cat([torch.zeros(1, 4, 16, 16), 30 * torch.ones(1, 4, 16, 16)])
    small.sample(small.with_plan(model, plan), steps=6, latent=latent, denoise=0.6)
    handle.remove()
    each = [
        max(float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True))
        for before, now in zip(seen, seen[1:], strict=False)
    ]
    assert changes and changes == pytest.approx(each[: len(changes)], rel=1e-4)
    together = float((seen[1] - seen[0]).abs().mean() / seen[0].abs().mean())
    assert changes[0] > 1.05 * together


def test_in_an_adaptive_plan_what_is_no_number_is_computed(model, monkeypatch):
    """Of any picture of the batch, wherever it stands among them."""
    changes = iter([0.0, math.nan] * 100)
    monkeypatch.setattr(replay, "relative_change", lambda now, before: next(changes))
    played = small.with_plan(model, inheritance.deepcache(SD, 1, Schedule("adaptive", threshold=1e9, max_run=2)))
    samples = small.sample(played, steps=6)
    assert torch.equal(samples, small.sample(model, steps=6)) and not any(small.last_run(played).replayed)


def with_residual(model, strength):
    """MODEL with a ControlNet-like residual on conv_in's output."""

    def add(executor, x, t, c_concat, c_crossattn, control, *args, **more):
        return executor(x, t, c_concat, c_crossattn, {"input": [torch.full((2, 32, 16, 16), strength)]}, *args, **more)

    m = model.clone()
    m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "control", add)
    return m


def test_control_residuals_act_on_inherited_steps(model):
    # conv_in's output reaches the last decoder layer by its skip, which every step computes.
    plan = inheritance.deepcache(SD, 0, EVERY_OTHER)
    controlled = small.sample(small.with_plan(with_residual(model, 0.5), plan))
    assert not torch.equal(controlled, small.sample(small.with_plan(model, plan)))
    with reference.Inheriting(model, SD, plan):
        wanted = small.sample(with_residual(model, 0.5))
    assert torch.equal(controlled, wanted)


def kept(model):
    """The report of a MODEL's last run."""
    return small.last_run(model)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["deepcache-0", "encoder", "residuals", "parts", "forecast"])
def test_the_size_of_the_cache_is_known_before_the_run(model, name):
    plan = Plan((Rule("mid, up.0", "forecast"),), EVERY_OTHER) if name == "forecast" else PLANS[name]
    m = small.with_plan(model, plan)
    small.sample(m, steps=6, size=(12, 20), batch=2)
    assert kept(m).peak == small.cache_bytes(m, (2, 4, 12, 20), 2) > 0


def test_features_kept_on_the_cpu_play_the_same(model, monkeypatch):
    plan = inheritance.attention(SD, "attn1|ff", EVERY_OTHER)
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(1), cpu(self))[1])
    wanted = small.sample(small.with_plan(model, plan), steps=4)
    before = len(moved)
    assert torch.equal(small.sample(small.with_plan(model, plan, on_cpu=True), steps=4), wanted) and len(moved) > before


def test_a_run_that_would_remember_more_than_the_limit_computes_in_full_and_says_so(model, caplog):
    plan = inheritance.encoder(SD, EVERY_OTHER)
    big = small.cache_bytes(small.with_plan(model, plan), (1, 4, 64, 64), 2)
    m = small.with_plan(model, plan, limit_mb=1)
    assert big > 2**20
    plain = small.sample(model, steps=2, size=(64, 64))
    assert torch.equal(small.sample(m, steps=2, size=(64, 64)), plain) and "limit is 1 MB" in caplog.text
    assert kept(m) is None
    assert not torch.equal(small.sample(m, steps=2), small.sample(model, steps=2))  # a small picture stays below it
    assert kept(m).replayed == [False, True]
    small.sample(m, steps=2, size=(64, 64))
    assert kept(m) is None  # not the report of the run before


def test_few_steps_are_warned_of(model, caplog):
    m = small.with_plan(model, PLANS["deepcache-0"])
    small.sample(m, steps=8)
    assert "asdm" not in caplog.text
    small.sample(m, steps=7)
    assert "in a run of 7 steps" in caplog.text


def test_the_report_says_what_was_inherited(model):
    m = small.with_plan(model, PLANS["deepcache-0"])
    assert kept(m) is None
    small.sample(m, steps=5)
    assert kept(m).replayed == [False, True, False, True, False] and kept(m.clone()) is kept(m)
    assert kept(m).roles() == ("computed", "inherited", "computed", "inherited", "computed")
    assert [step for step, _ in kept(m).seconds] == [0, 1, 2, 3, 4] and all(t > 0 for _, t in kept(m).seconds)
    small.sample(m, steps=4, sampler="heun")  # evaluates steps 0 1, 1 2, 2 3, 3
    assert kept(m).replayed == [False, True, False, False, True, False, True]
    assert kept(m).roles() == ("computed", "partly", "partly", "partly")


def test_the_plan_says_where_steps_are_too_few(model):
    inherit = module("nodes.inheritance_plan")
    m = small.with_plan(model, PLANS["deepcache-0"])
    texts = [inherit.summary(inherit.describe(m, steps, 128, 128, 1)) for steps in (7, 8)]
    assert ["suffers" in text for text in texts] == [True, False]


def test_the_measured_saving_compares_with_full_steps():
    report = small.inheritance.InheritanceReport(
        4,
        Counter({(0, "record"): 1, (1, "replay"): 1, (2, "record"): 1, (3, "replay"): 1}),
        [False, True, False, True],
        [(0, 9.0), (1, 1.0), (2, 2.0), (3, 1.0)],
        0,
    )
    assert report.saving() == pytest.approx(1 - 4 / 6)
    assert small.inheritance.InheritanceReport(1, Counter({(0, "compute"): 1}), [False], [(0, 1.0)], 0).saving() is None
    # Others left out three steps and took hardly any time for them; of one it cannot be told.
    seconds = [(0, 9.0), (1, 1.0), (2, 2.0), *((step, 0.001) for step in range(3, 7))]
    replayed = [False, True, False, False, False, False, False]
    counts = Counter({(0, "record"): 1, (1, "replay"): 1, (2, "record"): 1, (3, "compute"): 1})
    played = [True, True, True, None, False, False, False]
    report = small.inheritance.InheritanceReport(7, counts, replayed, seconds, 0, played)
    assert report.saving() == pytest.approx(1 - 3.004 / 4.004)
    assert report.roles() == ("computed", "inherited", "computed", "computed", "left out", "left out", "left out")


def test_the_host_leaves_room_for_the_cache(model, monkeypatch):
    import comfy.model_management

    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, memory_required=0, **more: (
            asked.append(memory_required),
            load(models, memory_required=memory_required, **more),
        ),
    )
    m = small.with_plan(model, PLANS["encoder"])
    small.sample(model)
    small.sample(m)
    small.sample(small.with_plan(model, PLANS["encoder"], on_cpu=True))
    plain, with_cache, on_cpu = asked
    assert with_cache - plain == pytest.approx(small.cache_bytes(m, (1, 4, 16, 16), 2)) and on_cpu == plain


def test_a_plan_for_other_units_is_refused_at_once(model):
    with pytest.raises(ValueError, match=r"down\.9"):
        small.with_plan(model, Plan((Rule("down.9"),)))


@pytest.mark.parametrize(
    "when, text, said",
    [
        ("explicit", "inf", "steps: wanted numbers separated by commas, got 'inf'"),
        ("explicit", "0, nan", "steps: wanted numbers"),
        ("explicit", "0, two", "steps: wanted numbers"),
        ("explicit", "0, 2.7", "steps: steps are counted in whole numbers, got 2.7"),
        ("windows", "0, 1, inf", "windows: wanted numbers"),
        ("windows", "0, 1, 2.9", "windows: steps are counted in whole numbers, got 2.9"),
    ],
)
def test_numbers_of_a_custom_plan_that_are_none_end_in_one_sentence(when, text, said):
    node = module("nodes.feature_inheritance")
    settings = {i.id: i.default for i in node.custom_inputs() if i.id not in ("what", "when", "steps", "windows")}
    with pytest.raises(ValueError, match=said):
        node.custom_plan(SD, what="deepcache", when=when, steps=text, windows=text, **settings)


def test_a_plan_is_called_by_its_dial_or_by_what_it_does(model):
    def called(plan):
        return small.technique.technique_of(small.with_plan(model, plan), small.inheritance.Inheritance).label()

    assert called(inheritance.dial(SD, "fast")) == "fast inheritance"
    forecast = inheritance.deepcache(SD, 2, EVERY_OTHER).reusing("forecast")
    assert called(forecast) == "custom (DeepCache branch 2, forecast) inheritance"
    assert called(inheritance.Plan(forecast.rules, EVERY_OTHER)) == "custom inheritance"


def test_a_plan_whose_steps_are_not_in_the_run_says_so(model, caplog):
    few, late = (small.with_plan(model, inheritance.dial(SD, name)) for name in ("faithful", "fast"))
    plain = small.sample(model, steps=8)
    assert torch.equal(small.sample(few, steps=8), plain)
    assert caplog.text.count("had nothing to do in this run: of its 8 steps the plan lets 0 inherit") == 1
    small.sample(late, steps=10)
    never = inheritance.deepcache(SD, 0, inheritance.Schedule(interval=1))
    small.sample(small.with_plan(model, never), steps=8)  # as asked
    assert caplog.text.count("had nothing to do") == 1
