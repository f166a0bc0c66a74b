"""Small random UNets, packs and sampling runs for scripts inside a host process: those of card/narrow.py, and more."""

from contextlib import contextmanager
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_torch_compile
from in_host import module

addresses = module("asdm_core.addresses")
architecture = module("asdm_core.architecture")
assignment = module("asdm_core.assignment")
condconv = module("asdm_core.condconv")
gri = module("asdm_core.gri")
packs = module("asdm_core.packs")
surgery = module("asdm_core.surgery")
apply_pack = module("nodes.apply_pack")
assigned = module("nodes.engine.assigned")
inheritance = module("nodes.engine.inheritance")
layer_times = module("nodes.engine.layer_times")
network = module("nodes.engine.network")
on_model = module("nodes.engine.on_model")
technique = module("nodes.engine.technique")
models = module("nodes.engine.models")
units = module("nodes.engine.units")
Architecture = architecture.Architecture

narrow = module("card.narrow")
SD, SD2, SDXL, CONFIGS = narrow.SD, narrow.SD2, narrow.SDXL, narrow.CONFIGS
weights, model, cond, sample, run = narrow.weights, narrow.model, narrow.cond, narrow.sample, narrow.run
write_unet, write_pack = narrow.write_unet, narrow.write_pack
difference = narrow.difference

# Few layers, for tests that trace the whole network; no stock loader knows this one.
TWO_LEVELS = addresses.UNetConfig(
    "two-levels", 32, (1, 2), ((1, 0), (0,)), addresses.RESNET_MID, ((0, 0), (1, 0, 0)), context_dim=48, num_heads=4
)


def write_experts(path, settings, config=SD, seed=0, how="random", scale=1.0, units=(), preset="m2", student=1):
    """A pack of experts; with `units` (of `preset`, weights of `student`) it plays these too."""
    chosen = Architecture.preset(preset, config) if units else Architecture.full(config)
    tensors = {
        k: t * (scale if ".experts." in k else 1) for k, t in condconv.start(config, settings, how, seed).items()
    }
    tensors |= surgery.extract(weights(config, student), chosen, units)
    packs.write_pack(path, tensors, packs.Description("pack", chosen, units, condconv=settings), None)
    return Path(path)


def write_gains(path, units, config=SD, seed=0, scale=1.0):
    """A pack of gains for GRI attention in these transformers."""
    generator = torch.Generator().manual_seed(seed)
    description = packs.Description("pack", Architecture.full(config), gri=gri.LogGains(tuple(units)))
    packs.write_pack(
        path,
        {k: torch.randn(s.shape, generator=generator) * scale for k, s in description.keys().items()},
        description,
        None,
    )
    return Path(path)


def combined(folder, config=SD, preset="m2", trunk=0, student=1, prediction="eps"):
    """What a pack of `preset` plays on a trunk, as one MODEL from one file (the units of packs are not involved)."""
    chosen = Architecture.preset(preset, config)
    weights_ = surgery.combine(weights(config, trunk), weights(config, student), chosen, chosen.pack_units())
    path = Path(folder) / f"combined-{config.family}-{preset}-{trunk}-{student}.safetensors"
    packs.write_unet(path, weights_, packs.Description("unet", chosen, prediction=prediction))
    return models.load_unet(str(path))


def with_pack(model, path, start=0.0, end=1.0, strength=1.0):
    """What the node Apply Pack makes."""
    path = Path(path)
    return apply_pack.apply_pack(model, path, path.name, assignment.Window(start, end), strength)


with_technique = on_model.with_technique


def with_plan(model, plan, **keeping):
    """What the node Feature Inheritance makes; None: without."""
    if plan is None:
        return on_model.without_technique(model, inheritance.Inheritance)
    return with_technique(model, inheritance.Inheritance(plan, **keeping))


def last_run(model):
    """The report of a MODEL's last run with feature inheritance."""
    return technique.technique_of(model, inheritance.Inheritance).log.last


def cache_bytes(model, shape, conds):
    """Bytes that a MODEL's feature inheritance remembers."""
    return technique.technique_of(model, inheritance.Inheritance).cache_bytes(model, shape, conds)


def with_speed(model):
    """What the node Measure Speed makes."""
    return with_technique(model, layer_times.Timed())


def last_times(model):
    """What was measured of its last run; None without the node before it."""
    timed = technique.technique_of(model, layer_times.Timed)
    return timed and timed.log.last


def lora(config=SD, seed=0, rank=2, size=0.5):
    """A LoRA in kohya's names for every layer of the UNet that can have one."""
    generator = torch.Generator().manual_seed(500 + seed)
    sd = {}
    for slot in addresses.keys(config, "diffusers").values():
        if len(slot.shape) < 2:
            continue
        name = "lora_unet_" + slot.unit.key(slot.tensor, "diffusers").removesuffix(".weight").replace(".", "_")
        c_out, c_in, *kernel = slot.shape
        sd[f"{name}.lora_down.weight"] = (
            torch.randn(rank, c_in, *kernel, generator=generator) * size / slot.tensor.numel**0.25
        )
        sd[f"{name}.lora_up.weight"] = (
            torch.randn(c_out, rank, *[1] * len(kernel), generator=generator) * size / slot.tensor.numel**0.25
        )
        sd[f"{name}.alpha"] = torch.tensor(float(rank))
    return sd


def add_lora(model, lora, strength=1.0):
    """What the stock node Load LoRA does to a MODEL."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def quantised(weights, form):
    """Linear layers of transformers in fp8 with a scale, as files hold them by now ("comfy_quant") or once did
    ("scaled_fp8"); and the numbers they stand for.
    """
    held, numbers = {}, dict(weights)
    if form == "scaled_fp8":
        held["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    for key, weight in weights.items():
        held[key] = weight.clone()
        if weight.dim() != 2 or "transformer_blocks" not in key:
            continue
        scale = weight.abs().max() / 448
        held[key] = (weight / scale).to(torch.float8_e4m3fn)
        numbers[key] = held[key].float() * scale
        layer = key.removesuffix("weight")
        if form == "scaled_fp8":
            held[f"{layer}scale_weight"] = scale
        else:
            held[f"{layer}weight_scale"] = scale
            held[f"{layer}comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return held, numbers


def merged(model, other, ratio):
    """What the stock node Merge Simple makes, which adds weights one by one and makes a table of all for each."""
    clone = model.clone()
    clone.add_patches(other.get_key_patches("diffusion_model."), 1.0 - ratio, ratio)
    return clone


@contextmanager
def little_memory():
    """Models are loaded for a card with no room: weights stay where they are and come when they are needed."""
    load = comfy.model_patcher.ModelPatcher.load
    partial = []

    def load_little(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        load(self, device_to, lowvram_model_memory=1, force_patch_weights=force_patch_weights, full_load=False)
        partial.append(self.model.model_lowvram)

    comfy.model_management.unload_all_models()
    comfy.model_patcher.ModelPatcher.load = load_little
    try:
        yield
    finally:
        comfy.model_patcher.ModelPatcher.load = load
        comfy.model_management.unload_all_models()
    assert partial and all(partial)


def control_net(config=SD, seed=4):
    """A random ControlNet for a family, as the stock loader would give it."""
    # The host's ControlNet builds its transformers from scalars of these, so they are given whole.
    whole = {
        k: v
        for k, v in config.to_host().items()
        if k not in ("out_channels", "transformer_depth_output", "use_temporal_resblock")
    }
    torch.manual_seed(seed)
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **whole)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return comfy.controlnet.ControlNet(net.eval(), load_device=torch.device("cpu"))


def sigmas_of(model, steps, scheduler="normal"):
    """The noise levels of a run of `run`'s."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


# Compiling ------------------------------------------------------------------------------------------

GRAPHS: list = []  # made since the compiler was last reset


def _collect(graph, inputs):
    GRAPHS.append(graph)
    return graph.forward


def compiled(model):
    """What the stock node makes, but for a backend that only collects the graphs."""
    clone = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(
        model=clone, backend=_collect, options={"guard_filter_fn": nodes_torch_compile.skip_torch_compile_dict}
    )
    return clone


def fresh_graphs():
    """For a fixture: the graphs made in the course of a test. The compiler forgets those of other tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    GRAPHS.clear()
    yield GRAPHS
    torch._dynamo.reset()
