"""Safetensors files: their headers checked before anything is read, their tensors read when they are asked for.

Only safetensors are read. Opening a file reads its header; a tensor is mapped from disk when it is asked for. All is
checked before anything is handed out, and an error names the file, the tensor, what was wanted and what came. Files are
written whole or not at all.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .surgery import StateDict, shapes_of
from .text import MESSAGE, printable, read_json

# Dtypes of weights by the names people know. A stored file can also be "int8", see `quantise`.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
)
SCALE = ".scale"  # int8 weights have their per-output-channel scale under <key>.scale


# Bounds for what a header may claim, each some ten times what any known file has: a checkpoint of 2,600 tensors has a
# header of 0.3 MB. They keep a crafted file from taking time and memory.
MAX_HEADER, _MAX_TENSORS, _MAX_RANK, _MAX_SIDE, _MAX_NUMBERS = 16_000_000, 65_536, 8, 2**31, 2**40
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
    if MAX_HEADER < length <= size - 8:
        raise bad(f"its header is {length} bytes long; wanted at most {MAX_HEADER}")
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
                data += f.read(min(struct.unpack("<Q", data[:8])[0], MAX_HEADER, size))
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


# What lies in them --------------------------------------------------------------------------------


def some(names: Sequence[str]) -> str:
    """The first of many names, for people."""
    return ", ".join(map(printable, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are finite. fp8 has no isfinite of its own on a CPU."""
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


def check_values(file: TensorFile, names: Iterable[str]) -> None:
    for key in names:
        dtype = file.dtypes[key]
        if dtype not in _WEIGHT_DTYPES or dtype == "I8" and key + SCALE not in file.dtypes:
            raise BadFile(
                f"{file.path.name}: tensor {key} has dtype {printable(dtype)}; wanted one of "
                f"{', '.join(sorted(_WEIGHT_DTYPES))}" + (f" (int8 weights need {key}{SCALE})" if dtype == "I8" else "")
            )
        if not is_finite(file[key]):
            raise BadFile(
                f"{file.path.name}: tensor {key} holds numbers that are not finite (NaN or infinity). "
                "The file is damaged, or its training diverged."
            )


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


def stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> StateDict:
    """Tensors as they go into a file: as `dtype`, int8 with scales for "int8", or unchanged for None.

    Raises ValueError where a number is not finite, or would not be any more: a file with such numbers is refused by
    whoever reads it.
    """

    def finite(key: str, tensor: Tensor, result: Tensor) -> Tensor:
        if is_finite(result):
            return result
        if is_finite(tensor):
            raise ValueError(
                f"{key} is too large for {str(dtype).removeprefix('torch.')}, so nothing was written; store it "
                "as bf16 or fp32"
            )
        raise ValueError(f"{key} holds numbers that are not finite (NaN or infinity), so nothing was written")

    if dtype == "int8":
        return quantised({k: finite(k, t, t) for k, t in tensors.items()})
    return {k: finite(k, t, t if dtype is None else t.to(dtype)) for k, t in tensors.items()}


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> StateDict:
    """Tensors as they are read again, float32, once they have been stored."""
    held = stored(tensors, dtype)
    return {k: dequantise(held[k], held[k + SCALE]) if k + SCALE in held else held[k].float() for k in tensors}


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
