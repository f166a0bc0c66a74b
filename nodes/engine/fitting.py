"""Fitting a pack to a MODEL within the host: a copy of its network that learns, and what surrounds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor, nn

from ...asdm_core import differences, few_step, fit
from ...asdm_core.packs import Description, Loaded
from . import bypass, units
from .comparison import original_of
from .deep_copy import bind_to_copy
from .network import architecture_of, prediction_of
from .unpatched import Unpatched, checkpoint_of, numbers


def diffusion_of(model) -> fit.Diffusion:
    """How a MODEL is trained. Raises ValueError where that is neither of noise nor of v, on a table of time steps."""
    sampling = model.get_model_object("model_sampling")
    prediction, kind = prediction_of(model)
    if prediction is None or not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise ValueError(
            "Fit Pack works on models that predict the noise or v on a table of time steps; this MODEL has "
            f"{kind}. Leave out nodes that change its sampling (as "
            "ModelSamplingDiscrete with lcm), and fit before them."
        )
    return fit.Diffusion(1 / (1 + sampling.sigmas.double().cpu() ** 2), prediction)


def name_of(model) -> str:
    """What a MODEL's checkpoint is called, for people."""
    given = model.cached_patcher_init[1] if model.cached_patcher_init else ()
    source = given[0] if given else ""
    return Path(source).name if isinstance(source, str) and source else "a checkpoint"


class Texts:
    """Prompts as the network sees them, by number, on the CPU."""

    def __init__(self, clip, prompts: Sequence[str]):
        encoded = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in ("", *prompts)]
        # Long prompts have several times as many states. Whole repetitions change nothing in attention.
        length = math.lcm(*(states.shape[1] for states, _ in encoded))
        self._states = [states.float().cpu().repeat(1, length // states.shape[1], 1) for states, _ in encoded]
        self._pooled = [pooled for _, pooled in encoded]
        self._added: list[Tensor | None] = [None] * len(encoded)

    def prepare(self, model, width: int, height: int) -> None:
        """Outside of inference mode: what autograd reads must have been made there."""
        self._states = [states.clone() for states in self._states]
        for i, pooled in enumerate(self._pooled):
            added = None
            if pooled is not None:
                added = model.model.encode_adm(
                    pooled_output=pooled.clone().cpu(),
                    width=width,
                    height=height,
                    device=torch.device("cpu"),
                    prompt_type="positive" if i else "negative",
                )
            self._added[i] = added

    def __len__(self) -> int:
        return len(self._states) - 1

    def __call__(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Number n is prompt n; fit.EMPTY is none."""
        rows = [n - fit.EMPTY for n in prompts]
        added = [self._added[i] for i in rows]
        states = torch.cat([self._states[i] for i in rows])
        return states, torch.cat(added) if all(a is not None for a in added) else None


class Copy:
    """A copy of a MODEL's network with its LoRAs in it, and the same network with a pack's units: they share the rest.

    Made outside of inference mode, because autograd cannot read what was made in it; the MODEL is only read.
    """

    def __init__(self, model, pack: Loaded):
        description = pack.description
        self.architecture = description.architecture
        self._model, self._pack = model, pack
        unpatched = Unpatched(model)
        original = bypass.in_weights(original_of(model))
        try:
            self.patcher = original.clone(disable_dynamic=True, force_deepcopy=True)
        except RuntimeError as e:
            raise ValueError(
                "this MODEL cannot be read a second time, which Fit Pack must do: the node that loaded it keeps no "
                f"note of its file ({e}). Load the checkpoint with Load Checkpoint or Load Diffusion Model."
            ) from None
        if lost := bind_to_copy(self.patcher, original):
            raise ValueError(
                f"another node on this MODEL holds its layers ({lost[0]}), so it would not act on the copy from which "
                "is learned. Put Fit Pack before that node."
            )
        self.patcher.injections.clear()  # modules for frames: pictures are learned, and layers found by their names
        device = self.patcher.load_device
        if self.dtype == torch.float16 and comfy.model_management.should_use_bf16(device):
            self.patcher.set_model_compute_dtype(torch.bfloat16)  # gradients need its range
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        self.unet = self.patcher.model.diffusion_model.requires_grad_(False)
        self.device = device
        # The units as Apply Pack would play them: what training changed, on top of the LoRAs.
        live = {
            key: numbers(key, get_key_weight(self.unet, key)[0]).float()
            for key in differences.needed(description)
            if key in unpatched
        }
        self.own = {key: live[key].clone() for key in description.unit_keys}
        if description.difference_of is None:
            changed = {key: pack.tensors[key].float() - unpatched[key].float().cpu() for key in self.own}
            start = {key: own + changed[key].to(own.device) for key, own in self.own.items()}
        else:
            played = differences.played_in(pack, live, "this MODEL").tensors
            start = {key: played[key] for key in self.own}
        plain = Description("pack", self.architecture, description.units)
        precision = self.patcher.model.model_config.unet_config.get("attn_precision")
        self.units = units.PackModel.load(Loaded(pack.path, plain, start), torch.float32, precision).to(device)
        self.units.requires_grad_(True)
        names = self.units.named_parameters()
        self.parameters = {name.removeprefix("diffusion_model."): p for name, p in names}
        players = {u.ldm: self.units.layer(u.address) for u in self.architecture.kept if u.address in description.units}
        cut = {u.ldm: units.stand_in(u) for u in units.walk(self.architecture.config) if self.is_cut(u.address)}
        self.student = units.with_submodules(self.unet, players | cut)
        where = [u for u in self.architecture.kept if u.address in fit.levels(self.architecture)]
        self.taps = fit.Taps(
            *({u.address: net.get_submodule(u.ldm) for u in where} for net in (self.unet, self.student))
        )

    def is_cut(self, address: str) -> bool:
        return address in self.architecture.cut

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self.patcher.model.get_dtype_inference()

    def network(self, unet: nn.Module, texts: Texts) -> fit.Network:
        def call(x: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
            states, added = texts(prompts)
            to = {"device": self.device, "dtype": self.dtype}
            y = added if added is None else added.to(**to)
            return unet(x.to(self.dtype), t.float(), states.to(**to), y, transformer_options={})

        return call

    def memory(self, student: fit.Network, shape: tuple[int, int, int], walks: int) -> int:
        """Bytes that learning takes beside the networks; a forward is measured on small latents."""
        channels, height, width = shape
        t = torch.zeros(2, device=self.device)

        def forward(side: int) -> Tensor:
            return student(torch.zeros(2, channels, side, side, device=self.device), t, [0, fit.EMPTY])

        return walks * fit.foretold_bytes(forward, height, width) + fit.learning_bytes(self.parameters.values())

    def make_room(self, needed: int) -> int:
        """Have the host unload what it can beside the copy; bytes that are free then."""
        others = [entry for entry in comfy.model_management.current_loaded_models if entry.model is self.patcher]
        comfy.model_management.free_memory(needed, self.device, keep_loaded=others)
        return comfy.model_management.get_free_memory(self.device)

    def load(self) -> None:
        """Have the copy on its device again, after others have been there."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)

    def learned(self, training: dict) -> tuple[Description, dict[str, Tensor]]:
        """The pack as it is now: differences from the MODEL's checkpoint, bound to it."""
        whose = checkpoint_of(self._model, name_of(self._model))
        before = self._pack.description
        description = Description(
            "pack",
            self.architecture,
            before.units,
            before.prediction,
            before.licence,
            {**before.training, "fit": training},
            difference_of=whose,
            made_for=whose,
        )
        return description, {key: p.detach() - self.own[key].to(p.device) for key, p in self.parameters.items()}

    def close(self) -> None:
        self.taps.close()
        self.patcher.detach()


@contextmanager
def learning():
    """The host's state while something is trained in it: no inference mode, and its own sign that this is so."""
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = False


def check_memory(needed: int, free: int, walks: int, say: Callable[[str], None]) -> None:
    """Say what learning needs; raise ValueError where that is not free."""
    say(f"learning takes {needed / 2**30:.1f} GiB beside the model, of {free / 2**30:.1f} GiB free")
    if needed > free:
        raise ValueError(
            f"Fit Pack needs {needed / 2**30:.1f} GiB beside the model, and {free / 2**30:.1f} GiB are free. Make "
            f"width and height smaller, or batch (now {walks})."
        )


def check_copy(model) -> None:
    """Raise ValueError where a second copy of the network does not fit into memory."""
    size = model.model_size()
    for device in {torch.device("cpu"), model.load_device}:
        free = comfy.model_management.get_free_memory(device)
        if device.type != "cpu":  # the host makes room there
            free = comfy.model_management.get_total_memory(device)
        if size > free:
            raise ValueError(
                f"Fit Pack works on a copy of this MODEL's network, {size / 2**30:.1f} GiB, and on {device} there are "
                f"{free / 2**30:.1f} GiB. Close other programs, or load the checkpoint in fp16 or fp8."
            )


def check_model(model, pack: Loaded) -> None:
    """Raise ValueError where a pack cannot be fitted to a MODEL."""
    description, name = pack.description, pack.path.name
    if description.condconv or description.gri or not description.units:
        raise ValueError(
            f"{name} has experts or gains, which are not fitted. Choose a pack that plays units alone; experts "
            "and gains suit any checkpoint as they are."
        )
    if few_step.of_pack(description.training) is not None:
        raise ValueError(
            f"{name} was trained for a run of few steps, and Fit Pack teaches what a whole run makes. Choose a pack "
            "that is for any number of steps; the few-step LoRA goes on top of it."
        )
    predicts = prediction_of(model)[0]
    if predicts and description.prediction and predicts != description.prediction:
        raise ValueError(
            f"{name} is a pack for networks that predict {description.prediction}, and this MODEL predicts {predicts}. "
            f"Choose a pack for {predicts}."
        )
    mine = architecture_of(model)
    if mine.cut:
        raise ValueError(
            f"this MODEL is a pruned UNet ({mine.name or 'a choice of its own'}) and can teach nothing of what it "
            "lacks. Connect the unpruned checkpoint."
        )
    beside = model.model.model_config.unet_config["in_channels"] != model.model.latent_format.latent_channels
    if model.model.concat_keys or beside:
        raise ValueError(
            "this MODEL is for inpainting or editing and wants pictures beside its prompts. Fit the pack to the "
            "checkpoint it was made from."
        )
