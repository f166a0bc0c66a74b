"""Packs and pruned UNets on disk.

A pack is a safetensors file with only what differs from a checkpoint, under addressed LDM names,
and a description as JSON in the metadata (key "asdm"). A standalone pruned UNet is written in the
renumbered LDM layout, which stock ComfyUI loads, with the same description beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .addresses import Slot, in_order
from .architecture import Architecture
from .carry import Carry
from .condconv import CondConv, Conv
from .diffusers_folder import file_in_folder, folder_prediction, open_file
from .gri import LogGains
from .identity import Checkpoint
from .recognise import Recognised, Unrecognised, recognise, unet_prefix
from .surgery import ADDRESSED, Form, Mismatch, StateDict, check, convert, shapes_of
from .tensor_file import BadFile, Renamed, TensorFile, check_values, some, stored, write_file
from .text import printable, read_json

METADATA_KEY = "asdm"
# 1 had "gains" where log gains are meant: keys `attn1.gain`, read as `attn1.log_gain`. 3 has packs of differences,
# which an older version would play as weights, and 4 such that carry something over. Each is written as the lowest that
# holds it.
FORMAT, FORMAT_OF_DIFFERENCES, FORMAT_WITHOUT_DIFFERENCES = 4, 3, 2
KINDS = ("pack", "unet")
PREDICTIONS = ("eps", "v")
# Empty tensors by which other programs tell v-prediction (for SDXL, the only way they have) and a schedule that ends in
# noise.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
MARKERS = (V_MARKER, ZERO_SNR_MARKER, "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
MAX_MARKER = 16  # numbers in a tensor that only says how a UNet was trained


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
    carry: what its differences take over from other units of the checkpoint.
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
    carry: Carry | None = None

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
        if self.carry and not self.difference_of:
            raise ValueError("carry: only differences carry over what a checkpoint has elsewhere")
        if self.carry and not {u for u, _ in self.carry.pairs}.issubset(units):
            raise ValueError("carry: only units that a pack plays can take over anything")
        if self.carry:
            self.carry.links(self.architecture)  # raises where it cannot be
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

    @property
    def carry_keys(self) -> dict[str, Slot]:
        """Tensor names of the matrices by which units take over what is changed in others, and their slots."""
        return self.carry.keys(self.architecture) if self.carry else {}

    def keys(self) -> dict[str, Slot]:
        """Tensor names of the file and their slots: addressed for a pack, else the standalone form."""
        if self.kind == "pack":
            return self.unit_keys | self.expert_keys | self.log_gain_keys | self.carry_keys
        return self.architecture.keys(*standalone_form(self.architecture))

    def to_json(self) -> str:
        plain = FORMAT_OF_DIFFERENCES if self.difference_of else FORMAT_WITHOUT_DIFFERENCES
        data = {
            "format": FORMAT if self.carry else plain,
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
            "carry": self.carry and self.carry.to_dict(),
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
            carry=None if data.get("carry") is None else Carry.from_dict(data["carry"]),
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
            "For a pruned UNet use Load Pruned UNet; make packs with `python card.py core extract-pack` in asdm's "
            "folder."
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
    check_values(file, file.shapes)
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
        file = open_file(file_in_folder(path) if path.is_dir() else path)
        predicted = prediction or folder_prediction(path)
    description, found = identify_unet(file)
    _check_unknown(file, found, drop_unknown)
    names = {slot.unit.key(slot.tensor): key for key, slot in found.keys().items()}
    check_values(file, names.values())
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
        if math.prod(shape) > MAX_MARKER or name.startswith("edm_vpred.") and math.prod(shape) != 1:
            raise BadFile(
                f"{file.path.name}: {name}, which says how a UNet was trained, has shape {list(shape)}; wanted "
                + ("one number" if name.startswith("edm_vpred.") else f"at most {MAX_MARKER} numbers")
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
            "it would be lost. ComfyUI ignores such tensors; to leave them out, in asdm's folder `python card.py core "
            "convert` the file with --drop-unknown first."
        )


# Writing --------------------------------------------------------------------------------------------


def licence_of(*its: str) -> str:
    """The licence of weights that come from several files, which is all of theirs (SPDX: `AND`); empty: none says."""
    return " AND ".join(dict.fromkeys(filter(None, its)))


def write_pack(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    description: Description,
    dtype: torch.dtype | str | None = torch.float16,
) -> None:
    """Write a pack from the addressed tensors of its units.

    dtype: of the stored weights; "int8" for int8 per output channel; None leaves them as they are. Matrices of a carry
    are in `carried_dtype(dtype)`. Raises Mismatch unless the tensors are exactly what the description says.
    """
    check(shapes_of(tensors), description.keys(), "pack")
    carried = {key: key for key in description.carry_keys}
    others = {key: key for key in tensors if key not in carried}
    held = stored(Renamed(tensors, others), dtype) | stored(Renamed(tensors, carried), carried_dtype(dtype))
    write_file(path, held, {"format": "pt", METADATA_KEY: description.to_json()})


def carried_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """How matrices of a carry are stored in a pack of this dtype: as int8 in all but the exact ones. What rounding does
    to them is in its differences (`tensor_file.rounded`).
    """
    return dtype if dtype in (None, torch.float32) else "int8"


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
