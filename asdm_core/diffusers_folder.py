"""Diffusers folders: which file stands for the UNet, UNets in shards, and what their scheduler says they predict."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor

from .tensor_file import MAX_HEADER, BadFile, TensorFile
from .text import printable, read_json

# What a UNet's file is called in a diffusers folder, and the subfolders it may lie in. A variant (fp16, bf16, non_ema)
# stands before the ending; of a shard before its number, or, as older versions wrote it, behind; of an index behind its
# name, or as of a file.
_STEMS = ("diffusion_pytorch_model", "model")
_SUBFOLDERS = ("unet", "", "unet_ema")
_VARIANT = r"(?:\.[\w-]+)?"
_UNET_FILE = re.compile(rf"({'|'.join(_STEMS)})(?P<variant>{_VARIANT})\.safetensors")
_UNET_INDEX = re.compile(
    rf"({'|'.join(_STEMS)})(?P<variant>{_VARIANT})\.safetensors\.index(?P<behind>{_VARIANT})\.json"
)
_SHARD = re.compile(rf".*-\d{{5}}-of-\d{{5}}{_VARIANT}\.safetensors")


def unet_in_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The file that stands for the UNet of a diffusers folder (a pipeline's or the unet's own): a safetensors file, the
    index of one in shards, or None where there is neither. Files without a variant in their name come first, then fp16.
    """
    for sub in _SUBFOLDERS:
        found = []
        for path in sorted(Path(folder, sub).glob("*")):
            for sharded, pattern in enumerate((_UNET_FILE, _UNET_INDEX)):
                match = pattern.fullmatch(path.name)
                if match and path.is_file() and not is_shard(path.name):
                    variant = (match["variant"] or match.groupdict().get("behind", "")).lstrip(".")
                    found.append((variant != "", variant != "fp16", sharded, path.name, path))
        if found:
            return min(found)[-1]
    return None


def file_in_folder(folder: Path) -> Path:
    """As `unet_in_folder`. Raises BadFile where there is none."""
    found = unet_in_folder(folder)
    if found is not None:
        return found
    for sub in _SUBFOLDERS:
        pickles = sorted(p for ending in ("*.bin", "*.ckpt", "*.pt") for p in Path(folder, sub).glob(ending))
        if pickles:
            raise BadFile(
                f"{folder.name}: it holds only {pickles[0].name}, a pickle file, which can run code when it is opened; "
                "asdm reads only safetensors. Look for the same model in safetensors, or convert it where "
                "you trust the "
                "file: in Python, diffusers.UNet2DConditionModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
            )
    raise BadFile(
        f"{folder.name}: this folder holds no UNet; wanted {_STEMS[0]}.safetensors (with a variant, as .fp16, or in "
        f"shards with their index) in it or in its subfolder {_SUBFOLDERS[0]} or {_SUBFOLDERS[-1]}"
    )


def is_shard(name: str) -> bool:
    """Whether a file of this name is only a part of a model."""
    return _SHARD.fullmatch(name) is not None


class Shards(TensorFile):
    """The tensors of several safetensors files that one index lists, as one."""

    def __init__(self, index: str | os.PathLike[str]):
        self.path = Path(index)

        def bad(why: str) -> BadFile:
            return BadFile(f"{self.path.name}: {why}. Download the folder again.")

        try:
            if self.path.stat().st_size > MAX_HEADER:
                raise bad(f"this index is longer than {MAX_HEADER} bytes")
            places = read_json(self.path.read_bytes())["weight_map"]
        except (ValueError, TypeError, KeyError) as e:
            if isinstance(e, BadFile):
                raise
            raise bad("this is no index of shards (a JSON object with weight_map)") from None
        except OSError as e:
            raise bad(f"cannot be read ({e.strerror or e})") from None
        if not isinstance(places, dict) or not all(
            isinstance(n, str) and n.isprintable() and Path(n).name == n for n in places.values()
        ):
            raise bad("its weight_map does not name files beside it")
        names = sorted(set(places.values()))
        if lost := [name for name in names if not os.path.isfile(self.path.parent / name)]:  # false for names too long
            raise bad(f"{len(lost)} of the {len(names)} files that it names are not beside it, as {printable(lost[0])}")
        files = {name: TensorFile(self.path.parent / name) for name in names}
        self._places = {key: files[name] for key, name in places.items()}
        for key, name in places.items():
            if key not in files[name].dtypes:
                raise bad(f"{printable(name)} has no tensor {printable(key)}, which it says is there")
        self.metadata, self.dtypes, self.shapes = {}, {}, {}
        for file in files.values():
            if twice := self.dtypes.keys() & file.dtypes.keys():
                raise bad(f"tensor {printable(min(twice))} is in two of its files")
            self._places |= dict.fromkeys(file.dtypes, file)
            self.metadata = {**file.metadata, **self.metadata}
            self.dtypes |= file.dtypes
            self.shapes |= file.shapes

    def __getitem__(self, key: str) -> Tensor:
        return self._places[key][key]


def open_file(path: str | os.PathLike[str]) -> TensorFile:
    """The tensors of a safetensors file, or of the shards an index lists. Raises BadFile."""
    path = Path(path)
    return Shards(path) if _UNET_INDEX.fullmatch(path.name) else TensorFile(path)


def folder_prediction(path: Path) -> str | None:
    """Prediction type from the scheduler config of a diffusers folder, where there is one."""
    if not path.is_dir():
        return None
    for folder in (path, path.parent):  # a pipeline's folder, or the unet's own
        config = folder / "scheduler" / "scheduler_config.json"
        if config.is_file():
            try:
                kind = read_json(config.read_bytes()).get("prediction_type", "epsilon")
            except (ValueError, AttributeError, OSError):
                raise BadFile(f"{config}: cannot be read as JSON") from None
            names = {"epsilon": "eps", "v_prediction": "v"}
            if not isinstance(kind, str) or kind not in names:
                raise BadFile(f"{config}: prediction type {kind!r} is not supported; wanted one of {', '.join(names)}")
            return names[kind]
    return None
