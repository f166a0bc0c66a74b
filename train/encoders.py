"""Text encoder and VAE of a model: what turns captions and pictures into what the UNet sees.

They come from a diffusers folder, or from the single file an artist has in models/checkpoints (SD1.5, SDXL). Captions
are read as ComfyUI reads prompts (train/prompts.py). Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asdm_core.tensor_file import TensorFile, read_header

from .prompts import Row, Tokeniser

LDM_TEXT = "cond_stage_model.transformer."  # of SD1.x checkpoints
XL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")  # of SDXL's
LDM_VAE = "first_stage_model."
TOKENIZER = Path("comfy") / "sd1_tokenizer"  # which ComfyUI brings
ROWS = 3  # of 75 tokens, the most of a caption


class Text(NamedTuple):
    """states: (B, L, D), what cross-attention sees; pooled: (B, P) for SDXL, else None."""

    states: Tensor
    pooled: Tensor | None = None

    def where_not(self, drop: Tensor, other: Text) -> Text:
        """That of another (1, L, D) where `drop` (B,) is set."""
        mine, its = alike([self.states, other.states])
        states = torch.where(drop[:, None, None], its, mine)
        if self.pooled is None or other.pooled is None:
            return Text(states)
        return Text(states, torch.where(drop[:, None], other.pooled, self.pooled))

    def on_cpu(self) -> Text:
        """Float32, on the CPU."""
        return Text(self.states.float().cpu(), None if self.pooled is None else self.pooled.float().cpu())


def alike(states: Sequence[Tensor]) -> list[Tensor]:
    """States (B, L, D) of different lengths, each repeated to the least common multiple of them: attention is the same
    for keys that all come equally often. ComfyUI does so too (CONDCrossAttn).
    """
    length = math.lcm(*{s.shape[1] for s in states})
    return [s.repeat(1, length // s.shape[1], 1) for s in states]


def joined(texts: Sequence[Text]) -> Text:
    """Texts one after the other."""
    pooled = [t.pooled for t in texts if t.pooled is not None]
    return Text(torch.cat(alike([t.states for t in texts])), torch.cat(pooled) if pooled else None)


def guided(states: Tensor, empty: Tensor) -> Tensor:
    """States (B, L, D) and, after them, as many of the empty prompt (1, M, D), L a multiple of M."""
    return torch.cat([states, empty.repeat(1, states.shape[1] // empty.shape[1], 1).expand_as(states)])


def conditions(text: Text, empty: Text, times: int, size: int, device: torch.device) -> dict[str, Tensor] | None:
    """SDXL's further conditions of whole pictures, for prompts and, with times = 2, as many empty ones."""
    if text.pooled is None or empty.pooled is None:
        return None
    pooled = torch.cat([text.pooled, empty.pooled.expand_as(text.pooled)])[: times * len(text.pooled)]
    return {"text_embeds": pooled.to(device), "time_ids": whole(size).expand(len(pooled), -1).to(device)}


def whole(size: int) -> Tensor:
    """SDXL's sizes of a picture that was not cropped, (1, 6)."""
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)


Tokens = tuple[list[Row], ...]  # of one caption: for each text encoder its rows
ToText = Callable[[Sequence[str]], Text]
ToLatents = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [-1, 1] -> latents as the UNet sees them


def load_text(
    models: str | Path,
    tokenizer: str | Path = "",
    device: str | torch.device = "cpu",
    clip_skip: int = 0,
    rows: int = ROWS,
) -> TextEncoders:
    """The text encoders in a diffusers folder or a checkpoint. Raises ValueError where there is none.

    tokenizer: folder of CLIP's vocabulary; empty: that of the diffusers folder, or of the ComfyUI this pack lies in.
    clip_skip: as in ComfyUI's CLIP Set Last Layer, without the minus; 0: see `its_clip_skip`. rows: of 75 tokens, the
    most of a caption.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    models = Path(models)
    if not models.is_dir():
        networks = _from_checkpoint(models)
        vocabularies = [_tokenizer(tokenizer)] * len(networks)
    elif not (models / "text_encoder").is_dir():
        raise ValueError(f"{models} has no folder text_encoder; wanted a diffusers folder of a whole model")
    else:
        networks = [CLIPTextModel.from_pretrained(models / "text_encoder", local_files_only=True)]
        vocabularies = [_tokenizer(tokenizer or models / "tokenizer")]
        if (models / "text_encoder_2").is_dir():
            networks.append(
                CLIPTextModelWithProjection.from_pretrained(models / "text_encoder_2", local_files_only=True)
            )
            vocabularies.append(_tokenizer(tokenizer or models / "tokenizer_2"))
    pads = [None, 0]  # SDXL's second text encoder was trained on rows that are filled with "!"
    tokenisers = [
        Tokeniser(vocabulary, net.config.max_position_embeddings, rows, pad)
        for net, vocabulary, pad in zip(networks, vocabularies, pads, strict=False)
    ]
    placed = [_placed(net.float(), device) for net in networks]
    return TextEncoders(placed, tokenisers, device, clip_skip or its_clip_skip(models))


def its_clip_skip(models: str | Path) -> int:
    """The clip skip a model was trained with, as far as it says so (modelspec.encoder_layer, ss_clip_skip, of
    checkpoints that kohya-ss' scripts wrote); else that of its family: 1 for SD1.5, 2 for SDXL.
    """
    models = Path(models)
    if models.is_dir():
        return 2 if (models / "text_encoder_2").is_dir() else 1
    header = read_header(models)
    for key in ("modelspec.encoder_layer", "ss_clip_skip"):
        if (said := header.metadata.get(key, "")).isdecimal() and int(said):
            return int(said)
    return 2 if any(key.startswith(XL_TEXT[1]) for key in header.tensors) else 1


def _placed(model: nn.Module, device: str | torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def has_vae(models: str | Path) -> bool:
    """Whether a diffusers folder or a checkpoint has a VAE."""
    models = Path(models)
    if models.is_file():
        return f"{LDM_VAE}encoder.conv_in.weight" in read_header(models).tensors
    return (models / "vae").is_dir()


def load_vae(models: str | Path, device: str | torch.device = "cpu"):
    """The VAE of a diffusers folder or a checkpoint. Raises ValueError where there is none."""
    from diffusers import AutoencoderKL

    models = Path(models)
    if not models.is_dir():
        return _placed(_vae_from_checkpoint(models), device)
    if not has_vae(models):
        raise ValueError(f"{models} has no folder vae; wanted a diffusers folder of a whole model")
    return _placed(AutoencoderKL.from_pretrained(models / "vae", local_files_only=True), device)


def latents_of(vae) -> ToLatents:
    """The encoding half of a VAE."""

    @torch.no_grad()
    def to_latents(pictures: Tensor) -> Tensor:
        # The mean, not a sample: what is encoded again is the same.
        return vae.encode(pictures.to(vae.device)).latent_dist.mode() * vae.config.scaling_factor

    return to_latents


class TextEncoders:
    """The text encoder of SD1.5, or both of SDXL side by side. clip_skip: the layer that is taken, counted from the
    end.

    As in ComfyUI, SD1.5's goes through the encoder's last norm, SDXL's do not, and the pooled states are those of the
    first row, without emphasis.
    """

    def __init__(
        self, networks: Sequence[Any], tokenisers: Sequence[Tokeniser], device: str | torch.device, clip_skip: int
    ):
        self.networks = networks
        self.tokenise = Tokenise(tokenisers)
        self.device = device
        self.clip_skip = clip_skip
        for net in networks:
            if not 1 <= clip_skip <= net.config.num_hidden_layers:
                raise ValueError(
                    f"encoders.clip_skip: must be from 1, the last layer, to {net.config.num_hidden_layers}, the first "
                    f"of this text encoder, or 0 for the model's own; got {clip_skip}"
                    + (f". What ComfyUI calls {clip_skip} is {-clip_skip} here" if clip_skip < 0 else "")
                )

    def __call__(self, captions: Sequence[str] | Sequence[Tokens]) -> Text:
        tokens: list[Tokens] = [self.tokenise([c])[0] if isinstance(c, str) else c for c in captions]
        each = [self._encoded(i, [t[i] for t in tokens]) for i in range(len(self.networks))]
        # Both encoders read the same text with the same vocabulary, so the lengths are the same.
        states = [torch.cat(sides, -1) for sides in zip(*(states for states, _ in each), strict=True)]
        return Text(torch.cat(alike(states)), each[1][1] if len(each) > 1 else None)

    @torch.no_grad()
    def _encoded(self, i: int, prompts: Sequence[Sequence[Row]]) -> tuple[list[Tensor], Tensor | None]:
        """States (1, L, D) of each prompt, and the pooled states (B, P)."""
        net = self.networks[i]
        rows = [self.tokenise.tokenisers[i].empty(), *(row for prompt in prompts for row in prompt)]
        numbers = torch.tensor([[token.number for token in row] for row in rows], device=self.device)
        weights = torch.tensor([[token.weight for token in row] for row in rows], device=self.device)[..., None]
        found = net(numbers, output_hidden_states=True)
        states = found.hidden_states[-self.clip_skip]
        if len(self.networks) == 1:
            states = getattr(net, "text_model", net).final_layer_norm(states)
        empty = states[:1]
        states = torch.where(weights == 1, states, (states - empty) * weights + empty)
        ends = [1]
        for prompt in prompts:
            ends.append(ends[-1] + len(prompt))
        parts = [states[a:b].flatten(0, 1)[None] for a, b in zip(ends, ends[1:], strict=False)]
        pooled = getattr(found, "text_embeds", None)
        return parts, None if pooled is None else pooled[ends[:-1]]


class Tokenise:
    """The tokenisers of a model's text encoders."""

    def __init__(self, tokenisers: Sequence[Tokeniser]):
        self.tokenisers = tokenisers

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        return [tuple(tokeniser(caption) for tokeniser in self.tokenisers) for caption in captions]


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


def _from_checkpoint(path: Path) -> list[Any]:
    """The text encoders out of a checkpoint; their shapes are read off the tensors."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    file = TensorFile(path)
    found = {prefix: [key for key in file if key.startswith(prefix)] for prefix in (LDM_TEXT, *XL_TEXT)}
    if all(found[prefix] for prefix in XL_TEXT):
        second = _of_open_clip({key: file[key] for key in found[XL_TEXT[1]]}, path.name)
        return [
            _filled(CLIPTextModel, _plain(file, XL_TEXT[0]), "quick_gelu", path.name),
            _filled(CLIPTextModelWithProjection, second, "gelu", path.name),
        ]
    if not found[LDM_TEXT]:
        raise ValueError(
            f"{path.name} holds no CLIP text encoder of the SD1.x or SDXL kind ({LDM_TEXT}text_model..., "
            f"{XL_TEXT[0]}...); give a diffusers folder or a whole checkpoint as encoders.models"
        )
    return [_filled(CLIPTextModel, _plain(file, LDM_TEXT), "quick_gelu", path.name)]


def _plain(file: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors by their names in transformers, without the classic "text_model."."""
    return {key.removeprefix(prefix).removeprefix("text_model."): file[key] for key in file if key.startswith(prefix)}


def _of_open_clip(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same of open_clip's names, by diffusers' table of them."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    width = tensors.get(f"{XL_TEXT[1]}ln_final.weight")
    if width is None:
        raise ValueError(f"{name}: its second text encoder lacks ln_final.weight; give a diffusers folder")
    # The width stands where diffusers looks for it.
    shape = type("Model", (), {"config": type("Config", (), {"hidden_size": len(width)})})
    if (projection := tensors.pop(f"{XL_TEXT[1]}text_projection", None)) is None:
        raise ValueError(f"{name}: its second text encoder lacks text_projection; give a diffusers folder")
    found = convert_open_clip_checkpoint(shape, tensors, prefix=XL_TEXT[1])
    plain = {key.removeprefix("text_model."): value for key, value in found.items()}
    return plain | {"text_projection.weight": projection.T.contiguous()}


def _filled(kind: type, tensors: Mapping[str, Tensor], activation: str, name: str) -> Any:
    """One of transformers' text models with these weights."""
    from transformers import CLIPTextConfig

    words, places, inner, projection = (
        tensors.get(key)
        for key in (
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.mlp.fc1.weight",
            "text_projection.weight",
        )
    )
    if words is None or places is None or inner is None:
        raise ValueError(f"{name} holds no whole CLIP text encoder; give a diffusers folder as encoders.models")
    count, width = words.shape
    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=width,
        max_position_embeddings=len(places),
        num_attention_heads=max(1, width // 64),
        intermediate_size=len(inner),
        hidden_act=activation,
        projection_dim=width if projection is None else len(projection),
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.layers.")),
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
    )
    model = kind(config)
    wanted = [k for k, _ in model.named_parameters()]
    if missing := [k for k in wanted if k.removeprefix("text_model.") not in tensors]:
        raise ValueError(
            f"{name}: its text encoder lacks {missing[0]}; give a diffusers folder with a whole one as encoders.models"
        )
    model.load_state_dict({k: tensors[k.removeprefix("text_model.")].float() for k in wanted}, strict=False)
    return model


def _vae_from_checkpoint(path: Path):
    """The VAE out of a checkpoint, by diffusers' table of the names; its shape is read off the tensors."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    file = TensorFile(path)
    if not has_vae(path):
        raise ValueError(
            f"{path.name} holds no VAE ({LDM_VAE}...); give a diffusers folder or a whole checkpoint as encoders.models"
        )
    tensors = {key: file[key].float() for key in file if key.startswith(LDM_VAE)}
    shapes = {key.removeprefix(LDM_VAE): tuple(value.shape) for key, value in tensors.items()}
    levels = 1 + max(int(k.split(".")[2]) for k in shapes if k.startswith("encoder.down."))
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": len({k.split(".")[4] for k in shapes if k.startswith("encoder.down.0.block.")}),
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 32,
        # Not in the weights: SDXL's and SD's.
        "scaling_factor": 0.13025 if any(key.startswith(XL_TEXT[1]) for key in file) else 0.18215,
    }
    vae: Any = AutoencoderKL(**config)
    found = convert_ldm_vae_checkpoint(tensors, config)
    wanted = vae.state_dict()
    if wrong := [k for k, v in wanted.items() if k not in found or found[k].numel() != v.numel()]:
        raise ValueError(f"{path.name}: its VAE lacks {wrong[0]}; give a diffusers folder as encoders.models")
    vae.load_state_dict({k: found[k].reshape(v.shape) for k, v in wanted.items()})
    return vae
