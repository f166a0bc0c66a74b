"""What the network of a MODEL is: a UNet of the LDM kind, with some of its units cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...asdm_core.addresses import UNetConfig, walk
from ...asdm_core.architecture import FAMILIES, Architecture


PREDICTIONS = {"eps": comfy.model_base.ModelType.EPS, "v": comfy.model_base.ModelType.V_PREDICTION}
# The host's classes of sampling are called as its types of models.
_SAMPLED = {getattr(comfy.model_sampling, kind.name): name for name, kind in PREDICTIONS.items()}


def prediction_of(model, derived: bool = False) -> tuple[str | None, str]:
    """What a MODEL's network is taken to predict, "eps" or "v", None for another thing; and the name of its kind.

    derived: of a kind that another module has derived from one of the host's, what the host's says (LCM: "eps").
    """
    sampling = model.get_model_object("model_sampling")
    kinds = [kind for kind in type(sampling).__mro__ if not issubclass(kind, nn.Module) and kind is not object]
    if not kinds:
        return None, type(sampling).__name__
    hosts = [kind for kind in kinds if kind.__module__ == comfy.model_sampling.__name__]
    return _SAMPLED.get(hosts[0] if derived and hosts else kinds[0]), kinds[0].__name__


def blends(model) -> bool:
    """Whether a MODEL's noise takes the place of the picture (flow matching), instead of lying on it."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def architecture_of(model) -> Architecture:
    """The skeleton and the cut units of the UNet of a MODEL.

    Raises ValueError for a MODEL whose network is not a UNet of the LDM kind.
    """
    config = model.model.model_config
    known = vars(config).get("asdm_architecture")  # plain getattr on a host config warns and gives None
    if known is not None:
        return known
    if not isinstance(model.model.diffusion_model, UNetModel):
        raise ValueError(
            f"asdm works on Stable Diffusion UNets (SD1.x, SD2.x, SDXL); this MODEL is a "
            f"{type(model.model.diffusion_model).__name__}."
        )
    unet = UNetConfig.from_host(config.unet_config)
    return Architecture.full(replace(unet, family=family_of(unet)))


def family_of(config: UNetConfig) -> str:
    """Name of the known family with this skeleton, whatever its input and output channels; "" for none."""
    for family in FAMILIES.values():
        if same_skeleton(family, config):
            return family.family
    return ""


def same_skeleton(a: UNetConfig, b: UNetConfig) -> bool:
    """Whether two UNets have the same units (inpainting models have more input channels, no other units)."""
    return replace(a, family="", in_channels=4, out_channels=4) == replace(b, family="", in_channels=4, out_channels=4)


def without_self_attention(model) -> frozenset[str]:
    """The transformers of a MODEL's UNet whose first attention attends to the text too (upscalers, SDXS), as its config
    has it.
    """
    given = model.model.model_config.unet_config
    levels, middle = given.get("disable_self_attentions") or (), bool(given.get("disable_middle_self_attn"))
    scales = {2**level for level, disabled in enumerate(levels) if disabled}
    transformers = [u for u in walk(architecture_of(model).config) if u.kind == "transformer"]
    return frozenset(u.address for u in transformers if (middle if u.side == "mid" else u.scale in scales))


@contextmanager
def ejected(model) -> Iterator[None]:
    """The network of a MODEL without what nodes inject between its layers (motion modules), which moves the names of
    those behind. After a run it stays there, and it may be there by another clone of the MODEL. Clones copy the mark
    that says so, so only that of a loaded one is to be believed.
    """
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    with ExitStack() as stack:
        for patcher in loaded:
            if patcher is not None and patcher.model is model.model:
                stack.enter_context(patcher.use_ejected())
        yield


def clone_for(model, patcher):
    """A clone of a patcher that is to play beside MODEL: an ordinary one where MODEL is (it is compiled, or has hook
    LoRAs).

    Its weights are read once and kept by `patcher`, which should outlive the run therefore. One whose loader does not
    say how to read it again stays as it is.
    """
    if patcher.is_dynamic() and not model.is_dynamic() and patcher.cached_patcher_init is not None:
        return patcher.get_non_dynamic_delegate()
    return patcher.clone()
