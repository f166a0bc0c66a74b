"""Feature inheritance beside whatever else acts on a run, against a reference made of forward hooks."""

from dataclasses import replace
from functools import partial

import comfy.controlnet
import comfy.hooks
import comfy.model_base
import comfy.model_management
import comfy.samplers
import comfy.sd
import nodes
import pytest
import reference
import small
import torch
from comfy_extras import (
    nodes_context_windows,
    nodes_custom_sampler,
    nodes_easycache,
    nodes_freelunch,
    nodes_hooks,
    nodes_hypertile,
    nodes_model_downscale,
    nodes_pag,
    nodes_sag,
)
from in_host import module

SD = small.SD
SDXL = small.SDXL
units = module("nodes.engine.units")
inheritance = module("asdm_core.inheritance")
forecasts, inheritance_plan = module("nodes.engine.forecasts"), module("nodes.inheritance_plan")
Action, ForecastPlan = forecasts.Action, forecasts.ForecastPlan
Schedule, Plan, Rule, Architecture = inheritance.Schedule, inheritance.Plan, inheritance.Rule, small.Architecture
EVERY_OTHER = Schedule(interval=2)
ONCE = Schedule("explicit", steps=(0,))
PLAN = inheritance.deepcache(SD, 1, EVERY_OTHER)
STEPS = 6


@pytest.fixture
def apart(monkeypatch):
    """Conditionings come in forwards of their own, as where memory is short."""
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **more: 1e15)


def inherited(model):
    """Steps that the last run of a MODEL inherited."""
    return [s for s, role in enumerate(small.last_run(model).roles()) if role == "inherited"]


def seeded(run, model):
    torch.manual_seed(0)
    return run(model)


def check(apply, model, run=None, plan=PLAN, config=SD, replays=(1, 3, 5), full=()):
    """A run with the plan and a neighbour equals the reference, again and whichever node comes first; and inherits at
    these steps.
    """
    run = run or partial(small.sample, config=config, steps=STEPS)
    with reference.Inheriting(model, config, plan, full):
        wanted = seeded(run, apply(model))
    first = apply(small.with_plan(model, plan))
    for m in (first, first) if apply is itself else (first, first, small.with_plan(apply(model), plan)):
        assert torch.equal(seeded(run, m), wanted)
        assert replays is None or inherited(m) == list(replays)
    assert wanted.isfinite().all()
    return wanted


def itself(model):
    return model


# Nodes on a MODEL ----------------------------------------------------------------------------------


def attn2_replaced(model):
    """Like an IP-Adapter: cross-attention of single blocks has a second context."""

    def attend(q, k, v, extra_options):
        return (
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            + 0.5 * q.tanh()
            + extra_options["sigmas"][0] * 0.01
        )

    clone = model.clone()
    for place in (("input", 1), ("input", 7), ("middle", 0), ("output", 11)):
        clone.set_model_attn2_replace(attend, *place)
    return clone


def attn2_patched(model):
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 1.1, value * 0.9))
    clone.set_model_attn2_output_patch(lambda n, extra: n * 1.2)
    return clone


NODES = {
    "FreeU": lambda m: nodes_freelunch.FreeU.execute(m, 1.1, 1.2, 0.9, 0.2)[0],
    "FreeU_V2": lambda m: nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2)[0],
    "PAG": lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)[0],
    "HyperTile": lambda m: nodes_hypertile.HyperTile.execute(m, 64, 1, 0, False)[0],
    "deep shrink": lambda m: nodes_model_downscale.PatchModelAddDownscale.execute(
        m, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"
    )[0],
    "attn2 replaced": attn2_replaced,
    "attn2 patched": attn2_patched,
}


# Others, one at a time, in compatibility.py.
@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2", "deep shrink", "attn2 patched"])
def test_stock_nodes_act_on_inherited_steps(model, name):
    acted = check(NODES[name], model)
    assert not torch.equal(acted, seeded(partial(small.sample, steps=STEPS), small.with_plan(model, PLAN)))


@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2"])
def test_writers_in_place_damage_nothing_that_several_steps_inherit(model, name):
    check(NODES[name], model, plan=Plan((Rule("mid, up.0-1"),), ONCE), replays=range(1, STEPS))


def test_self_attention_guidance(model):
    # It reads the attention of the middle block: for the comparison that block must compute on every step.
    def sag(m):
        return nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)[0]

    check(sag, model, plan=Plan((Rule("down.1-2"),), EVERY_OTHER))
    m = sag(small.with_plan(model, PLAN))
    first = small.sample(m, steps=STEPS)
    small.sample(m, steps=STEPS, size=(24, 24))
    assert torch.equal(small.sample(m, steps=STEPS), first) and inherited(m) == [1, 3, 5]


def test_perturbed_guidance_of_inherited_parts_computes_in_full(model):
    # The perturbed pass replaces attn1 of the middle block: nobody may leave parts out of it. The other pass inherits.
    plan = inheritance.attention(SD, "attn1", EVERY_OTHER)
    m = NODES["PAG"](small.with_plan(model, plan))
    small.sample(m, steps=STEPS)
    counts = small.last_run(m).counts
    assert all(counts[s, "replay"] == counts[s, "compute"] == 1 for s in (1, 3, 5))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("part", ["attn1", "attn2", "ff"])
@pytest.mark.parametrize("name", ["attn2 replaced", "attn2 patched", "HyperTile"])
def test_parts_of_patched_blocks_compute(model, name, part):
    apply = NODES[name]
    inheriting = apply(small.with_plan(model, inheritance.attention(SD, part, EVERY_OTHER)))
    assert torch.equal(small.sample(inheriting, steps=4), small.sample(apply(model), steps=4))
    assert inherited(inheriting) == []


def test_a_block_with_another_forward_computes(model):
    # Some packs put a function over the forward of a single block. It must be called, and every time.
    block = units.layers(model.model.diffusion_model, SD)["mid.0.transformer"].transformer_blocks[0]
    forward = block.forward
    calls = []
    block.forward = lambda *args, **more: (calls.append(1), forward(*args, **more) * 1.1)[1]
    try:
        small.sample(small.with_plan(model, inheritance.attention(SD, "attn1|attn2|ff", EVERY_OTHER)), steps=4)
    finally:
        del block.forward
    assert len(calls) == 4


@pytest.mark.sweep(1)
@pytest.mark.parametrize("schedule", [ONCE, Schedule(interval=3), Schedule("adaptive", threshold=1e9, max_run=10)])
def test_steps_on_which_maps_change_their_size_compute(model, schedule):
    def shrink(m):
        return nodes_model_downscale.PatchModelAddDownscale.execute(m, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")[0]

    plan = Plan(inheritance.deepcache(SD, 1).rules, schedule)
    m = shrink(small.with_plan(model, plan))
    first = small.sample(m, steps=STEPS)
    assert torch.equal(small.sample(m, steps=STEPS), first)
    big = int(
        small.sigmas_of(model, STEPS).lt(model.get_model_object("model_sampling").percent_to_sigma(0.5)).nonzero()[0]
    )
    assert 1 < big < STEPS - 1 and big not in inherited(m) and 1 in inherited(m)
    if schedule.mode == "adaptive":
        assert inherited(m) == [s for s in range(1, STEPS) if s != big]
    else:
        check(shrink, model, plan=plan, replays=inherited(m), full=set(range(STEPS)) - set(inherited(m)))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("node", [nodes_easycache.EasyCacheNode, nodes_easycache.LazyCacheNode])
@pytest.mark.parametrize("interval", [2, 3])
def test_other_caches_on_top(model, node, interval):
    # A step that another cache skipped was never recorded, so nothing inherits from it.
    def apply(m):
        return node.execute(m, 0.5, 0.1, 1.0, False)[0]

    run = partial(small.sample, steps=12)
    forwards = []
    hook = model.model.diffusion_model.input_blocks[0][0].register_forward_pre_hook(lambda *args: forwards.append(1))
    try:
        run(apply(model))
    finally:
        hook.remove()
    assert 3 < len(forwards) < 10  # the other cache does skip
    check(apply, model, run, inheritance.deepcache(SD, 1, Schedule(interval=interval)), replays=None)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["LazyCache", "Speed Up"])
def test_where_others_leave_out_its_steps_they_are_named(model, caplog, name, first):
    """And not layers that change, nor more steps, of which it would inherit as few."""
    plan = inheritance.deepcache(SD, 1, Schedule("explicit", steps=(0, 3, 6, 9)))

    def beside(m):
        if name == "LazyCache":
            m = m.clone()
            m.add_wrapper_with_key("predict_noise", "theirs", leaving_out)
            return m
        letters = [Action("result" if step % 3 != 1 and step else "full") for step in range(12)]
        return small.with_technique(m, forecasts.Forecasts(ForecastPlan(tuple(letters))))

    def leaving_out(executor, x, *args, **more):
        seen.append(1)
        return executor(x, *args, **more) if len(seen) % 3 == 2 or len(seen) == 1 else x

    seen = []
    m = small.with_plan(beside(model), plan) if first else beside(small.with_plan(model, plan))
    small.sample(m, steps=12)
    if name == "LazyCache" and first:  # it leaves out evaluations before asdm knows of them
        return
    assert caplog.text.count("feature inheritance") == 1
    assert ("Speed Up leaves out such steps" if name == "Speed Up" else "a cache, such as EasyCache") in caplog.text


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["EasyCache", "Speed Up"])
def test_steps_that_others_leave_out_are_told_from_full_ones(model, name, first):
    """In the picture of the run, and in the time that it is said to have saved."""
    plan = inheritance.deepcache(SD, 1, Schedule("explicit", steps=(0, 2, 4, 7, 10)))

    def beside(m):
        if name == "EasyCache":
            return nodes_easycache.EasyCacheNode.execute(m, 0.5, 0.1, 1.0, False)[0]
        letters = [Action("result" if step in (3, 6, 7, 9) else "full") for step in range(12)]
        return small.with_technique(m, forecasts.Forecasts(ForecastPlan(tuple(letters))))

    played = []
    hook = model.model.diffusion_model.input_blocks[0][0].register_forward_pre_hook(lambda *args: played.append(1))
    try:
        m = small.with_plan(beside(model), plan) if first else beside(small.with_plan(model, plan))
        small.sample(m, steps=12)
    finally:
        hook.remove()
    roles = small.last_run(m).roles()
    assert 3 < len(played) < 12 and "inherited" in roles
    # Of steps in which nothing is asked of the layers it is not seen whether they play.
    assert 0 < roles.count("left out") <= 12 - len(played) and (
        name == "EasyCache" or roles[3] == roles[6] == "left out"
    )
    text = inheritance_plan.ASDMInheritancePlan.execute(m, 12, 128, 128, 1).ui["text"][0]
    assert f"{roles.count('left out')} were left out by others" in text and ", -" not in text


# Control ---------------------------------------------------------------------------------------------


class Residuals(comfy.controlnet.ControlBase):
    """Control at chosen places of the UNet, growing as the noise falls, in a window of the run."""

    def __init__(self, kind, places, window=(0.0, 1.0)):
        super().__init__()
        self.kind, self.places = kind, places
        self.set_cond_hint(None, 1.0, window)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        if t[0] > self.timestep_range[0] or t[0] < self.timestep_range[1]:
            return None
        layers = [(32, 1)] * 3 + [(32, 2)] + [(64, 2)] * 2 + [(64, 4)] + [(128, 4)] * 2 + [(128, 8)] * 3
        if self.kind == "middle":
            layers = [(128, 8)]
        made = [
            torch.full((x_noisy.shape[0], c, *[n // scale for n in x_noisy.shape[2:]]), 0.5 / (1 + float(t[0])))
            if i in self.places
            else None
            for i, (c, scale) in enumerate(layers)
        ]
        return {self.kind: made[::-1] if self.kind == "input" else made}

    def get_models(self):
        return []

    def copy(self):
        copied = Residuals(self.kind, self.places)
        self.copy_to(copied)
        return copied


def controlled(control, seeds=(1, 2)):
    """Positive and negative conditioning under a control."""
    return dict(
        zip(
            ("positive", "negative"),
            (small.cond(seed=s, control=control, control_apply_to_uncond=False) for s in seeds),
            strict=True,
        )
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "kind, places",
    [
        ("input", (0,)),
        ("input", (2, 5, 11)),
        ("output", (0, 1)),
        ("output", (4, 7, 10)),
        ("middle", (0,)),
        ("output", range(12)),
        ("input", range(12)),
    ],
)
def test_changing_residuals_at_several_depths(model, kind, places):
    run = partial(small.sample, steps=STEPS, **controlled(Residuals(kind, places)))
    acted = check(itself, model, run)
    assert not torch.equal(acted, small.sample(small.with_plan(model, PLAN), steps=STEPS))


def control_steps(model, start, end):
    sampling = model.get_model_object("model_sampling")
    return [
        sampling.percent_to_sigma(end) <= s <= sampling.percent_to_sigma(start)
        for s in small.sigmas_of(model, STEPS)[:-1].tolist()
    ]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("start, end", [(0.0, 0.4), (0.4, 1.0), (0.2, 0.6)])
def test_control_that_sets_in_or_ends_in_mid_run(model, start, end):
    acts = control_steps(model, start, end)
    plan = replace(PLAN, schedule=ONCE)
    replays = [s for s in range(1, STEPS) if acts[s] == acts[0]]
    assert 0 < len(replays) < STEPS - 1
    run = partial(small.sample, steps=STEPS, **controlled(Residuals("output", range(12), (start, end))))
    # The reference has no idea of it: it is told which steps compute.
    control = run.keywords["positive"][0][1]["control"]
    control.set_cond_hint(None, 1.0, (start, end))
    check(itself, model, run, plan=plan, replays=replays, full=set(range(STEPS)) - set(replays))


# Conditionings ---------------------------------------------------------------------------------------


def areas():
    """Two prompts on areas that overlap and one on everything, as the stock nodes make them."""
    left = nodes.ConditioningSetArea().append(small.cond(seed=1), 80, 128, 0, 0, 1.0)[0]
    right = nodes.ConditioningSetArea().append(small.cond(seed=3), 80, 128, 48, 0, 0.7)[0]
    return [*left, *right, *small.cond(seed=4)]


def in_range(start, end, seed):
    return nodes.ConditioningSetTimestepRange().set_range(small.cond(seed=seed), start, end)[0]


def test_areas(model):
    check(itself, model, partial(small.sample, steps=STEPS, positive=areas()))


def test_areas_apart(model, apart):
    check(itself, model, partial(small.sample, steps=STEPS, positive=areas()))


def test_prompts_that_change_in_mid_run(model, apart):
    # What a prompt has not seen it cannot inherit; all others go on.
    for ranges in ([(0.0, 0.5, 1), (0.5, 1.0, 3)], [(0.0, 1.0, 1), (0.3, 0.7, 3)]):
        run = partial(small.sample, steps=STEPS, positive=[c for r in ranges for c in in_range(*r)])
        check(itself, model, run, replays=None)
        check(itself, model, run, replays=None, plan=replace(PLAN, schedule=ONCE))


def test_a_prompt_that_enters_makes_the_common_forward_compute(model):
    sampling = model.get_model_object("model_sampling")
    late = [s <= sampling.percent_to_sigma(0.5) for s in small.sigmas_of(model, STEPS)[:-1].tolist()]
    m = small.with_plan(model, replace(PLAN, schedule=ONCE))
    small.sample(m, steps=STEPS, positive=[*small.cond(seed=1), *in_range(0.5, 1.0, 3)])
    assert inherited(m) == [s for s in range(1, STEPS) if not late[s]]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("schedule, replays", [("standard_static", (1, 3, 5)), ("standard_uniform", None)])
def test_context_windows(model, schedule, replays):
    def windows(m):
        return nodes_context_windows.ContextWindowsManualNode.execute(m, 3, 1, schedule, 1, False, "pyramid", 0, False)[
            0
        ]

    run = partial(small.sample, steps=STEPS, batch=5)
    if replays:
        check(windows, model, run, replays=replays)
    else:  # other windows at each step: a window plays from its own features or computes
        m = windows(small.with_plan(model, PLAN))
        assert torch.equal(run(m), run(m))


def hooked(lora, *keyframes, seed=1):
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    group = None
    for strength, start in keyframes:
        (group,) = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(strength, start, prev_hook_kf=group)
    (hooks,) = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, group)
    return nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=seed), hooks)[0]


def test_a_hook_lora_that_changes_in_mid_run(model):
    # Prompts with other hooks come in forwards of their own: the positive one computes when its LoRA changes.
    lora = small.lora(SD, seed=5)
    sampling = model.get_model_object("model_sampling")
    late = {i for i, s in enumerate(small.sigmas_of(model, STEPS)[:-1].tolist()) if s <= sampling.percent_to_sigma(0.5)}
    m = small.with_plan(model, replace(PLAN, schedule=ONCE))
    steady = {"positive": hooked(lora, (0.7, 0.0)), "negative": small.cond(seed=2)}
    check(itself, model, partial(small.sample, steps=STEPS, **steady))
    small.sample(m, steps=STEPS, positive=hooked(lora, (1.0, 0.0), (0.3, 0.5)))
    assert 0 < len(late) < STEPS - 1 and set(inherited(m)) == set(range(1, STEPS)) - late
    assert small.last_run(m).counts[STEPS - 1, "replay"] == 1


# Guiders, schedules, models --------------------------------------------------------------------------


def custom(guider, sigmas, sampler="euler", latent=None):
    """What SamplerCustomAdvanced does."""
    latent = torch.zeros(1, 4, 16, 16) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=0)


def cfg_guider(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(small.cond(seed=1), small.cond(seed=2))
    guider.set_cfg(3.0)
    return guider


def test_guidance_that_is_off_in_part_of_the_run(model, apart):
    # Where it begins or ends is the level of step 2: on which side of it that step lies is for the node to say.
    for start, end in ((0.0, 0.4), (0.4, 1.0)):
        check(
            lambda m, s=start, e=end: nodes_custom_sampler.CFGOverride.execute(m, 1.0, s, e)[0],
            model,
            replays=None,
            full=(3,),
        )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("same", [False, True])
def test_a_guider_with_a_model_for_each_prompt(model, folder, same):
    other = model.clone() if same else small.model(folder, seed=7)

    def run(m):
        guider = nodes_custom_sampler.DualModelGuider.execute(m, small.cond(seed=1), 3.0, other, small.cond(seed=2))[0]
        return custom(guider, small.sigmas_of(model, STEPS))

    check(itself, model, run)


SCHEDULES = {
    "restart": lambda s: torch.cat([s[:5], s[2:]]),
    "unsampling": lambda s: nodes_custom_sampler.FlipSigmas.execute(s)[0],
    "a window": lambda s: s[2:6],
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", SCHEDULES)
def test_unusual_schedules(model, name):
    sigmas = SCHEDULES[name](small.sigmas_of(model, 8))
    m = small.with_plan(model, PLAN)
    result = custom(cfg_guider(m), sigmas)
    assert inherited(m) == list(range(1, len(sigmas) - 1, 2))
    assert result.isfinite().all() and torch.equal(custom(cfg_guider(m), sigmas), result)
    if name != "restart":  # the reference finds steps by the noise level alone
        with reference.Inheriting(model, SD, PLAN):
            assert torch.equal(custom(cfg_guider(model), sigmas), result)


def test_a_window_of_steps_and_image_to_image(model):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    for more in (
        {"start_step": 2, "last_step": 8, "force_full_denoise": True, "steps": 12},
        {"denoise": 0.5, "steps": STEPS},
    ):
        check(itself, model, partial(small.sample, latent=latent, **more))


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "plan",
    [PLAN, inheritance.attention(SD, "attn1|attn2|ff", EVERY_OTHER), inheritance.encoder(SD, EVERY_OTHER)],
    ids=["deepcache", "parts", "encoder"],
)
def test_pruned_unets(model, folder, plan):
    combined = small.combined(folder)
    wanted = check(itself, combined, plan=plan)
    pack = small.with_pack(model, small.write_pack(folder / "m2.safetensors", seed=1))
    m = small.with_plan(pack, plan)
    assert torch.equal(small.sample(m, steps=STEPS), wanted) and inherited(m) == [1, 3, 5]


def test_transformers_with_fewer_blocks(folder):
    # Parts of the blocks that are left inherit; the cut ones have none.
    cut = "mid.0.transformer.2-9, down.2.*.transformer.1-9, up.0.*.transformer.1-9"
    path = small.write_unet(folder / "fewer.safetensors", SDXL, cut=cut)
    model = module("nodes.engine.models").load_unet(path)
    check(itself, model, plan=inheritance.attention(SDXL, "attn1|ff", EVERY_OTHER), config=SDXL)


# One MODEL, several runs ----------------------------------------------------------------------------


def test_batches_of_several(model):
    check(itself, model, partial(small.sample, steps=STEPS, batch=2))
    check(itself, model, partial(small.sample, steps=STEPS, batch=2, positive=small.cond(seed=1, batch=2)))


def test_several_samplers_one_after_another(model):
    runs = [partial(small.sample, steps=5, sampler=s) for s in ("euler", "dpmpp_2m", "heun", "dpmpp_sde")]
    alone = [run(small.with_plan(model, PLAN)) for run in runs]
    m = small.with_plan(model, PLAN)
    for run, wanted in zip([*runs, runs[0]], [*alone, alone[0]], strict=True):
        assert torch.equal(run(m), wanted)


@pytest.mark.parametrize("plan", [PLAN, Plan((Rule("mid, up.0", "forecast"),), EVERY_OTHER)])
def test_a_rerun_after_an_interrupt(model, plan):
    m = small.with_plan(model, plan)
    wanted = small.sample(m, steps=STEPS)

    def interrupt(i, x0, x, n):
        if i == 2:
            comfy.model_management.interrupt_current_processing()

    for _ in range(2):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            small.sample(m, steps=STEPS, callback=interrupt)
        assert torch.equal(small.sample(m, steps=STEPS), wanted)


class _Left(Exception):
    """Another cache leaves a forward."""


def leaving(model, forwards, seen):
    """As first-block caches: in these forwards the network stops behind its first block, and the last result stands."""
    m, last = model.clone(), []

    def wrapper(executor, *args, **more):
        seen.append(len(seen))

        def stop(module, inputs):
            raise _Left

        block = model.get_model_object("diffusion_model.input_blocks.2.0")
        handle = block.in_layers.register_forward_pre_hook(stop) if seen[-1] in forwards else None
        try:
            last[:] = [executor(*args, **more)]
        except _Left:
            pass
        finally:
            if handle:
                handle.remove()
        return last[0].clone()

    m.add_wrapper_with_key("diffusion_model", "theirs", wrapper)
    return m


def test_of_a_forward_that_another_cache_cut_short_nothing_is_inherited(model):
    """Else what is missing of it is found in the middle of the next one, and that would have to begin anew."""
    parts = Plan((Rule("down.0.0.transformer.*.ff, up.3.*.transformer.*.ff"),), EVERY_OTHER)
    seen = []
    m = leaving(small.with_plan(model, parts), (2,), seen)
    small.sample(m, steps=STEPS)
    assert seen == list(range(STEPS)), "a forward for each step"
    assert inherited(m) == [1, 5]


def test_a_pack_that_begins_in_the_run_ends_no_inheriting(model, folder):
    """From there on, with fewer blocks, less is remembered."""
    path = small.write_pack(folder / "beginning.safetensors", seed=1)
    parts = ", ".join(f"{level}.*.transformer.*.ff" for level in ("down.0", "down.1", "up.2", "up.3"))
    m = small.with_plan(small.with_pack(model, path, 0.5, 1.0), Plan((Rule(parts),), EVERY_OTHER))
    small.sample(m, steps=12)
    assert inherited(m) == [1, 3, 5, 7, 9, 11]


def test_bytes_are_counted_of_tensors_without_memory_of_their_own():
    cache = module("nodes.engine.feature_cache")
    counted = []

    def f(x):
        counted.append(cache.bytes_of([x, x]))
        return x * 2

    torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),))
    assert counted == [12] and cache.bytes_of([torch.ones(3)]) == 12


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_in_which_nothing_can_be_inherited_is_told(model, caplog, steps):
    m = small.with_plan(model, PLAN)
    same = torch.equal(small.sample(m, steps=steps), small.sample(model, steps=steps))
    assert same == (steps == 1)
    assert ("does nothing in a run of 1 steps" in caplog.text) == (steps == 1)
    assert ("with fewer than" in caplog.text) == (steps == 2)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "schedule", [EVERY_OTHER, Schedule("adaptive", threshold=0.9, max_run=2)], ids=lambda s: s.mode
)
def test_beside_a_node_that_runs_the_network_twice_all_steps_are_computed(model, caplog, first, schedule):
    """As Reference ControlNets do: on another picture before, from which attention takes something."""

    def twice(m):
        def wrapper(executor, x, *args, **more):
            seen.append(1)
            return executor(x + 0.1 * executor(x.flip(-1), *args, **more), *args, **more)

        m = m.clone()
        m.add_wrapper_with_key("diffusion_model", "theirs", wrapper)
        return m

    seen = []
    wanted = small.sample(twice(model), steps=STEPS)
    assert not torch.equal(wanted, small.sample(model, steps=STEPS))
    plan = replace(PLAN, schedule=schedule)
    m = small.with_plan(twice(model), plan) if first else twice(small.with_plan(model, plan))
    seen.clear()
    assert torch.equal(small.sample(m, steps=STEPS), wanted) and len(seen) == STEPS + 1
    assert caplog.text.count("more than once in each step") == 1
    assert torch.equal(small.sample(m, steps=STEPS), wanted)
