"""Packs and pruned UNets on disk.

A pack is a safetensors file with only what differs from a checkpoint, under addressed LDM names,
and a description as JSON in the metadata (key "asdm"). A standalone pruned UNet is written in the
renumbered LDM layout, which stock ComfyUI loads, with the same description beside it.

Files are read lazily: opening one reads its header, a tensor is mapped from disk when it is asked for.
Only safetensors are read. Everything is checked before anything is handed out, and an error names the
file, the tensor, what was wanted and what came.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .addresses import Slot, in_order
from .architecture import Architecture
from .condconv import CondConv, Conv
from .gri import LogGains
from .identity import Checkpoint
from .recognise import Recognised, Unrecognised, recognise, unet_prefix
from .surgery import ADDRESSED, Form, Mismatch, StateDict, check, convert, shapes_of
from .text import MESSAGE, printable, read_json

METADATA_KEY = "asdm"
# 1 had "gains" where log gains are meant: keys `attn1.gain`, read as `attn1.log_gain`. 3 has packs of differences,
# which an older version would play as weights: everything else is still written as 2.
FORMAT, FORMAT_WITHOUT_DIFFERENCES = 3, 2
KINDS = ("pack", "unet")
PREDICTIONS = ("eps", "v")
# Empty tensors by which other programs tell v-prediction (for SDXL, the only way they have) and a schedule that ends in
# noise.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
MARKERS = (V_MARKER, ZERO_SNR_MARKER, "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# Dtypes of weights by the names people know. A stored file can also be "int8", see `quantise`.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
)
SCALE = ".scale"  # int8 weights have their per-output-channel scale under <key>.scale

# Bounds for what a header may claim, each some ten times what any known file has: a checkpoint of 2,600 tensors has a
# header of 0.3 MB. They keep a crafted file from taking time and memory.
_MAX_HEADER, _MAX_TENSORS, _MAX_RANK, _MAX_SIDE, _MAX_NUMBERS = 16_000_000, 65_536, 8, 2**31, 2**40
_MAX_MARKER = 16  # numbers in a tensor that only says how a UNet was trained
_READ = {  # by a safetensors header's names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SCALE_DTYPES = {"F32", "F16", "BF16"}
_WEIGHT_DTYPES = _SCALE_DTYPES | {"F8_E4M3", "F8_E5M2", "I8"}


class BadFile(ValueError):
    """A file that cannot be used. The message says which, what was wanted, what came and what to do; it is one line of
    bounded length, whatever names the file holds.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, MESSAGE))


# Headers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself: tensors by name as (dtype name, shape), and its metadata."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]


def parse_header(data: bytes, size: int, name: str) -> Header:
    """Read a safetensors header.

    data: the first bytes of the file, at least the whole header; size: length of the file in bytes.
    Raises BadFile, naming `name`.
    """

    def bad(why: str, do: str = "Download or export it again.") -> BadFile:
        return BadFile(f"{printable(name)}: {why}. {do}")

    # The first bytes alone do not tell: they can be the length of a header, which a brace follows.
    if (data[:2] == b"PK" or data[:1] == b"\x80") and data[8:9] != b"{":
        raise bad(
            "this is a pickle file (.ckpt, .pt or .bin), which can run code when it is opened; asdm reads only "
            "safetensors",
            "Convert it to safetensors first.",
        )
    if len(data) < 8:
        raise bad(f"only {len(data)} bytes long; wanted a safetensors file")
    length = struct.unpack("<Q", data[:8])[0]
    if _MAX_HEADER < length <= size - 8:
        raise bad(f"its header is {length} bytes long; wanted at most {_MAX_HEADER}")
    if length > max(size - 8, 0) or length > len(data) - 8:
        raise bad(f"its header claims {length} bytes and the file has {size}; it is cut short, or no safetensors file")
    try:
        header = read_json(data[8 : 8 + length])
    except ValueError:
        raise bad("its header is not valid JSON, so it is no safetensors file") from None
    if not isinstance(header, dict):
        raise bad("its header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("its metadata is not a table of texts")
    if len(header) > _MAX_TENSORS:
        raise bad(f"its header names {len(header)} tensors; wanted at most {_MAX_TENSORS}")
    tensors, end = {}, 0
    for key, entry in header.items():
        try:
            dtype = entry["dtype"]
            shape = tuple(entry["shape"])
            (start, stop) = entry["data_offsets"]
            numbers = (*shape, start, stop)
        except (TypeError, KeyError, ValueError):
            raise bad(f"the entry of tensor {printable(key)} is malformed") from None
        if not isinstance(dtype, str) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise bad(f"the entry of tensor {printable(key)} is malformed")
        if (
            len(shape) > _MAX_RANK
            or max(shape, default=0) >= _MAX_SIDE
            or math.prod(n for n in shape if n) >= _MAX_NUMBERS
        ):
            raise bad(
                f"tensor {printable(key)} claims the shape {printable(list(shape[: _MAX_RANK + 1]))}; wanted at most "
                f"{_MAX_RANK} dimensions, below {_MAX_SIDE} each and below {_MAX_NUMBERS} numbers in all"
            )
        if dtype in _READ and stop - start != math.prod(shape) * _READ[dtype].itemsize:
            raise bad(
                f"tensor {printable(key)} ({dtype}, {list(shape)}) takes {stop - start} bytes, which does "
                f"not fit its shape"
            )
        tensors[key] = (dtype, shape)
        end = max(end, stop)
    if 8 + length + end != size:
        raise bad(
            f"it should be {8 + length + end} bytes long and has {size}; it is "
            + ("cut short" if size < 8 + length + end else "too long")
        )
    return Header(tensors, metadata)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Header of a safetensors file, without its tensors. Raises BadFile."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            data = f.read(9)
            if data[8:] == b"{":
                data += f.read(min(struct.unpack("<Q", data[:8])[0], _MAX_HEADER, size))
    except FileNotFoundError:
        raise BadFile(f"{path.name}: there is no such file ({path})") from None
    except IsADirectoryError:
        raise BadFile(f"{path.name}: this is a folder; wanted a .safetensors file ({path})") from None
    except OSError as e:
        raise BadFile(f"{path.name}: cannot be read ({e.strerror or e})") from None
    return parse_header(data, size, path.name)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file as a lazy mapping; int8 weights come out dequantised (float32).

    shapes: name -> shape of everything it holds, known without reading a tensor.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        header = read_header(path)
        self.metadata = header.metadata
        self.dtypes = {k: d for k, (d, _) in header.tensors.items()}
        self._scales = {k + SCALE for k, d in self.dtypes.items() if d == "I8" and k + SCALE in self.dtypes}
        self.shapes = {k: s for k, (_, s) in header.tensors.items() if k not in self._scales}
        for key in sorted(self._scales):
            (dtype, shape) = header.tensors[key]
            wanted = list(header.tensors[key.removesuffix(SCALE)][1][:1])
            if dtype not in _SCALE_DTYPES or list(shape) != wanted:
                raise BadFile(
                    f"{self.path.name}: tensor {printable(key)} ({printable(dtype)}, {list(shape)}) is no "
                    f"scale of int8 weights; wanted "
                    f"{wanted}, one number per output channel, as one of {', '.join(sorted(_SCALE_DTYPES))}"
                )
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise BadFile(
                f"{self.path.name}: cannot be read as safetensors ({e}). Download or export it again."
            ) from None

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        if self.dtypes[key] not in _READ:
            raise BadFile(
                f"{self.path.name}: tensor {printable(key)} has dtype {printable(self.dtypes[key])}, which "
                f"asdm does not "
                f"read; wanted one of {', '.join(sorted(_READ))}"
            )
        tensor: Tensor = self._file.get_tensor(key)
        if key + SCALE in self._scales:
            return dequantise(tensor, self._file.get_tensor(key + SCALE))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Renamed(Mapping[str, Tensor]):
    """Some tensors of another mapping under new names, still lazy. names: new name -> old name."""

    def __init__(self, source: Mapping[str, Tensor], names: Mapping[str, str]):
        self.source = source
        self.names = dict(names)
        shapes = shapes_of(source)
        self.shapes = {new: tuple(shapes[old]) for new, old in self.names.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self.source[self.names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# int8 storage ---------------------------------------------------------------------------------------


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: (int8 of weight's shape, float32 scale of shape (out,))."""
    flat = weight.detach().float().flatten(1)
    scale = flat.abs().amax(1) / 127
    steps = flat / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8).view(weight.shape), scale


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantise`: float32."""
    return weight.float() * scale.float().view(-1, *[1] * (weight.dim() - 1))


def quantised(sd: Mapping[str, Tensor], vector_dtype: torch.dtype = torch.float32) -> StateDict:
    """A state dict with every weight of two or more dimensions as int8 and scale, vectors as `vector_dtype`."""
    result: StateDict = {}
    for key, tensor in sd.items():
        if tensor.dim() < 2:
            result[key] = tensor.detach().to(vector_dtype)
        else:
            result[key], result[key + SCALE] = quantise(tensor)
    return result


# Descriptions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What a pack or a pruned UNet says about itself.

    kind: "pack" (only `units`, to be played inside a checkpoint) or "unet" (stands for itself).
    units: addresses a pack plays; none if it only has further experts or log gains for units of others.
    prediction: "eps" or "v"; None leaves it to the checkpoint.
    companions: other files of an embedded checkpoint, by role ("vae", "text_encoder").
    training: where the weights came from; free form. condconv, gri: what it has of those techniques.
    difference_of: the checkpoint that the units are differences from (see `differences`); None where they are weights.
    made_for: the checkpoint that a pack was trained in or fitted to; None where it was made for many, or does not say.
    """

    kind: str
    architecture: Architecture
    units: tuple[str, ...] = ()
    prediction: str | None = None
    licence: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    condconv: CondConv | None = None
    gri: LogGains | None = None
    difference_of: Checkpoint | None = None
    made_for: Checkpoint | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {printable(repr(self.kind))}")
        if self.prediction not in (None, *PREDICTIONS):
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {printable(repr(self.prediction))}")
        units = in_order(self.architecture.config, self.units)
        kept = {u.address for u in self.architecture.kept}
        if self.kind == "pack" and not units:
            if self.condconv is None and self.gri is None:
                raise ValueError("a pack must play at least one unit")
            if self.architecture.cut:
                raise ValueError(
                    f"a pack that plays no unit cannot cut units, and this one cuts {min(self.architecture.cut)}"
                )
        if self.kind != "pack" and (self.condconv or self.gri):
            raise ValueError("condconv, gri: further experts and log gains come in packs only")
        if self.difference_of and not (self.kind == "pack" and units):
            raise ValueError("difference_of: only the units of a pack can be differences, and it has none")
        concerned = {*units, *self.expert_units, *self.log_gain_units}
        if not kept.issuperset(concerned):
            raise ValueError(f"{min(concerned - kept)} is cut in this architecture, so no pack can play it")
        object.__setattr__(self, "units", units)

    @property
    def family(self) -> str:
        return self.architecture.config.family

    @property
    def convs(self) -> tuple[Conv, ...]:
        """The convolutions that have further experts in this pack, whoever plays their units."""
        return tuple(self.condconv.convs(self.architecture.config).values()) if self.condconv else ()

    @property
    def expert_units(self) -> tuple[str, ...]:
        """The units these convolutions belong to."""
        return in_order(self.architecture.config, {conv.unit.address for conv in self.convs})

    @property
    def unit_keys(self) -> dict[str, Slot]:
        """Addressed tensor names of the units a pack plays, and their slots."""
        played = set(self.units)
        return {k: s for k, s in self.architecture.keys().items() if s.unit.address in played}

    @property
    def expert_keys(self) -> dict[str, Slot]:
        """Tensor names of the further experts and their routers, and their slots."""
        return self.condconv.keys(self.architecture.config) if self.condconv else {}

    @property
    def log_gain_keys(self) -> dict[str, Slot]:
        """Tensor names of the log gains of GRI attention, and their slots."""
        return self.gri.keys(self.architecture.config) if self.gri else {}

    @property
    def log_gain_units(self) -> tuple[str, ...]:
        """The transformers they belong to."""
        return in_order(self.architecture.config, {slot.unit.address for slot in self.log_gain_keys.values()})

    def keys(self) -> dict[str, Slot]:
        """Tensor names of the file and their slots: addressed for a pack, else the standalone form."""
        if self.kind == "pack":
            return self.unit_keys | self.expert_keys | self.log_gain_keys
        return self.architecture.keys(*standalone_form(self.architecture))

    def to_json(self) -> str:
        data = {
            "format": FORMAT if self.difference_of else FORMAT_WITHOUT_DIFFERENCES,
            "kind": self.kind,
            "architecture": self.architecture.to_dict(),
            "units": list(self.units),
            "prediction": self.prediction,
            "licence": self.licence,
            "training": dict(self.training),
            "companions": dict(self.companions),
            "condconv": self.condconv and self.condconv.to_dict(),
            "gri": self.gri and self.gri.to_dict(),
            "difference_of": self.difference_of and self.difference_of.to_dict(),
            "made_for": self.made_for and self.made_for.to_dict(),
        }
        return json.dumps({k: v for k, v in data.items() if v not in (None, {}, [], "")}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises ValueError for anything that is not a description this version can use."""
        try:
            data = read_json(text)
        except ValueError:
            raise ValueError("its description is not valid JSON") from None
        if not isinstance(data, dict):
            raise ValueError("its description is not a JSON object")
        version = data.get("format")
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise ValueError(
                f"its description has format {printable(repr(version))}; this version of asdm reads up to "
                f"{FORMAT}, so update asdm"
            )
        units = data.get("units", [])
        if not isinstance(units, list) or not all(isinstance(a, str) for a in units):
            raise ValueError("units in its description must be a list of addresses")
        tables = {name: {} if data.get(name) is None else data[name] for name in ("training", "companions")}
        for name, value in tables.items():
            if not isinstance(value, dict):
                raise ValueError(f"{name} in its description must be a JSON object, got {printable(value)}")
        for role, file in tables["companions"].items():
            if not isinstance(file, str) or not file or not file.isprintable() or Path(file).name != file:
                raise ValueError(
                    f"companions in its description must be names of files beside it; for {printable(role)} it has "
                    f"{printable(file)}"
                )
        condconv = None if data.get("condconv") is None else CondConv.from_dict(data["condconv"])
        gri = None if data.get("gri") is None else LogGains.from_dict(_of_format(version, data["gri"]))
        architecture = Architecture.from_dict(data["architecture"] if "architecture" in data else {})
        difference_of, made_for = (
            None if data.get(name) is None else Checkpoint.from_dict(data[name], architecture.config)
            for name in ("difference_of", "made_for")
        )
        return cls(
            kind=str(data.get("kind")),
            architecture=architecture,
            units=tuple(units),
            prediction=data.get("prediction"),
            licence=str(data.get("licence", "")),
            condconv=condconv,
            gri=gri,
            difference_of=difference_of,
            made_for=made_for,
            **tables,
        )


def _of_format(version: int, gri: Any) -> Any:
    """What a description of some format says of GRI attention, in the words of today's."""
    if version == 1 and isinstance(gri, dict) and "gains" in gri:
        return {"log_gains" if name == "gains" else name: value for name, value in gri.items()}
    return gri


def standalone_form(architecture: Architecture) -> Form:
    """The form a standalone pruned UNet is written in: renumbered, or addressed where no renumbered one exists."""
    try:
        _ = architecture.renumbered
    except ValueError:
        return ADDRESSED
    return Form("ldm", "renumbered")


# Reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """An opened, checked file: its description and its tensors under addressed LDM names (lazy).

    markers: tensors beside the UNet's that say how it was trained, by name.
    unknown: tensors of the file that belong to no layer of its UNet and were left out.
    """

    path: Path
    description: Description
    tensors: Mapping[str, Tensor]
    markers: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def describe(file: TensorFile) -> Description | None:
    """The description in a file's metadata; None where there is none. Raises BadFile for a broken one."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        return Description.from_json(text)
    except ValueError as e:
        raise BadFile(f"{file.path.name}: {e}") from None


def describe_pack(file: TensorFile) -> Description:
    """The description of a pack, its weights unread. Raises BadFile, which says what the file is instead."""
    description = describe(file)
    if description is None and any("lora" in name for name in file):
        raise BadFile(
            f"{file.path.name}: this is a LoRA, not a pack. Put it into models/loras and use Load LoRA before "
            "or after Apply Pack: it reaches the pack too."
        )
    if description is None:
        raise BadFile(
            f"{file.path.name}: this is no pack (it has no description of itself). "
            "For a pruned UNet use Load Pruned UNet; make packs with `python -m asdm_core extract-pack`."
        )
    if description.kind != "pack":
        raise BadFile(f"{file.path.name}: this is a whole UNet, not a pack. Load it with Load Pruned UNet.")
    return description


def open_pack(source: str | os.PathLike[str] | TensorFile) -> Loaded:
    """Open a pack file. Checks names, shapes, dtypes and that every number is finite. Raises BadFile."""
    file = source if isinstance(source, TensorFile) else TensorFile(source)
    description = describe_pack(file)
    names = {_named_now(key, file.shapes): key for key in file.shapes}
    try:
        check({key: file.shapes[name] for key, name in names.items()}, description.keys(), file.path.name)
    except Mismatch as e:
        raise BadFile(f"{e}. The file does not hold what its description says; export it again.") from None
    _check_values(file, file.shapes)
    return Loaded(file.path, description, Renamed(file, names))


def _named_now(key: str, keys: Collection[str]) -> str:
    """Today's name of a tensor in a pack with these keys, which may be of an older format."""
    now = re.sub(r"\.attn1\.gain$", ".attn1.log_gain", key)
    return key if now in keys else now


def identify_unet(file: TensorFile) -> tuple[Description, Recognised]:
    """What UNet a file holds, from its header alone; `Recognised.unknown` is for the caller to judge. Raises
    BadFile.
    """
    description = describe(file)
    if description is not None and description.kind == "pack":
        raise BadFile(f"{file.path.name}: this is a pack, not a whole UNet. Use Apply Pack on a checkpoint.")
    try:
        if description is None:
            found = recognise(file.shapes)
            return Description("unet", found.architecture), found
        prefix, layout = unet_prefix(file.shapes)
        found = Recognised(
            description.architecture, prefix, layout, standalone_form(description.architecture).numbering
        )
        roots = tuple({f"{prefix}{key.split('.', 1)[0]}." for key in found.architecture.keys(layout)})
        check({k: s for k, s in file.shapes.items() if k.startswith(roots)}, found.keys(), file.path.name)
    except (Unrecognised, Mismatch) as e:
        raise BadFile(f"{file.path.name}: {str(e).removeprefix(file.path.name + ': ')}") from None
    return description, found


def open_model(path: str | os.PathLike[str], drop_unknown: bool = False) -> Loaded:
    """Open a pack or a UNet, whichever it is; of a UNet as `open_unet`. Raises BadFile."""
    if Path(path).is_dir():
        return open_unet(path, drop_unknown)
    file = open_file(path)
    description = describe(file)
    if description is not None and description.kind == "pack":
        return open_pack(file)
    return open_unet(file, drop_unknown)


def open_unet(
    source: str | os.PathLike[str] | TensorFile, drop_unknown: bool = False, prediction: str | None = None
) -> Loaded:
    """Open a UNet in any known form: ours, an LDM or diffusers single file, or a diffusers folder.

    The UNet may lie inside a whole checkpoint. drop_unknown: leave out, as ComfyUI does, tensors that belong to no
    layer. prediction: "eps" or "v" where somebody chose it; nothing that the folder says is asked for then. Raises
    BadFile, also for such tensors unless they are to be left out.
    """
    if isinstance(source, TensorFile):
        file, predicted = source, prediction
    else:
        path = Path(source)
        file = open_file(_file_in_folder(path) if path.is_dir() else path)
        predicted = prediction or _folder_prediction(path)
    description, found = identify_unet(file)
    _check_unknown(file, found, drop_unknown)
    names = {slot.unit.key(slot.tensor): key for key, slot in found.keys().items()}
    _check_values(file, names.values())
    if prediction:
        description = replace(description, prediction=prediction)
    elif description.prediction is None:
        description = replace(description, prediction=predicted or ("v" if V_MARKER in file.shapes else None))
    return Loaded(
        file.path,
        description,
        Renamed(file, names),
        _markers_of(file),
        found.unknown,
    )


def _markers_of(file: TensorFile) -> StateDict:
    found = {name: file.shapes[name] for name in MARKERS if name in file.shapes}
    for name, shape in found.items():
        if math.prod(shape) > _MAX_MARKER or name.startswith("edm_vpred.") and math.prod(shape) != 1:
            raise BadFile(
                f"{file.path.name}: {name}, which says how a UNet was trained, has shape {list(shape)}; wanted "
                + ("one number" if name.startswith("edm_vpred.") else f"at most {_MAX_MARKER} numbers")
            )
    return {name: file[name] for name in found}


def _check_unknown(file: TensorFile, found: Recognised, drop: bool) -> None:
    modules = {key.rpartition(".")[0] for key in found.keys()}
    beside = [key for key in found.unknown if key.rpartition(".")[0] in modules]
    if beside:  # without it the weights of this layer may mean something else, as they do without their scale
        raise BadFile(
            f"{file.path.name}: {printable(beside[0])} stands beside the weights of a layer, in a form "
            f"that asdm does not read "
            "(as scaled fp8). "
            "Load this file with the stock nodes, or take one in fp16, bf16 or fp32."
        )
    if found.unknown and not drop:
        raise BadFile(
            f"{file.path.name}: no layer of a {found.architecture.config.family} UNet has {some(found.unknown)}, so "
            "it would be lost. "
            "ComfyUI ignores such tensors; to leave them out, `python -m asdm_core convert` the file with "
            "--drop-unknown first."
        )


def some(names: Sequence[str]) -> str:
    """The first of many names, for people."""
    return ", ".join(map(printable, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_values(file: TensorFile, names: Iterable[str]) -> None:
    for key in names:
        dtype = file.dtypes[key]
        if dtype not in _WEIGHT_DTYPES or dtype == "I8" and key + SCALE not in file.dtypes:
            raise BadFile(
                f"{file.path.name}: tensor {key} has dtype {printable(dtype)}; wanted one of "
                f"{', '.join(sorted(_WEIGHT_DTYPES))}" + (f" (int8 weights need {key}{SCALE})" if dtype == "I8" else "")
            )
        tensor = file[key]
        # fp8 has no isfinite of its own on CPU.
        if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
            raise BadFile(
                f"{file.path.name}: tensor {key} holds numbers that are not finite (NaN or infinity). "
                "The file is damaged, or its training diverged."
            )


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


def _file_in_folder(folder: Path) -> Path:
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
            if self.path.stat().st_size > _MAX_HEADER:
                raise bad(f"this index is longer than {_MAX_HEADER} bytes")
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


def _folder_prediction(path: Path) -> str | None:
    """Prediction type from the scheduler config of a diffusers folder, where there is one."""
    if not path.is_dir():
        return None
    for folder in (path, path.parent):  # a pipeline's folder, or the unet's own
        config = folder / "scheduler" / "scheduler_config.json"
        if config.is_file():
            try:
                kind = json.loads(config.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
            except (ValueError, AttributeError, OSError):
                raise BadFile(f"{config}: cannot be read as JSON") from None
            names = {"epsilon": "eps", "v_prediction": "v"}
            if not isinstance(kind, str) or kind not in names:
                raise BadFile(f"{config}: prediction type {kind!r} is not supported; wanted one of {', '.join(names)}")
            return names[kind]
    return None


# Text encoders of the embedded family ---------------------------------------------------------------

# What the config of one must say, with the largest value that is taken: some ten times what known ones have.
_TEXT_CONFIG = {
    "hidden_size": 8192,
    "intermediate_size": 65_536,
    "num_hidden_layers": 200,
    "num_attention_heads": 200,
    "max_position_embeddings": 4096,
    "projection_dim": 8192,
    "vocab_size": 500_000,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


def _text_shapes(config: Mapping[str, Any], rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a text encoder in CLIP's layout, with so many rows in its table of tokens."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        TOKEN_TABLE: (rows, wide),
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], wide),
        "text_model.final_layer_norm.weight": (wide,),
        "text_model.final_layer_norm.bias": (wide,),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"text_model.encoder.layers.{i}"
        linears = {f"self_attn.{to}": (wide, wide) for to in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, shape in (linears | {"mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner)}).items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (wide,), f"{at}.{norm}.bias": (wide,)}
    return shapes


def open_text_encoder(path: str | os.PathLike[str]) -> tuple[dict[str, Any], StateDict]:
    """Config and weights of a text encoder of the embedded family, in CLIP's layout and with the whole table of tokens.

    Its file holds only the rows in use (`token_ids`); words that were never trained are zero vectors: they say nothing,
    instead of something random. Raises BadFile.
    """
    file = TensorFile(path)

    def bad(why: str) -> BadFile:
        return BadFile(f"{file.path.name}: this is no text encoder of the embedded family: {why}")

    if "text_config" not in file.metadata or "token_ids" not in file:
        raise bad("no text_config or no token_ids in it")
    try:
        config = read_json(file.metadata["text_config"])
    except ValueError:
        raise bad("its text_config is not valid JSON") from None
    if not isinstance(config, dict):
        raise bad("its text_config is not a JSON object")
    for name, highest in _TEXT_CONFIG.items():
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
            raise bad(f"{name} must be a whole number from 1 to {highest}, got {printable(repr(value))}")
    for name in _TOKENS:
        value = config.get(name, None if name == "eos_token_id" else 0)  # the one that ComfyUI reads
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < config["vocab_size"]:
            raise bad(f"{name} must be a token below {config['vocab_size']}, got {printable(repr(value))}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise bad(f"{config['num_attention_heads']} heads cannot share {config['hidden_size']} channels")
    epsilon = config.get("layer_norm_eps", 1e-5)
    if config.get("hidden_act") not in ("quick_gelu", "gelu") or not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise bad("hidden_act must be quick_gelu or gelu, and layer_norm_eps lie between 0 and 1")
    (rows, *rest), kind = file.shapes["token_ids"] or (0, 0), file.dtypes["token_ids"]  # a single number has no rows
    if rest or kind not in ("I32", "I64") or rows > config["vocab_size"]:
        raise bad(f"token_ids ({printable(kind)}, {list(file.shapes['token_ids'])}) must be a list of whole numbers")
    ids = file["token_ids"].long()
    wanted = _text_shapes(config, rows)
    if rows and not 0 <= int(ids.min()) <= int(ids.max()) < config["vocab_size"]:
        raise bad(f"token_ids must lie below {config['vocab_size']}, got {int(ids.min())} to {int(ids.max())}")
    found = {k: s for k, s in file.shapes.items() if k != "token_ids"}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise bad(
                f"{printable(key)} has shape {printable(found.get(key, 'none (it is missing)'))}; wanted "
                f"{wanted.get(key, 'no such tensor')}"
            )
    _check_values(file, found)
    weights = {key: file[key] for key in found}
    table = torch.zeros(config["vocab_size"], config["hidden_size"], dtype=weights[TOKEN_TABLE].dtype)
    table[ids] = weights[TOKEN_TABLE]
    return config, weights | {TOKEN_TABLE: table}


# Writing --------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike[str]) -> Path:
    """Raise ValueError where no model file can have this name: better asked before the work than after it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name}: the name must end in .safetensors")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path.name}: there is a folder of this name ({path})")
    return path


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all (a temporary file in the same folder, then a rename).

    Raises ValueError for a name that cannot be, OSError where writing fails.
    """
    path = check_output(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    try:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, metadata=dict(metadata))
        with open(
            temporary, "rb+"
        ) as f:  # on the disk before the rename is: else a power cut may leave the name and not the contents
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a model file is as public as its folder
        os.replace(temporary, path)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(e, SafetensorError):  # a full disk, told by a library that has no OSError
            raise OSError(f"{path.name}: cannot be written ({e})") from None
        raise


def write_pack(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    description: Description,
    dtype: torch.dtype | str | None = torch.float16,
) -> None:
    """Write a pack from the addressed tensors of its units.

    dtype: of the stored weights; "int8" for int8 per output channel; None leaves them as they are.
    Raises Mismatch unless the tensors are exactly what the description says.
    """
    check(shapes_of(tensors), description.keys(), "pack")
    write_file(path, stored(tensors, dtype), {"format": "pt", METADATA_KEY: description.to_json()})


def write_unet(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    description: Description,
    dtype: torch.dtype | str | None = None,
    kept: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a standalone UNet from addressed tensors, in the renumbered LDM layout where there is one.

    dtype: as in `write_pack`. kept: markers of the file they come from (`Loaded.markers`).
    """
    form = standalone_form(description.architecture)
    renamed = stored(convert(tensors, description.architecture, ADDRESSED, form), dtype) | markers(description, kept)
    write_file(path, renamed, {"format": "pt", METADATA_KEY: description.to_json()})


def markers(description: Description, kept: Mapping[str, Tensor]) -> StateDict:
    """Tensors beside a UNet's from which ComfyUI knows how it was trained: what it predicts as described, the others as
    they were.
    """
    predicts = {V_MARKER: torch.zeros(0)} if description.prediction == "v" else {}
    return predicts | {name: tensor for name, tensor in kept.items() if name != V_MARKER}


def stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> StateDict:
    """Tensors as they go into a file: as `dtype`, int8 with scales for "int8", or unchanged for None."""
    if dtype == "int8":
        return quantised(tensors)
    return {k: t if dtype is None else t.to(dtype) for k, t in tensors.items()}
