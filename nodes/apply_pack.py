"""A pack on a MODEL: trained stand-ins for some units, further experts for some convolutions, gains for GRI
attention.
"""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..asdm_core import packs, tensor_file
from ..asdm_core.architecture import FAMILIES
from ..asdm_core.assignment import CHECKPOINT, Override, Provider, Window
from ..asdm_core.packs import Description
from ..asdm_core.text import printable
from .common import CATEGORY
from .engine import files, models
from .engine.assigned import id_of, providers_of, with_overrides
from .engine.few_steps import with_few_steps
from .engine.network import architecture_of, same_skeleton, without_self_attention
from .engine.unpatched import plays


def overrides_of(description: Description, pack_id: str, window: Window, strength: float = 1.0) -> list[Override]:
    """What a pack says about the assignment: its units play, the units its architecture cuts are cut, its experts and
    log gains join.
    """
    experts, gains = (description.expert_units, description.log_gain_units) if strength else ((), ())
    said = (
        (description.units, Provider("pack", pack_id)),
        (description.architecture.cut_units, Provider("cut")),
        (experts, Provider("experts", pack_id, strength)),
        (gains, Provider("log_gains", pack_id, strength)),
    )
    return [Override(units, provider, window) for units, provider in said if units]


def check_fit(model, description: Description, name: str) -> None:
    """Raise ValueError unless a pack can play in this MODEL."""
    config = architecture_of(model).config
    wanted = description.architecture.config
    if not same_skeleton(config, wanted):
        family = config.family or "a pruned UNet loaded in stock form, or an unknown one"
        raise ValueError(
            f"{name} is a pack for {wanted.family} UNets ({wanted.model_channels} channels, text width "
            f"{wanted.context_dim}); "
            f"this MODEL is {family} ({config.model_channels} channels, text width {config.context_dim}). "
            + (
                "Put a pack for this family into models/asdm_packs and choose it; Feature Inheritance needs none."
                if config.family in FAMILIES
                else "If it is a pruned UNet, load it with Load Pruned UNet, which keeps every layer at its address."
            )
        )
    stem = [u for u in description.units if u.startswith("stem.")]
    if stem:
        raise ValueError(
            f"{name} plays {', '.join(stem)}, which only a whole UNet can carry. "
            "Make one with `python card.py core assemble` in asdm's folder and load it with Load Pruned UNet."
        )
    of_text = sorted(without_self_attention(model).intersection(description.units))
    if of_text:
        raise ValueError(
            f"{name} plays {of_text[0]} with a self-attention, and in this MODEL the first attention there attends to "
            "the text. It is another network; Feature Inheritance works on it."
        )
    architecture = description.architecture
    partly = {block.rpartition(".")[0] for block in architecture.cut.difference(architecture.cut_units)}
    if not partly.issubset(description.units):
        raise ValueError(
            f"{name} cuts transformer blocks of {min(partly - set(description.units))} without playing it; export it "
            "with that unit"
        )


def check_experts(model, description: Description, name: str, strength: float) -> None:
    """Raise ValueError unless a pack's experts, if it has any, have convolutions to join in this MODEL."""
    if description.condconv is None:
        if strength != 1 and description.gri is None:
            raise ValueError(
                f"strength is {strength:g}, and {name} has nothing that could be played in part: a unit plays or it "
                "does not. "
                "Set strength to 1; it scales the experts and gains of packs that have them."
            )
        return
    cut = {address for address, provider in providers_of(model).items() if provider.role == "cut"}
    missing = [a for a in description.expert_units if a in cut and a not in description.units]
    if missing:
        raise ValueError(
            f"{name} has experts for {missing[0]}, which is cut in this MODEL. Use a pack whose experts were made "
            "for it."
        )


def pack_dtype(model, stored: torch.dtype) -> torch.dtype:
    """Dtype for a pack's weights: the host's own, so that nothing is cast at each step; for hosts in fp8, as stored."""
    dtype = model.model.get_dtype()
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else stored


def apply_pack(model, path, name: str, window: Window, strength: float = 1.0):
    """A clone of MODEL with a pack in its assignment; MODEL itself where the pack would change nothing.

    Raises ValueError (tensor_file.BadFile among them).
    """
    file = tensor_file.TensorFile(path)
    description = packs.describe_pack(file)
    check_fit(model, description, name)
    check_experts(model, description, name, strength)
    pack_id = id_of(name, path)
    overrides = overrides_of(description, pack_id, window, strength)
    if not overrides:
        return model
    stored = file[next(iter(description.unit_keys or file))].dtype
    precision = model.model.model_config.unet_config.get("attn_precision")
    devices = model.load_device, model.offload_device  # not the host's: Select Model Device may have set others
    how = str(path), path.stat().st_mtime, pack_dtype(model, stored), precision, devices
    patcher = models.load_pack(*how) if description.difference_of is None else models.load_differences(model, *how)
    if unchanged := tuple(a for a in description.units if a in patcher.model.unchanged):
        overrides.append(Override(unchanged, CHECKPOINT, window))
    words = [made_for_another(name, description)] if is_for_another(model, description) else []
    trained_for = [(name, description.prediction)] if description.prediction and description.units else []
    played = with_overrides(model, overrides, {pack_id: patcher}, words, trained_for)
    return with_few_steps(played, description, name)


def is_for_another(model, description: Description) -> bool:
    """Whether a pack says that it was made for another checkpoint than a MODEL's."""
    return description.made_for is not None and not plays(model, description.made_for)


def made_for_another(name: str, description: Description) -> str:
    made_for = printable(description.made_for.name if description.made_for else "")
    if not description.units:
        return (
            f"{name} was made for {made_for}, and this MODEL is another network: what it adds to the layers there was "
            "not learned with these. Use it on that one, or on finetunes of it."
        )
    return (
        f"{name} was made for {made_for}, and this MODEL is another checkpoint: the pictures take on that one's style. "
        "Fit Pack fits it to this checkpoint in minutes, from prompts alone."
    )


class ASDMApplyPack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMApplyPack",
            display_name="Apply Pack",
            category=CATEGORY,
            description="Lets the trained, faster units of a pack play in any checkpoint of the same family, "
            "finetunes included. "
            "Units the pack has no need of are skipped. A pack can also bring further experts for convolutions, "
            "whose own weights stay the first expert, or gains for GRI Attention. LoRAs on the MODEL also act on the "
            "pack, "
            "whether they come before or after it. Packs live in models/asdm_packs. Saving the MODEL with stock "
            "nodes saves it without "
            "the pack; use Save UNet (asdm) to keep both.",
            search_aliases=["asdm", "combined unet", "m2", "condconv", "experts", "distilled", "stand-in"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "pack_name",
                    options=files.packs(),
                    tooltip="A file from models/asdm_packs, or a pack of the embedded family.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling run the pack begins to play; 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling run the checkpoint's own units take over again; 1 is the end.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="For packs with experts or gains: how much they add to the layers they join; 0 is "
                    "nothing at all. "
                    "Other packs play or do not, so leave it at 1 for them.",
                ),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,  # it speaks in runs: what another node like it has made would speak there
        )

    @classmethod
    def fingerprint_inputs(cls, pack_name=None, **_):
        return files.changed(files.pack_path, pack_name)

    @classmethod
    def execute(cls, model, pack_name, start_percent, end_percent, strength):
        if start_percent == end_percent:  # an empty window: the pack never plays
            return io.NodeOutput(model)
        window = Window(start_percent, end_percent)
        return io.NodeOutput(apply_pack(model, files.pack_path(pack_name), pack_name, window, strength))
