"""Every technique beside everything that artists put on a MODEL: the cells of docs/compatibility.md
(scripts/matrix.py).

A feature is applied to a stock MODEL and to MODELs with a technique. Where the technique has a reference made of
stock modules, or a limit in which it is the model itself, the pictures must be the same to the bit.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import matrix
import motion_modules
import nodes
import pytest
import reference
import small
import torch
from comfy.ldm.modules import attention
from comfy.t2i_adapter.adapter import Adapter_light
from comfy_extras import (
    nodes_context_windows,
    nodes_custom_sampler,
    nodes_easycache,
    nodes_freelunch,
    nodes_hooks,
    nodes_hypertile,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_tomesd,
)
from in_host import module

inheritance, switching = module("asdm_core.inheritance"), module("asdm_core.switching")
regional, switch = module("nodes.engine.regional"), module("nodes.engine.switch")
SD, addresses, surgery = small.SD, small.addresses, small.surgery
PRUNED, PACK, EXPERTS, INHERITANCE, GRI, SWITCH = matrix.TECHNIQUES


# Checkpoints ----------------------------------------------------------------------------------------

PLAN = inheritance.deepcache(SD, 1, inheritance.Schedule(interval=2))
M2 = small.Architecture.preset("m2", SD)
SHALLOW = tuple(a for a, conv in small.condconv.convolutions(SD).items() if conv.unit.address in M2.own)


class Checkpoints:
    """MODELs of one kind: `plain` and `second` are unpruned checkpoints, `combined` is M2 on the trunk of `plain` in
    one file, and `whole` has all its weights and the units it lacks. Files are shared by all kinds whose layers have
    the same shapes.
    """

    def __init__(self, folder, config=SD, dtype=None):
        self.folder, self.config, self.dtype = folder, config, dtype
        self.plain, self.second = self._load("plain", self._weights(0)), self._load("second", self._weights(2))
        self.chosen = small.Architecture.preset("m2", config)
        weights = self._combined(self._weights(0))
        self.whole = self._load("whole", {**self._weights(0), **weights})
        self.combined = self._load("combined", weights, self.chosen)
        self.pack = small.write_pack(folder / f"{self._name('pack')}.safetensors", seed=1)
        settings = small.condconv.CondConv(dict.fromkeys(SHALLOW, 2))
        self.experts = small.write_experts(folder / f"{self._name('experts')}.safetensors", settings)

    def _combined(self, trunk):
        return surgery.combine(trunk, self._weights(1), self.chosen, self.chosen.pack_units())

    def combined_on_stored(self):
        """`combined` where only the weights of the trunk went through the dtype of these files."""
        dtype = small.models.WEIGHT_DTYPES[self.dtype]["dtype"]
        path = str(self.folder / "stored.safetensors")
        weights = self._combined({k: w.to(dtype).float() for k, w in self._weights(0).items()})
        small.packs.write_unet(path, weights, small.packs.Description("unet", self.chosen, prediction="eps"))
        return small.models.load_unet(path)

    def _weights(self, seed):
        """The weights of the 4-channel family, but for the convolution that takes the latents in."""
        stem = "input_blocks.0.0.weight"
        return {**small.weights(SD, seed), stem: small.weights(self.config, seed)[stem]}

    def _name(self, role):
        return f"{role}-{self.config.in_channels}-{self.dtype}"

    def _load(self, role, weights, chosen=None):
        path = str(self.folder / f"{self._name(role)}.safetensors")
        description = small.packs.Description("unet", chosen or small.Architecture.full(self.config), prediction="eps")
        small.packs.write_unet(path, weights, description)
        if chosen:
            return small.models.load_unet(path, self.dtype or "default")
        return comfy.sd.load_diffusion_model(path, small.models.WEIGHT_DTYPES[self.dtype or "default"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: Checkpoints(folder, **KINDS[name]))


KINDS = {"SD": {}, "inpainting": {"config": replace(SD, in_channels=9)}, "fp8": {"dtype": "fp8_e4m3fn"}}


# Features -------------------------------------------------------------------------------------------


def itself(model):
    return model


@dataclass(frozen=True)
class Feature:
    """Something artists put on a MODEL or in a run.

    node: MODEL -> MODEL. run: MODEL -> arguments of the run; made once, from the plain checkpoint. kind: of the
    checkpoints. acts: whether it changes the picture. around: what holds during its runs. beside: what is on the
    MODEL with which the picture is compared to see whether it acts.
    """

    node: Callable = itself
    run: Callable = staticmethod(lambda model: {})
    kind: str = "SD"
    acts: bool = True
    around: Callable = nullcontext
    beside: Callable = itself


FEATURES: dict[str, Feature] = {}  # in the order of the page


def feature(name, **more):
    """Register what a function does to a MODEL as a feature."""

    def register(node):
        FEATURES[name] = Feature(node, **more)
        return node

    return register


def noise(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def controlled(net):
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        small.cond(seed=1),
        small.cond(seed=2),
        net,
        torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(5)),
        0.8,
        0.0,
        1.0,
    )
    return {"positive": positive, "negative": negative}


def t2i_adapter(model):
    torch.manual_seed(3)
    return controlled(
        comfy.controlnet.T2IAdapter(
            Adapter_light([32, 64, 128, 128], 1, 192), 3, 8, "nearest-exact", torch.device("cpu")
        )
    )


CONTROLLED = "input_blocks.1.0.in_layers.2"  # the layer on which the Control-LoRA has a difference of its own
UP = noise(32, 2, 1, 1)
DOWN = noise(2, 32, 3, 3) * 0.1


def control_lora(model):
    """All of its network but what it takes from the UNet, and a low-rank difference on one layer."""
    own = {
        k: v
        for k, v in small.control_net().control_model.state_dict().items()
        if k.startswith(("input_hint", "zero_conv", "middle_block_out"))
    }
    return controlled(comfy.controlnet.ControlLora({**own, f"{CONTROLLED}.up": UP, f"{CONTROLLED}.down": DOWN}))


def control_lora_written_out(model):
    """The same as an ordinary ControlNet."""
    net = small.control_net()
    unet = small.weights(SD, 0)
    net.control_model.load_state_dict(
        {k: v for k, v in unet.items() if k in net.control_model.state_dict()}, strict=False
    )
    net.control_model.get_submodule(CONTROLLED).weight.data += (UP.flatten(1) @ DOWN.flatten(1)).view(32, 32, 3, 3)
    return controlled(net)


def areas_and_masks(model):
    left = nodes.ConditioningSetArea().append(small.cond(seed=1), 80, 128, 0, 0, 1.0)[0]
    mask = torch.zeros(1, 128, 128)
    mask[:, 48:] = 1
    (masked,) = nodes.ConditioningSetMask().append(small.cond(seed=3), mask, "default", 0.7)
    return {"positive": [*left, *masked, *small.cond(seed=4)]}


FEATURES |= {
    "ControlNet": Feature(run=lambda model: controlled(small.control_net())),
    "Control-LoRA": Feature(run=control_lora),
    "T2I adapter": Feature(run=t2i_adapter),
    "areas and masks": Feature(run=areas_and_masks),
}


@feature("IP-Adapter")
def ip_adapter(model):
    """As IP-Adapter packs do: a second context with its own projections, in every cross-attention, by block number and
    index.
    """
    image = noise(2, 4, 24)  # of the negative and the positive prompt

    class Attend:
        def __init__(self, number):
            self.number = number
            self.projections = {}

        def __call__(self, q, k, v, extra_options):
            if q.shape[-1] not in self.projections:
                self.projections[q.shape[-1]] = noise(2, 24, q.shape[-1], seed=self.number) / 5
            key, value = (
                torch.stack([image[i] for i in extra_options["cond_or_uncond"]]) @ p
                for p in self.projections[q.shape[-1]]
            )
            per_cond = q.shape[0] // len(extra_options["cond_or_uncond"])
            key, value = (t.repeat_interleave(per_cond, 0) for t in (key, value))
            out = attention.optimized_attention(q, k, v, extra_options["n_heads"])
            return out + 0.6 * attention.optimized_attention(q, key, value, extra_options["n_heads"])

    clone = model.clone()
    blocks = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    for number, place in enumerate(blocks):
        clone.set_model_attn2_replace(Attend(number), *place, 0)
    return clone


feature("AnimateDiff", run=lambda model: {"batch": 3})(motion_modules.with_motion)


@contextmanager
def without_draws():
    """ToMe draws numbers for every layer that runs: a layer less would change all draws after it."""
    match = nodes_tomesd.bipartite_soft_matching_random2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes_tomesd, "bipartite_soft_matching_random2d", lambda *args: match(*args[:-1], True))
        yield


FEATURES |= {
    "FreeU": Feature(lambda m: nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2)[0]),
    "PAG": Feature(lambda m: nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)[0]),
    "SAG": Feature(lambda m: nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)[0]),
    "HyperTile": Feature(lambda m: nodes_hypertile.HyperTile.execute(m, 64, 1, 0, False)[0]),
    "ToMe": Feature(lambda m: nodes_tomesd.TomePatchModel.execute(m, 0.3)[0], around=without_draws),
    "deep shrink": Feature(
        lambda m: nodes_model_downscale.PatchModelAddDownscale.execute(m, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")[
            0
        ]
    ),
    "context windows": Feature(
        lambda m: nodes_context_windows.ContextWindowsManualNode.execute(
            motion_modules.with_motion(m), 3, 1, "standard_static", 1, False, "pyramid", 0, False
        )[0],
        lambda model: {"batch": 5},
        beside=motion_modules.with_motion,
    ),
    "EasyCache": Feature(
        lambda m: nodes_easycache.EasyCacheNode.execute(m, 0.5, 0.1, 1.0, False)[0], lambda model: {"steps": 6}
    ),
    "LazyCache": Feature(
        lambda m: nodes_easycache.LazyCacheNode.execute(m, 0.5, 0.1, 1.0, False)[0], lambda model: {"steps": 6}
    ),
}


@feature("tiles")
def tiled(model):
    """As tiled samplers do: the network is called for each tile of the latents, and the tiles are averaged."""

    def each_tile(apply_model, args):
        x = args["input"]
        out = torch.zeros_like(args["input"])
        count = 0.0
        for left in (0, 4, 8):
            window = torch.zeros_like(x[:1, :1])
            window[..., left : left + 8] = 1
            out[..., left : left + 8] += apply_model(x[..., left : left + 8], args["timestep"], **args["c"])
            count = count + window
        return out / count

    clone = model.clone()
    clone.set_model_unet_function_wrapper(each_tile)
    return clone


# LoRAs ----------------------------------------------------------------------------------------------


def adapter(kind):
    """A LyCORIS file for every layer of the UNet, with convolutions, in kohya's names."""
    generator = torch.Generator().manual_seed(700)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.4

    sd = {}
    for slot in addresses.keys(SD, "diffusers").values():
        if len(slot.shape) < 2:
            continue
        name = "lora_unet_" + slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight").replace(".", "_")
        c_out, c_in, *kernel = slot.shape
        fan = c_in * (kernel[0] ** 2 if kernel else 1)
        if kind == "LoCon":  # the kernel in the middle
            sd |= {
                f"{name}.lora_down.weight": draw(2, c_in, *[1] * len(kernel)),
                f"{name}.lora_up.weight": draw(c_out, 2, *[1] * len(kernel)) / fan**0.5,
            }
            if kernel:
                sd[f"{name}.lora_mid.weight"] = draw(2, 2, *kernel)
        elif kind == "LoHa":
            for part in "12":
                sd |= {f"{name}.hada_w{part}_a": draw(c_out, 2), f"{name}.hada_w{part}_b": draw(2, fan) / fan**0.25}
        elif kind == "LoKr":
            sd |= {f"{name}.lokr_w1": draw(2, 2), f"{name}.lokr_w2": draw(c_out // 2, c_in // 2, *kernel) / fan**0.5}
            if c_out % 2 or c_in % 2:
                raise AssertionError(name)
        else:  # DoRA: a LoRA, and lengths that the rows of the sum are brought to
            sd |= {
                f"{name}.lora_down.weight": draw(2, c_in, *kernel),
                f"{name}.lora_up.weight": draw(c_out, 2, *[1] * len(kernel)) / fan**0.5,
                f"{name}.dora_scale": 1 + draw(1, c_in, *[1] * len(kernel)).abs(),
            }
        if kind != "LoKr":
            sd[f"{name}.alpha"] = torch.tensor(2.0)
    return sd


def hooked(model):
    """A prompt with a LoRA of its own that grows weaker in the course of the run."""
    hooks = comfy.hooks.create_hook_lora(lora=small.lora(), strength_model=1.0, strength_clip=0.0)
    (group,) = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(1.0, 0.0)
    (hooks,) = nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, group)
    return {
        "positive": nodes_hooks.SetModelHooksOnCond().attach_hook(small.cond(seed=1), hooks)[0],
        "negative": small.cond(seed=2),
    }


def sampling(model, name, zsnr=False):
    return nodes_model_advanced.ModelSamplingDiscrete().patch(model, name, zsnr)[0]


FEATURES |= {
    "LoRA": Feature(lambda m: small.add_lora(m, small.lora())),
    **{
        kind: Feature(lambda m, kind=kind: small.add_lora(m, adapter(kind)))
        for kind in ("LoCon", "LoHa", "LoKr", "DoRA")
    },
    "hook LoRA": Feature(run=hooked),
    "bypass LoRA": Feature(lambda m: comfy.sd.load_bypass_lora_for_models(m, None, small.lora(), 1.0, 0.0)[0]),
    "LCM": Feature(
        lambda m: sampling(small.add_lora(m, small.lora()), "lcm"),
        lambda model: {"sampler": "lcm", "scheduler": "sgm_uniform", "cfg": 1.5},
    ),
}


# Runs, guidance, checkpoints, memory ------------------------------------------------------------------


def restart(model):
    sigmas = small.sigmas_of(model, 3)
    return {"sigmas": torch.cat([sigmas[:3], sigmas[1:]])}


def unsampling(model):
    (sigmas,) = nodes_custom_sampler.FlipSigmas.execute(small.sigmas_of(model, 3)[1:])
    return {"sigmas": sigmas, "latent": noise(1, 4, 16, 16), "cfg": 1.0}


def in_a_mask(model, **more):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12] = 1
    return {"latent": noise(1, 4, 16, 16), "noise_mask": mask, **more}


def inpainting_model(model):
    run = in_a_mask(model)
    more = {"concat_latent_image": run["latent"], "concat_mask": run["noise_mask"]}
    return {**run, "positive": small.cond(seed=1, **more), "negative": small.cond(seed=2, **more)}


def perp_neg(model):
    return {
        "guider": lambda m: nodes_perpneg.PerpNegGuider.execute(
            m, small.cond(seed=1), small.cond(seed=2), small.cond(seed=3), 3.0, 1.0
        )[0]
    }


FEATURES |= {
    "restart": Feature(run=restart),
    "unsampling": Feature(run=unsampling),
    "image to image": Feature(run=lambda model: {"latent": noise(1, 4, 16, 16), "denoise": 0.5}),
    "inpainting": Feature(run=in_a_mask),
    "inpainting model": Feature(run=inpainting_model, kind="inpainting"),
    "v-prediction": Feature(lambda m: sampling(m, "v_prediction")),
    "zero terminal SNR": Feature(lambda m: sampling(m, "v_prediction", True)),
    "RescaleCFG": Feature(lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7)[0]),
    "CFGOverride": Feature(
        lambda m: nodes_custom_sampler.CFGOverride.execute(m, 1.0, 0.0, 0.2)[0], lambda model: {"steps": 4}
    ),
    "PerpNeg": Feature(run=perp_neg),
    "fp8": Feature(kind="fp8"),
    "little memory": Feature(lambda m: small.add_lora(m, small.lora()), around=small.little_memory, acts=False),
}


# Cells ----------------------------------------------------------------------------------------------


class Bench:
    """A feature on the checkpoints it needs, and its pictures."""

    without: dict = {}  # pictures without any feature, for all

    def __init__(self, name, checkpoints):
        self.name = name
        self.feature = FEATURES[name]
        self.of = checkpoints(self.feature.kind)
        self.stock = checkpoints("SD")
        self.run = {"steps": 2, **self.feature.run(self.of.plain)}

    def __call__(self, model):
        """MODEL with the feature."""
        return self.feature.node(model)

    def with_technique(self, technique, model):
        """MODELs with the feature and a technique, in both orders; one where the feature is no node."""
        made = self(technique(model))
        return [made] if self.feature.node is itself else [made, technique(self(model))]

    def picture(self, model):
        """The latents of a run in the feature's circumstances."""
        run = dict(self.run)
        guider = run.pop("guider", None)
        with self.feature.around():
            torch.manual_seed(0)  # HyperTile and ToMe draw from the global generator
            if guider is None:
                return small.sample(model, **run)
            sampler = comfy.samplers.sampler_object("euler")
            return guider(model).sample(
                noise(1, 4, 16, 16, seed=0),
                torch.zeros(1, 4, 16, 16),
                sampler,
                small.sigmas_of(model, 2),
                disable_pbar=True,
                seed=0,
            )

    @functools.cached_property
    def alone(self):
        """The feature on an unpruned checkpoint, without asdm."""
        return self.picture(self(self.of.plain))

    @functools.cached_property
    def on_combined(self):
        """The feature on M2 as one file; None where that is refused."""
        if matrix.status(self.name, PRUNED) == matrix.REFUSED:
            return None
        return self.picture(self(self.of.combined))

    def check_that_it_acts(self, picture, technique, model):
        """The picture is not the one without the feature. model: an ordinary MODEL with the technique of this name."""
        key = technique, self.run["steps"], self.run.get("batch", 1), self.feature.beside
        if key not in self.without:
            self.without[key] = small.sample(self.feature.beside(model), steps=key[1], batch=key[2])
        if self.feature.acts:
            assert small.difference(picture, self.without[key]) > 1e-4
        else:
            same(picture, small.sample(self(model), steps=key[1]))


@pytest.fixture(scope="module")
def benches(checkpoints):
    return functools.cache(lambda name: Bench(name, checkpoints))


@pytest.fixture(params=FEATURES)
def bench(request, benches):
    return benches(request.param)


ROUNDING = 5e-4  # of another order of additions, at most; zero terminal SNR begins at sigma 4500 and shows every bit


def same(a, b, tolerance=0.0):
    assert b.isfinite().all()
    if tolerance:
        assert small.difference(a, b) < tolerance
    else:
        assert torch.equal(a, b)


def status(bench, technique):
    return matrix.status(bench.name, technique)


def test_the_table_has_these_features():
    assert [*FEATURES, "dynamic memory", "compile"] == sorted(
        matrix.FEATURES, key=[*FEATURES, "dynamic memory", "compile"].index
    )


@pytest.mark.sweep(3)
def test_pruned_unet(bench):
    model = bench(bench.of.combined)
    if status(bench, PRUNED) == matrix.REFUSED:
        with pytest.raises(ValueError, match="Control-LoRA .* down.0.1.resnet, .* cut"):
            bench.picture(model)
        return
    with reference.cut(bench.of.whole, bench.of.chosen):
        wanted = bench.picture(bench(bench.of.whole))
    same(bench.on_combined, wanted)
    bench.check_that_it_acts(wanted, PRUNED, bench.stock.combined)


@pytest.mark.sweep(3)
def test_pack(bench):
    wanted = bench.on_combined
    tolerance = 0.0
    if bench.name == "Control-LoRA":  # the checkpoint below has what the combined file lacks
        wanted = small.sample(bench.of.combined, **{**bench.run, **control_lora_written_out(bench.of.plain)})
        tolerance = 1e-5
    if bench.name == "fp8":  # on a checkpoint in fp8 a pack keeps its own precision
        wanted = bench.picture(bench.of.combined_on_stored())
        tolerance = 1e-5
    for model in bench.with_technique(lambda model: small.with_pack(model, bench.of.pack), bench.of.plain):
        same(bench.picture(model), wanted, tolerance)


@pytest.mark.sweep(3)
def test_condconv_pack(bench):
    with reference.experts(bench.of.plain, bench.of.experts):
        wanted = bench.picture(bench(bench.of.plain))
    found = bench.picture(bench(small.with_pack(bench.of.plain, bench.of.experts)))
    same(found, wanted, ROUNDING)
    bench.check_that_it_acts(found, EXPERTS, small.with_pack(bench.stock.plain, bench.stock.experts))
    assert small.difference(found, bench.alone) > 1e-3


@pytest.mark.sweep(3)
def test_feature_inheritance(bench, caplog):
    def technique(model):
        return small.with_plan(model, PLAN)

    with reference.Inheriting(bench.of.plain, bench.of.config, PLAN):
        wanted = bench.picture(bench(bench.of.plain))
    for model in bench.with_technique(technique, bench.of.plain):
        same(bench.picture(model), wanted)
        assert any(small.last_run(model).replayed)
    assert bench.name != "LCM" or "with fewer than 8" in caplog.text
    bench.check_that_it_acts(wanted, INHERITANCE, technique(bench.stock.plain))


# Where these are, a step may be computed though the plan leaves it out, or a noise level comes twice.
OWN_WAY = {"restart", "unsampling", "EasyCache", "LazyCache", "CFGOverride"}


@pytest.mark.sweep(3)
def test_speed_up(bench):
    forecast, forecasts = module("asdm_core.forecast"), module("nodes.engine.forecasts")
    steps = len(bench.run["sigmas"]) - 1 if "sigmas" in bench.run else bench.run["steps"]
    plan = forecast.every(steps, 2)

    def technique(model):
        return small.with_technique(model, forecasts.Forecasts(plan))

    made = [bench.picture(model) for model in bench.with_technique(technique, bench.of.plain)]
    assert all(picture.isfinite().all() and torch.equal(picture, made[0]) for picture in made)
    never = small.with_technique(bench.of.plain, forecasts.Forecasts(forecast.every(steps, 1)))
    same(bench.picture(bench(never)), bench.alone)
    if bench.name not in OWN_WAY:
        same(made[0], bench.picture(bench(reference.filtered(bench.of.plain, plan))), ROUNDING)
        assert small.difference(made[0], bench.alone) > 1e-5


@pytest.mark.sweep(3)
def test_gri_attention(bench, caplog):
    def exact(model):
        return small.with_technique(model, regional.Regional(4, 1))

    def rough(model):
        return small.with_technique(model, regional.Regional(8, 8))

    if status(bench, GRI) == matrix.OFF:
        same(bench.picture(bench(rough(bench.of.plain))), bench.alone)
        assert "there GRI is off" in caplog.text
        return
    same(bench.picture(bench(exact(bench.of.plain))), bench.alone, ROUNDING)
    found = bench.picture(bench(rough(bench.of.plain)))
    bench.check_that_it_acts(found, GRI, rough(bench.stock.plain))
    assert small.difference(found, bench.alone) > 1e-4


def at(first, second, where, unit="step"):
    return switch.with_switch(first, second, switching.SwitchPoint(where, unit))


@pytest.mark.sweep(3)
def test_switch_unet(bench):
    first, second = bench(bench.of.plain), bench(bench.of.second)
    alone = bench.picture(second)
    same(bench.picture(at(first, second, 1e9, "sigma")), alone)
    to_itself = at(first, bench(bench.of.plain), 1)
    if bench.name in ("EasyCache", "LazyCache"):  # the second cache begins empty
        again = (at(first, bench(bench.of.plain), step) for step in (2, 3, 4))
        assert not all(torch.equal(bench.picture(m), bench.alone) for m in again)
    else:
        same(bench.picture(to_itself), bench.alone)
    found = bench.picture(at(first, second, 1))
    assert not torch.equal(found, bench.alone)
    # On flipped sigmas both steps lie at or below the noise level of the second.
    assert torch.equal(found, alone) == (bench.name == "unsampling")


# Memory and compiling, where a stock run is not enough ------------------------------------------------


def techniques(of):
    """Name -> MODEL -> MODEL, for the techniques that are put on a checkpoint."""
    return {
        PACK: lambda model: small.with_pack(model, of.pack),
        EXPERTS: lambda model: small.with_pack(model, of.experts),
        INHERITANCE: lambda model: small.with_plan(model, PLAN),
        GRI: lambda model: small.with_technique(model, regional.Regional(8, 8)),
        SWITCH: lambda model: at(model, small.with_pack(model, of.pack), 1),
    }


@pytest.fixture
def on_a_card(monkeypatch):
    """MODEL -> the same under the dynamic patcher of graphics cards, which cannot load here; packs come under
    it too.
    """
    monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", lambda *args: None)

    def dynamic(patcher):
        made = comfy.model_patcher.ModelPatcherDynamic(patcher.model, torch.device("cuda", 0), torch.device("cpu"))
        made.cached_patcher_init = patcher.cached_patcher_init
        return made

    monkeypatch.setattr(
        small.models, "load_pack", lambda path, modified, *more: dynamic(small.models.new_pack_patcher(path, *more))
    )
    return dynamic


def fresh(model):
    """The MODEL read anew from its file."""
    load, arguments = model.cached_patcher_init
    return load(*arguments)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("technique", matrix.TECHNIQUES)
def test_dynamic_memory(checkpoints, on_a_card, technique):
    """In dynamic mode compiling and hook LoRAs move a MODEL to an ordinary patcher and a UNet object of its own."""
    of = checkpoints("SD")
    if technique == PRUNED:
        stock = of.combined

        def apply(model):
            return model
    else:
        stock = of.plain
        apply = techniques(of)[technique]
    moved = apply(on_a_card(fresh(stock))).clone(disable_dynamic=True)
    for patcher in (moved, *moved.get_nested_additional_models()):
        assert not patcher.is_dynamic()
        patcher.load_device = torch.device("cpu")
    wanted = small.sample(moved, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            small.models, "load_pack", lambda path, modified, *more: small.models.new_pack_patcher(path, *more)
        )
        same(wanted, small.sample(apply(stock), steps=2))
    assert technique == PRUNED or small.difference(wanted, small.sample(stock, steps=2)) > 1e-4


def test_a_model_that_was_moved_before_takes_ordinary_patchers_in(checkpoints, on_a_card):
    """TorchCompileModel before our nodes: packs and second models come under an ordinary patcher too."""
    of = checkpoints("SD")
    moved = on_a_card(fresh(of.plain)).clone(disable_dynamic=True)
    second = small.with_pack(on_a_card(fresh(of.second)), of.experts)
    switched = at(small.with_pack(moved, of.pack), second, 1)
    for patcher in (switched, *switched.get_nested_additional_models()):
        assert not patcher.is_dynamic()
        patcher.load_device = torch.device("cpu")
    found = small.sample(switched, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            small.models, "load_pack", lambda path, modified, *more: small.models.new_pack_patcher(path, *more)
        )
        same(
            found,
            small.sample(at(small.with_pack(of.plain, of.pack), small.with_pack(of.second, of.experts), 1), steps=2),
        )


def test_hook_loras_read_packs_and_second_models_once(checkpoints, on_a_card):
    """In dynamic mode the host makes another delegate for each run, always round the same UNet."""
    of = checkpoints("SD")
    model = at(
        small.with_pack(on_a_card(fresh(of.plain)), of.pack),
        small.with_pack(on_a_card(fresh(of.second)), of.experts),
        1,
    )
    first, again = (
        [patcher.model for patcher in (made, *made.get_nested_additional_models())]
        for made in (model.get_non_dynamic_delegate(), model.get_non_dynamic_delegate())
    )
    assert len(first) == len(again) == 4
    assert all(a is b for a, b in zip(first, again, strict=True))
