"""Other nodes that take asdm out of a run, or put layers of their own into the UNet: it is said, and nothing breaks."""

import comfy.sampler_helpers
import comfy.samplers
import pytest
import small
import torch
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import CurrentNodeContext
from comfy_extras import nodes_custom_sampler
from in_host import execute, module

inheritance = module("asdm_core.inheritance")
regional, switch = module("nodes.engine.regional"), module("nodes.engine.switch")
Window, STEPS = small.assignment.Window, 8


@pytest.fixture(scope="module")
def ours(model, m2, folder):
    other = small.model(folder, seed=3)
    return {
        "m2": lambda m: small.with_pack(m, m2),
        "balanced inheritance": lambda m: small.with_plan(m, inheritance.dial(small.SD, "balanced")),
        "GRI attention": lambda m: small.with_technique(m, regional.Regional(4, 2)),
        "switched": lambda m: switch.with_switch(m, other, switch.SwitchPoint(4, "step")),
    }


def runs_the_network_itself(m):
    """As node packs do that replace the forward of the whole network."""
    clone = m.clone()

    def wrapper(apply_model, given):
        base, x, t, c = m.model, given["input"], given["timestep"], given["c"]
        sampling = base.model_sampling
        out = base.diffusion_model(
            sampling.calculate_input(t, x),
            sampling.timestep(t).float(),
            context=c["c_crossattn"],
            transformer_options=c["transformer_options"],
        )
        return sampling.calculate_denoised(t, out.float(), x)

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def writes_wrappers_anew(*kinds):
    """As node packs do that set `model.wrappers[kind]` themselves."""

    def node(m):
        clone = m.clone()
        for kind in kinds:
            clone.wrappers[kind] = {"theirs": [lambda executor, *args, **more: executor(*args, **more)]}
        return clone

    return node


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["m2", "balanced inheritance", "GRI attention"])
def test_a_node_that_runs_the_network_itself_is_named_once(model, ours, caplog, name):
    many = 12  # enough for inheritance not to warn of few
    wanted = small.sample(runs_the_network_itself(model), steps=many)
    assert torch.equal(small.sample(runs_the_network_itself(ours[name](model)), steps=many), wanted)
    assert caplog.text.count(f"{name} did not act in this run") == 1
    assert "nothing to do" not in caplog.text  # one cause, one sentence


@pytest.mark.parametrize(
    "node, said",
    [
        (runs_the_network_itself, "did not act in this run"),
        (writes_wrappers_anew(WrappersMP.OUTER_SAMPLE), "are out of this run"),
    ],
)
def test_a_node_that_puts_two_techniques_on_a_model_speaks_once(model, caplog, node, said):
    with CurrentNodeContext("prompt", "7"):
        both = execute("ASDMSpeedUp", model=model, likeness="close", profile="automatic", large_pictures=True)[0]
    small.sample(node(both), steps=12)
    assert caplog.text.count(said) == 1 and "Speed Up (close)" in caplog.text and "GRI attention" in caplog.text


def test_a_model_whose_turn_never_comes_is_not_blamed(model, m2, folder, caplog):
    packed = small.with_pack(small.model(folder, seed=3), m2)
    switched = switch.with_switch(model, packed, switch.SwitchPoint(100, "step"))
    assert torch.equal(small.sample(switched, steps=STEPS), small.sample(model, steps=STEPS))
    assert "did not act" not in caplog.text


def test_what_only_speaks_is_not_missed(model, ours, caplog):
    speaks = small.with_technique(ours["m2"](model), module("nodes.load_checkpoint").MadeFor(128))
    small.sample(writes_wrappers_anew(WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL)(speaks), steps=STEPS)
    assert caplog.text.count("is out of this run") == 1 and "m2 is out of this run" in caplog.text


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kinds", [(WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL), (WrappersMP.OUTER_SAMPLE,)])
@pytest.mark.parametrize("name", ["m2", "balanced inheritance", "GRI attention", "switched"])
def test_wrappers_written_anew_behind_ours_are_said(model, ours, caplog, name, kinds):
    node = writes_wrappers_anew(*kinds)
    small.sample(node(ours[name](model)), steps=STEPS)
    assert caplog.text.count(f"{name} is out of this run") == 1
    caplog.clear()
    # Before ours it is in nobody's way.
    assert torch.equal(small.sample(ours[name](node(model)), steps=STEPS), small.sample(ours[name](model), steps=STEPS))
    assert "out of this run" not in caplog.text and "did not act" not in caplog.text


class Other(openaimodel.TimestepBlock):
    forward = openaimodel.ResBlock.forward
    _forward = openaimodel.ResBlock._forward


def test_layers_of_another_class_end_in_a_sentence_and_leave_other_runs_alone(model, ours):
    changed = model.clone()
    for i, block in enumerate(model.model.diffusion_model.input_blocks):
        for j, layer in enumerate(block):
            if isinstance(layer, openaimodel.ResBlock):
                changed.add_object_patch(f"diffusion_model.input_blocks.{i}.{j}.__class__", Other)
    inheriting = ours["balanced inheritance"]
    wanted = small.sample(inheriting(model), steps=STEPS)
    assert torch.equal(small.sample(changed, steps=STEPS), small.sample(model, steps=STEPS))
    with pytest.raises(ValueError, match=r"does not find the resnet .* another node has put layers of its own"):
        small.sample(inheriting(changed), steps=STEPS)
    assert torch.equal(small.sample(changed, steps=STEPS), small.sample(model, steps=STEPS))
    # The checkpoint may still be loaded with their patches.
    assert torch.equal(small.sample(inheriting(model), steps=STEPS), wanted)


def test_a_layer_replaced_by_a_patch_gives_every_run_the_same(model, m2):
    class Doubled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **more):
            return 2 * self.layer(*args, **more)

    path = "diffusion_model.input_blocks.1.0.in_layers.2"
    changed = model.clone()
    changed.add_object_patch(path, Doubled(model.get_model_object(path)))
    m = small.with_plan(changed, inheritance.dial(small.SD, "balanced"))
    first = small.sample(m, steps=STEPS)
    assert torch.equal(small.sample(m, steps=STEPS), first)
    small.sample(model, steps=2)
    assert torch.equal(small.sample(m, steps=STEPS), first)


def test_a_run_that_inherits_much_less_than_its_plan_says_so(model, caplog):
    m = small.with_plan(model, inheritance.dial(small.SD, "balanced"))
    small.sample(m, steps=STEPS)
    assert "steps that the plan lets inherit" not in caplog.text
    sizes = m.clone()
    turn = iter(range(1000))

    def pads(executor, x, t, *args, **more):
        """Another size at each call, as tiles have."""
        extra = 2 * (next(turn) % 3)
        padded = torch.nn.functional.pad(x, (0, extra))
        return executor(padded, t, *args, **more)[..., : x.shape[-1]]

    sizes.wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
    sizes.wrappers[WrappersMP.APPLY_MODEL] = {"pads": [pads], **sizes.wrappers[WrappersMP.APPLY_MODEL]}
    small.sample(sizes, steps=STEPS)
    assert caplog.text.count("steps that the plan lets inherit did") == 1


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", ["m2", "balanced inheritance", "GRI attention", "switched"])
def test_a_further_model_of_a_guider_is_told(model, ours, folder, caplog, name):
    other = small.model(folder, seed=4)

    def run(first, second):
        guider = nodes_custom_sampler.DualModelGuider.execute(
            first, small.cond(seed=1), 3.0, second, small.cond(seed=2)
        )
        return sampled(guider[0], model)

    wanted = run(other, model)
    assert torch.equal(run(other, ours[name](model)), wanted)
    assert caplog.text.count(f"{name} is out of this run: its MODEL is a further one") == 1
    caplog.clear()
    # As the first it acts, and so it does where both are one MODEL.
    assert not torch.equal(run(ours[name](model), other), run(model, other))
    if name != "switched":
        both = ours[name](model)
        assert not torch.equal(run(both, both), run(model, model))
    assert "out of this run" not in caplog.text and "did not act" not in caplog.text
    # Two MODELs of one UNet are two all the same, and what is on the further one does not act.
    if name not in ("balanced inheritance", "switched"):
        run(ours["balanced inheritance"](model), ours[name](model))
        assert caplog.text.count(f"{name} is out of this run: its MODEL is a further one") == 1


def sampled(guider, model):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(
        noise, torch.zeros_like(noise), sampler, small.sigmas_of(model, STEPS), disable_pbar=True, seed=0
    )


class PastTheGuider(comfy.samplers.CFGGuider):
    """Evaluates by itself, without the host's wrappers round an evaluation."""

    def __call__(self, x, timestep, model_options={}, seed=None):
        return self.predict_noise(x, timestep, model_options, seed)


class PastTheSampling(comfy.samplers.CFGGuider):
    """Samples by itself, without the host's wrappers round a run."""

    def sample(self, noise, latent_image, sampler, sigmas, **more):
        self.conds = {k: [c.copy() for c in v] for k, v in self.original_conds.items()}
        comfy.sampler_helpers.prepare_model_patcher(self.model_patcher, self.conds, self.model_options)
        return self.outer_sample(noise, latent_image, sampler, sigmas, **more)


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "kind, words", [(PastTheGuider, "did not act in this run: the guider"), (PastTheSampling, "is out of this run")]
)
@pytest.mark.parametrize("name", ["m2", "balanced inheritance", "GRI attention"])
def test_a_guider_with_ways_of_its_own_is_told(model, ours, caplog, name, kind, words):
    def run(m):
        guider = kind(m.clone())
        guider.set_conds(small.cond(seed=1), small.cond(seed=2))
        guider.set_cfg(3.0)
        return sampled(guider, model)

    assert torch.equal(run(ours[name](model)), run(model))
    assert caplog.text.count(f"{name} {words}") == 1
