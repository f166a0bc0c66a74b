"""Plans of feature inheritance: pure decisions, checked against the published schedules and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asdm_core.addresses import walk
from asdm_core.architecture import FAMILIES, Architecture
from asdm_core.forecast_fit import Offer
from asdm_core.inheritance import (
    DIALS,
    MODES,
    Plan,
    Rule,
    Schedule,
    attention,
    cache_elements,
    deepcache,
    dial,
    encoder,
    flow,
    saving,
    shallow_only,
    step_macs,
    targets,
)
from asdm_core.profile import Circumstances, Profile

SD = FAMILIES["sd15"]


def full_steps(n, **schedule):
    return [s for s, full in enumerate(Schedule(**schedule).computed(n)) if full]


def test_uniform_computes_every_nth_step():
    assert full_steps(50, interval=5) == list(range(0, 50, 5))


@pytest.mark.parametrize("mode", ["uniform", "early-dense", "late-dense", "quadratic"])
def test_interval_one_inherits_nothing(mode):
    for n in (1, 7, 20, 30):
        assert full_steps(n, mode=mode, interval=1) == list(range(n))


@given(
    st.sampled_from(["early-dense", "late-dense", "quadratic"]),
    st.integers(1, 120),
    st.integers(1, 20),
    st.floats(1, 4),
    st.floats(0, 1),
)
def test_uneven_modes_have_as_many_full_steps_as_uniform(mode, n, interval, power, centre):
    assert len(full_steps(n, mode=mode, interval=interval, power=power, centre=centre)) == len(
        full_steps(n, interval=interval)
    )


def test_the_formulas_of_power_one_are_uniform():
    for mode in ("early-dense", "late-dense"):
        assert full_steps(12, mode=mode, interval=3, power=1.0) == [0, 3, 6, 9]


def test_explicit_steps_lie_at_the_same_place_of_a_shorter_run():
    assert full_steps(10, mode="explicit", steps=(0, 5, 10, 15, 19), of=20) == [0, 2, 5, 8, 9]


def test_early_and_late_dense_are_mirror_images_with_as_many_full_steps_as_uniform():
    early, late = (full_steps(50, mode=m, interval=5) for m in ("early-dense", "late-dense"))
    assert len(early) == len(late) == 10
    gaps = [b - a for a, b in zip(early, early[1:], strict=False)]
    assert gaps == sorted(gaps)
    gaps = [b - a for a, b in zip(late, late[1:], strict=False)]
    assert gaps[1:] == sorted(gaps[1:], reverse=True)


def test_quadratic_is_densest_at_its_centre():
    steps = full_steps(50, mode="quadratic", interval=5, centre=0.3)
    gaps = {b - a: (a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)}
    assert abs(gaps[min(gaps)] - 15) < 3 and steps[0] == 0


def test_windows_inherit_inside_and_compute_outside():
    steps = full_steps(20, mode="windows", windows=((0.2, 0.6, 3), (0.8, 1.0, 2)))
    assert steps == [0, 1, 2, 3, 4, 7, 10, 12, 13, 14, 15, 16, 18]


def test_pins_hold_at_both_ends():
    assert full_steps(10, mode="explicit", steps=(0,), first=3, last=2) == [0, 1, 2, 8, 9]


@given(st.sampled_from(MODES), st.integers(1, 120), st.integers(1, 20), st.floats(1, 4), st.floats(0, 1))
def test_every_step_inherits_from_an_earlier_full_step(mode, n, interval, power, centre):
    schedule = Schedule(mode, interval, power, centre, windows=((0.1, 0.9, interval),), steps=(0, 7))
    plan = Plan((Rule("mid"),), schedule)
    computed = schedule.computed(n)
    assert computed[0]
    for step, source in enumerate(plan.sources(n)):
        assert computed[source] and source <= step and (source == step) == computed[step]


def test_a_sampler_that_comes_back_inherits_but_where_a_step_must_compute():
    assert Schedule(interval=3, first=2, last=1).repeating(6) == (False, False, True, True, True, False)
    assert Schedule("windows", windows=((0.2, 0.6, 2),)).repeating(10) == tuple(2 <= s < 6 for s in range(10))
    for never in (
        Schedule(interval=1),
        Schedule(repeats=False),
        Schedule("explicit", steps=(0, 3)),
        Schedule("adaptive"),
    ):
        assert not any(never.repeating(6)) and never.returning().computed(6) == never.computed(6)
    assert [Schedule(interval=n).returning().interval for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]


def test_adaptive_inherits_below_the_threshold_and_not_for_too_long():
    schedule = Schedule("adaptive", threshold=0.1, max_run=2, last=1)
    assert schedule.inherits(20, 5, 4, 0.05)
    assert not schedule.inherits(20, 5, 4, 0.1)
    assert not schedule.inherits(20, 7, 4, 0.05)
    assert not schedule.inherits(20, 19, 18, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "often"},
        {"interval": 0},
        {"interval": True},
        {"power": 0.5},
        {"centre": 2},
        {"threshold": -1},
        {"mode": "windows"},
        {"windows": ((0.5, 0.5, 2),)},
        {"steps": (-1,)},
        {"first": 0},
        {"max_run": 0},
    ],
)
def test_a_wrong_schedule_is_refused(wrong):
    with pytest.raises(ValueError, match="inheritance schedule"):
        Schedule(**wrong)


def runs(plan, config=SD):
    """Addresses of the units an inherited step runs, without the stem."""
    computes = flow(config, (a for a in plan.reuse(config))).computes
    return {a for a in computes if not a.startswith("stem.")}


@pytest.mark.slow
def test_deepcache_branch_follows_the_ldm_block_lists():
    for branch in range(11):
        ran = {tuple(u.ldm.split(".")[:2]) for u in walk(SD) if u.address in runs(deepcache(SD, branch))}
        wanted = {("output_blocks", str(n)) for n in range(11 - branch, 12)} | {
            ("input_blocks", str(n)) for n in range(1, branch + 1)
        }
        assert ran == wanted


def test_deepcache_remembers_one_tensor():
    for branch in range(11):
        plan = deepcache(SD, branch)
        assert len(flow(SD, plan.reuse(SD)).recalls) == 1


def test_shallow_only_leaves_out_what_nobody_reads():
    assert runs(shallow_only(SD)) == {"up.3.2.resnet", "up.3.2.transformer"}


def test_encoder_inheritance_keeps_every_skip_and_the_mid_output():
    plan = encoder(SD)
    recalls = flow(SD, plan.reuse(SD)).recalls
    assert len(recalls) == 12 and "mid.1.resnet" in recalls
    assert runs(plan) == {u.address for u in walk(SD) if u.side == "up"}


def test_attention_parts_reach_every_transformer_block():
    for family in ("sd15", "sdxl"):
        config = FAMILIES[family]
        blocks = sum(u.depth for u in walk(config))
        assert len(attention(config, "attn2").reuse(config)) == blocks
        assert set(attention(config).reuse(config).values()) == {"residual"}


def test_targets_of_a_block_are_its_parts():
    assert targets(SD, "mid.0.transformer.0") == {f"mid.0.transformer.0.{p}" for p in ("attn1", "attn2", "ff")}


def test_a_unit_that_inherits_as_a_whole_has_no_parts_left():
    plan = Plan((Rule("mid.0.transformer.*.attn1"), Rule("mid")))
    assert set(plan.reuse(SD)) == {"mid.0.resnet", "mid.0.transformer", "mid.1.resnet"}


def test_cut_units_inherit_nothing():
    cut = Architecture.preset("m2").cut
    assert not cut & set(shallow_only(SD).reuse(SD, cut))


def test_a_sampler_has_no_residual():
    with pytest.raises(ValueError, match=r"down\.0\.sampler has no residual"):
        Plan((Rule("down.0", "residual"),)).reuse(SD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 3, "rules": [{"targets": "mid"}]}',
        '{"format": 1, "rules": [{"x": 1}]}',
        '{"format": 1, "rules": []}',
        '{"format": 1, "rules": [{"targets": "mid"}], "schedule": {"x": 1}}',
        '{"format": 1, "rules": [{"targets": 5}]}',
        '{"format": 1, "rules": [{"targets": "mid"}], "schedule": {"steps": [1e999]}}',
    ],
)
def test_a_broken_plan_file_is_refused(text):
    with pytest.raises(ValueError, match="inheritance"):
        Plan.from_json(text)


def test_a_profile_in_place_of_a_plan_is_one_sentence_that_says_where_it_belongs():
    made_for = Circumstances("model", "euler", (1.0, 0.5, 0.0), 7.0, (16, 16))
    profile = Profile(made_for, (Offer(0.5, 0.1, 1),), 4)
    with pytest.raises(ValueError, match="MODEL output of Calibrate .*, or choose the profile by its name in Speed Up"):
        Plan.from_json(profile.to_json())


def test_plans_of_format_1_are_read():
    rules = '[{"targets": "mid.0.resnet", "reuse": "branch"}, {"targets": "up.0", "reuse": "forecast"}]'
    plan = Plan.from_json(f'{{"format": 1, "rules": {rules}}}')
    assert plan == Plan((Rule("mid.0.resnet", "residual"), Rule("up.0", "forecast")))
    with pytest.raises(ValueError, match="reuse must be one of"):
        Plan.from_json(plan.to_json().replace("residual", "branch"))


def test_json_both_ways():
    plan = Plan((Rule("mid"), Rule("up.0", "forecast")), Schedule("windows", windows=((0.1, 0.5, 3),)), "mine")
    assert Plan.from_json(plan.to_json()) == plan


def test_terms_take_units_and_parts_out_again():
    whole = targets(SD, "down.2-3, up.1.*.transformer.*.attn1|ff")
    left = targets(SD, "down.2-3, up.1.*.transformer.*.attn1|ff, !up.1.2")
    assert whole - left == {"up.1.2.transformer.0.attn1", "up.1.2.transformer.0.ff"} and left < whole
    # A unit that loses a part is left with its others.
    assert targets(SD, "down.0.0.transformer, !down.0.0.transformer.0.attn1") == {
        f"down.0.0.transformer.0.{p}" for p in ("attn2", "ff")
    }
    assert targets(SD, "down.0.0.*.*.ff, down.0.0.resnet, !down.0.0.transformer.0.attn1|ff") == {"down.0.0.resnet"}
    assert targets(SD, "down.0.0, !down.0.0.transformer") == {"down.0.0.resnet"}


@given(st.sets(st.sampled_from(sorted({u.address for u in walk(SD) if u.side != "stem"}))))
def test_flow_runs_nothing_whose_output_is_lost_and_recalls_only_what_is_inherited(inherited):
    result = flow(SD, inherited)
    assert result.recalls <= inherited and not result.computes & inherited
    assert {"stem.conv_in", "stem.conv_out"} <= result.computes | {"stem.conv_in"}
    if not inherited:
        assert result.computes == {u.address for u in walk(SD) if "embed" not in u.address}


def inherited_g(plan):
    return round(step_macs(plan, Architecture.full(SD))[1] / 1e9, 1)


@pytest.mark.parametrize(
    "branch,giga", [(0, 31.6), (1, 90.1), (2, 152.7), (3, 188.7), (4, 226.6), (5, 270.3), (6, 305.2), (8, 378.0)]
)
def test_a_deepcache_step_costs_what_was_computed_for_it(branch, giga):
    assert inherited_g(deepcache(SD, branch)) == giga


@pytest.mark.parametrize(
    "plan,percent",
    [
        (attention(SD, "attn2"), 2.0),
        (attention(SD), 12.8),
        (attention(SD, "ff"), 9.6),
        (encoder(SD), 16.3),
        (deepcache(SD, 2), 31.0),
        (Plan((Rule("down.0.*.transformer.*.attn1, up.3.*.transformer.*.attn1"),)), 7.7),
    ],
)
def test_savings_on_every_other_step_equal_the_known_ceilings(plan, percent):
    assert 100 * saving(plan, Architecture.full(SD), 50) == pytest.approx(percent, abs=0.06)


def test_work_that_only_feeds_inherited_units_is_saved_too():
    # up.1 and up.2 themselves are 19.8% at every other step; what lies beneath them then feeds nobody.
    plan = Plan((Rule("up.1-2"),))
    beneath = {"down.2", "down.3", "mid", "up.0"}
    assert not {u.address for u in walk(SD) if u.address.rsplit(".", 2)[0] in beneath} & runs(plan)
    assert saving(plan, Architecture.full(SD), 50) > 0.198


def test_a_reused_residual_still_costs_the_shortcut():
    plan = Plan((Rule("up.3.0.resnet", "residual"),))
    full, inherited = step_macs(plan, Architecture.full(SD))
    resnet = next(u for u in walk(SD) if u.address == "up.3.0.resnet")
    convolutions = sum(t.numel for t in resnet.tensors if t.part == "conv" and len(t.shape) > 1) * 64 * 64
    time = sum(t.numel for t in resnet.tensors if t.part == "time" and len(t.shape) > 1)
    assert full - inherited == convolutions + time


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "emoji"])
def test_the_dial_goes_from_faithful_to_fast(family):
    architecture = Architecture.full(FAMILIES[family])
    plans = [dial(architecture.config, name) for name in DIALS]
    savings = [saving(plan, architecture, 20) for plan in plans]
    assert (
        savings == sorted(savings)
        and savings[0] > 0.05
        and all(set(p.reuse(architecture.config).values()) == {"forecast"} for p in plans)
    )


def test_reusing_another_way_changes_nothing_else():
    config = FAMILIES["sd15"]
    plan = deepcache(config, 1)
    again = plan.reusing("forecast")
    assert again.reuse(config) == dict.fromkeys(plan.reuse(config), "forecast") and again.schedule == plan.schedule
    assert again.reusing("output").rules == plan.rules


def test_a_forecast_remembers_twice_as_much():
    architecture = Architecture.full(FAMILIES["sd15"])
    plan = deepcache(architecture.config, 0)
    # DeepCache at branch 0 remembers the input of the last decoder layer: 320 channels of 64 x 64.
    assert cache_elements(plan, architecture, 64, 64) == 320 * 64 * 64
    assert cache_elements(plan.reusing("forecast"), architecture, 64, 64) == 2 * 320 * 64 * 64
    parts = cache_elements(attention(architecture.config, "attn2"), architecture, 64, 64)
    assert parts == 5 * 320 * 64**2 + 5 * 640 * 32**2 + 5 * 1280 * 16**2 + 1280 * 8**2
