"""Text encoder and VAE of a model: what turns captions and pictures into what the UNet sees.

They come from a diffusers folder, or from the single file an artist has in models/checkpoints (SD1.5 family:
text encoder only). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asdm_core.packs import TensorFile

LDM_TEXT = "cond_stage_model.transformer."  # of SD1.x checkpoints
TOKENIZER = Path("comfy") / "sd1_tokenizer"  # which ComfyUI brings


class Text(NamedTuple):
    """states: (B, L, D), what cross-attention sees; pooled: (B, P) for SDXL, else None."""

    states: Tensor
    pooled: Tensor | None = None

    def where_not(self, drop: Tensor, other: Text) -> Text:
        """That of another (1, L, D) where `drop` (B,) is set."""
        if self.pooled is None or other.pooled is None:
            return Text(torch.where(drop[:, None, None], other.states, self.states))
        return Text(
            torch.where(drop[:, None, None], other.states, self.states),
            torch.where(drop[:, None], other.pooled, self.pooled),
        )

    def on_cpu(self) -> Text:
        """Float32, on the CPU."""
        return Text(self.states.float().cpu(), None if self.pooled is None else self.pooled.float().cpu())


def conditions(text: Text, empty: Text, times: int, size: int, device: torch.device) -> dict[str, Tensor] | None:
    """SDXL's further conditions of whole pictures, for prompts and, with times = 2, as many empty ones."""
    if text.pooled is None or empty.pooled is None:
        return None
    pooled = torch.cat([text.pooled, empty.pooled.expand_as(text.pooled)])[: times * len(text.pooled)]
    return {"text_embeds": pooled.to(device), "time_ids": whole(size).expand(len(pooled), -1).to(device)}


def whole(size: int) -> Tensor:
    """SDXL's sizes of a picture that was not cropped, (1, 6)."""
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)


ToText = Callable[[Sequence[str]], Text]
ToLatents = Callable[[Tensor], Tensor]  # pictures (B, 3, S, S) in [-1, 1] -> latents as the UNet sees them


def load_text(models: str | Path, tokenizer: str | Path = "", device: str | torch.device = "cpu") -> ToText:
    """The text encoder in a diffusers folder or an SD1.x checkpoint. Raises ValueError where there is none.

    tokenizer: folder of CLIP's vocabulary; empty: that of the diffusers folder, or of the ComfyUI this pack lies in.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    models = Path(models)
    if not models.is_dir():
        return _ToText(_placed(_from_checkpoint(models), device), _tokenizer(tokenizer), device)
    if not (models / "text_encoder").is_dir():
        raise ValueError(f"{models} has no folder text_encoder; wanted a diffusers folder of a whole model")
    first = _ToText(
        _placed(CLIPTextModel.from_pretrained(models / "text_encoder", local_files_only=True), device),
        _tokenizer(tokenizer or models / "tokenizer"),
        device,
    )
    if not (models / "text_encoder_2").is_dir():
        return first
    second = _placed(
        CLIPTextModelWithProjection.from_pretrained(models / "text_encoder_2", local_files_only=True), device
    )
    return _ToTextXL(first, _ToText(second, _tokenizer(models / "tokenizer_2"), device))


def _placed(model: nn.Module, device: str | torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def load_vae(models: str | Path, device: str | torch.device = "cpu"):
    """The VAE of a diffusers folder. Raises ValueError where there is none."""
    from diffusers import AutoencoderKL

    if not (Path(models) / "vae").is_dir():
        raise ValueError(f"{models} has no folder vae; wanted a diffusers folder of a whole model")
    return _placed(AutoencoderKL.from_pretrained(Path(models) / "vae", local_files_only=True), device)


def latents_of(vae) -> ToLatents:
    """The encoding half of a VAE."""

    @torch.no_grad()
    def to_latents(pictures: Tensor) -> Tensor:
        # The mean, not a sample: what is encoded again is the same.
        return vae.encode(pictures.to(vae.device)).latent_dist.mode() * vae.config.scaling_factor

    return to_latents


class _ToText:
    def __init__(self, model, tokenizer, device):
        self.model = model
        self.tokenizer = tokenizer
        self.device = device

    @torch.no_grad()
    def outputs(self, captions: Sequence[str], **arguments):
        ids = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.model.config.max_position_embeddings,
        ).input_ids
        return self.model(ids.to(self.device), **arguments)

    def __call__(self, captions: Sequence[str]) -> Text:
        return Text(self.outputs(captions).last_hidden_state)


class _ToTextXL:
    """SDXL: the last but one layer of both encoders side by side, and the second one's projected output."""

    def __init__(self, first: _ToText, second: _ToText):
        self.encoders = first, second

    def __call__(self, captions: Sequence[str]) -> Text:
        found = [encoder.outputs(captions, output_hidden_states=True) for encoder in self.encoders]
        return Text(torch.cat([f.hidden_states[-2] for f in found], -1), found[1].text_embeds)


def _tokenizer(folder: str | Path):
    from transformers import CLIPTokenizer

    # custom_nodes/NAME/train/encoders.py
    hosts = (p / TOKENIZER for p in Path(__file__).resolve().parents if (p / TOKENIZER).is_dir())
    found = Path(folder) if folder else next(hosts, None)
    if found is None or not (found / "vocab.json").is_file():
        raise ValueError(
            f"encoders.tokenizer: {found or 'nothing given, and this pack does not lie in a ComfyUI, which has one'}; "
            "wanted a folder with CLIP's vocab.json and merges.txt, such as ComfyUI/comfy/sd1_tokenizer"
        )
    return CLIPTokenizer.from_pretrained(found, local_files_only=True)


def _from_checkpoint(path: Path):
    """CLIP's text model out of an SD1.x checkpoint; its shape is read off the tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel

    file = TensorFile(path)
    names = {
        key.removeprefix(LDM_TEXT).removeprefix("text_model."): key
        for key in file
        if key.startswith(LDM_TEXT) and not key.endswith("position_ids")
    }
    table, place = (names.get(f"embeddings.{kind}_embedding.weight") for kind in ("token", "position"))
    if table is None or place is None:
        raise ValueError(
            f"{path.name} holds no CLIP text encoder of the SD1.x kind ({LDM_TEXT}text_model...); give a diffusers "
            "folder "
            "with one as encoders.models"
        )
    (words, width), (length, _) = file.shapes[table], file.shapes[place]
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        max_position_embeddings=length,
        num_attention_heads=max(1, width // 64),
        intermediate_size=file.shapes[names["encoder.layers.0.mlp.fc1.weight"]][0],
        hidden_act="quick_gelu",
        projection_dim=width,
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in names if n.startswith("encoder.layers.")),
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    model = CLIPTextModel(config)
    # Newer versions of transformers leave out the classic "text_model.".
    wanted = [k for k, _ in model.named_parameters()]
    if missing := [k for k in wanted if k.removeprefix("text_model.") not in names]:
        raise ValueError(
            f"{path.name}: its text encoder lacks {missing[0]}; give a diffusers folder with a whole one as "
            "encoders.models"
        )
    model.load_state_dict({k: file[names[k.removeprefix("text_model.")]].float() for k in wanted}, strict=False)
    return model
