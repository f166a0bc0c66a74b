"""Small random UNets, packs and sampling runs for scripts inside a host process."""

import functools
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_torch_compile
from in_host import module

addresses = module("asdm_core.addresses")
architecture = module("asdm_core.architecture")
cast = module("asdm_core.cast")
condconv = module("asdm_core.condconv")
gri = module("asdm_core.gri")
packs = module("asdm_core.packs")
surgery = module("asdm_core.surgery")
apply_pack = module("nodes.apply_pack")
host = module("nodes.host")
models = module("nodes.models")
Architecture = architecture.Architecture

_SD = {"down": ((1, 1), (1, 1), (1, 1), (0, 0)), "mid": 1, "up": ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))}
SD = addresses.UNetConfig("small-sd", 32, (1, 2, 4, 4), **_SD, context_dim=48, num_heads=4)
SD2 = addresses.UNetConfig("small-sd2", 32, (1, 2, 4, 4), **_SD, context_dim=48, head_channels=16, use_linear=True)
SDXL = addresses.UNetConfig(
    "small-sdxl",
    32,
    (1, 2, 4),
    ((0, 0), (2, 2), (10, 10)),
    10,
    ((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    context_dim=48,
    head_channels=16,
    use_linear=True,
    adm_channels=2816,
)
# Few layers, for tests that trace the whole network; no stock loader knows this one.
TWO_LEVELS = addresses.UNetConfig(
    "two-levels", 32, (1, 2), ((1, 0), (0,)), addresses.RESNET_MID, ((0, 0), (1, 0, 0)), context_dim=48, num_heads=4
)
CONFIGS = {"sd": SD, "sd2": SD2, "sdxl": SDXL}

# Files without a description are recognised as members of these families too, by us and by the stock loaders.
architecture.FAMILIES.update({config.family: config for config in CONFIGS.values()})


def _stock_class(config, base):
    host_config = config.to_host()
    names = ("context_dim", "model_channels", "use_linear_in_transformer", "adm_in_channels", "use_temporal_attention")
    heads = {name: host_config[name] for name in ("num_heads", "num_head_channels")}
    return type(
        f"Small{base.__name__}",
        (base,),
        {
            "unet_config": {name: host_config[name] for name in names},
            "unet_extra_config": {**base.unet_extra_config, **heads},
        },
    )


comfy.supported_models.models[:0] = [
    _stock_class(SD, comfy.supported_models.SD15),
    _stock_class(SD2, comfy.supported_models.SD20),
    _stock_class(SDXL, comfy.supported_models.SDXL),
]


@functools.lru_cache(maxsize=12)
def weights(config, seed=0):
    """A random full state dict (addressed LDM names) whose activations stay near 1. Not to be changed."""
    generator = torch.Generator().manual_seed(seed)
    sd = {}
    for key, slot in addresses.keys(config).items():
        noise = torch.randn(slot.shape, generator=generator)
        if len(slot.shape) > 1:
            sd[key] = noise / noise[0].numel() ** 0.5
        else:
            sd[key] = noise * 0.1 + (slot.tensor.part == "norm" or "norm" in key) * key.endswith("weight")
    return sd


def write_unet(path, config=SD, cut="", on="*", seed=0, prediction="eps", dtype=None):
    chosen = Architecture.choose(config, cut, on) if cut else Architecture.full(config)
    sd, _ = surgery.cut(weights(config, seed), chosen)
    packs.write_unet(path, sd, packs.Description("unet", chosen, prediction=prediction), dtype)
    return str(path)


def write_pack(path, config=SD, preset="m2", seed=0, dtype=None, units=None, chosen=None):
    chosen = chosen or Architecture.preset(preset, config)
    units = units or chosen.pack_units()
    packs.write_pack(
        path, surgery.extract(weights(config, seed), chosen, units), packs.Description("pack", chosen, units), dtype
    )
    return Path(path)


def model(folder, config=SD, seed=0, prediction="eps"):
    """A MODEL of an unpruned UNet, as the stock loader gives it."""
    path = Path(folder) / f"{config.family}-{seed}-{prediction}.safetensors"
    if not path.exists():
        write_unet(path, config, seed=seed, prediction=prediction)
    return comfy.sd.load_diffusion_model(str(path))


def combined(folder, config=SD, preset="m2", trunk=0, student=1, prediction="eps"):
    """What a pack of `preset` plays on a trunk, as one MODEL from one file (the units of packs are not involved)."""
    chosen = Architecture.preset(preset, config)
    weights_ = surgery.combine(weights(config, trunk), weights(config, student), chosen, chosen.pack_units())
    path = Path(folder) / f"combined-{config.family}-{preset}-{trunk}-{student}.safetensors"
    packs.write_unet(path, weights_, packs.Description("unet", chosen, prediction=prediction))
    return models.load_unet(str(path))


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
    description = packs.Description("pack", Architecture.full(config), gri=gri.Gains(tuple(units)))
    packs.write_pack(
        path,
        {k: torch.randn(s.shape, generator=generator) * scale for k, s in description.keys().items()},
        description,
        None,
    )
    return Path(path)


def with_pack(model, path, start=0.0, end=1.0, strength=1.0):
    """What the node Apply Pack makes."""
    path = Path(path)
    return apply_pack.apply_pack(model, path, path.name, cast.Window(start, end), strength)


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


def cond(config=SD, seed=0, tokens=7, batch=1, **more):
    generator = torch.Generator().manual_seed(1000 + seed)
    extra = dict(more)
    if config.adm_channels:
        extra["pooled_output"] = torch.randn(batch, 1280, generator=generator)
    return [[torch.randn(batch, tokens, config.context_dim, generator=generator), extra]]


def sample(model, config=SD, size=(16, 16), batch=1, seed=0, latent=None, **more):
    """The latents of one sampling run through the host's own sampling code; `more` as in `run`."""
    latent = torch.zeros(batch, 4, *size) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return run(model, noise, latent, config, seed=seed, **more)


def run(
    model,
    noise,
    latent,
    config=SD,
    steps=2,
    cfg=3.0,
    sampler="euler",
    scheduler="normal",
    positive=None,
    negative=None,
    **more,
):
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or cond(config, 1),
        negative or cond(config, 2),
        latent,
        disable_pbar=True,
        **more,
    )


def sigmas_of(model, steps, scheduler="normal"):
    """The noise levels of a run of `run`'s."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def difference(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# Compiling ------------------------------------------------------------------------------------------

GRAPHS = []  # made since the compiler was last reset


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
