"""Command line: look into files, convert them, make packs and combined UNets.

python -m asdm_core inspect FILE            what is in this file?
python -m asdm_core convert IN OUT ...      rename between the LDM and diffusers layouts
python -m asdm_core match STUDENT ORIGINAL  which layers of the original has a pruned UNet kept?
python -m asdm_core extract-pack IN ...     take some units of a trained UNet out into a pack
python -m asdm_core to-difference PACK ...  a pack as differences from the teacher it was trained from
python -m asdm_core to-absolute PACK ...    a pack of differences as the units it plays in a checkpoint
python -m asdm_core mean-pack PACK ... OUT  the mean of several packs of one training
python -m asdm_core assemble CKPT PACK OUT  a checkpoint's UNet with a pack built in
python -m asdm_core lora FILE --onto PRESET which modules of a LoRA act on a pruned UNet?
python -m asdm_core shrink-lora FILE ...    a LoRA, or the mean of several, in fewer numbers
python -m asdm_core presets                 the pruned UNets asdm knows
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import condconv, differences, few_step, lora, lora_size, match, packs, surgery, tensor_file
from .addresses import LAYOUTS, in_order, select
from .architecture import NUMBERINGS, PRESETS, Architecture
from .measure import costs, total
from .packs import Description
from .tensor_file import BadFile, TensorFile
from .recognise import Unrecognised, recognise
from .text import MESSAGE, TEXT, printable

DTYPES: dict[str, torch.dtype | str | None] = {"keep": None, **tensor_file.DTYPES, "int8": "int8"}
# What stock ComfyUI reads: our int8 it would take for the weights themselves.
STOCK_DTYPES = [name for name in DTYPES if name != "int8"]
LATENT = {"sdxl": 128, "emoji": 16}  # side of the latent that MACs are given for; 64 (512 x 512 pixels) elsewhere


class _Progress(Mapping[str, Tensor]):
    """A state dict that tells on stderr how far the one pass over it has come."""

    def __init__(self, tensors: Mapping[str, Tensor], what: str):
        self.tensors, self.what, self.seen = tensors, what, 0
        self.shapes = surgery.shapes_of(tensors)

    def __getitem__(self, key: str) -> Tensor:
        self.seen += 1
        if sys.stderr.isatty() or self.seen == len(self):
            print(
                f"\r{self.what}: {self.seen} of {len(self)} tensors",
                end="\n" if self.seen == len(self) else "",
                file=sys.stderr,
            )
        return self.tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def facts(architecture: Architecture) -> dict[str, Any]:
    """Numbers of an architecture, as `inspect` and `presets` give them."""
    side = LATENT.get(architecture.config.family, 64)
    full = Architecture.full(architecture.config)
    cost = costs(architecture, side, side)
    work, whole = total(cost), total(costs(full, side, side))
    largest = sorted(cost.values(), key=lambda c: -c.total)[:5]
    return {
        "family": architecture.config.family,
        "architecture": architecture.name or "custom",
        "params": work.params,
        "unpruned_params": whole.params,
        "macs": work.total,
        "unpruned_macs": whole.total,
        "latent": side,
        "cut": list(in_order(architecture.config, architecture.cut)),
        "largest": {c.address: round(c.total / work.total, 4) for c in largest},
    }


def _say_that_it_takes_time(path: str) -> None:
    """A word to a person who waits: every number of a file is checked, gigabytes at times."""
    if sys.stderr.isatty():
        print(f"reading {Path(path).name} ...", file=sys.stderr)


def _open_unet(path: str, drop_unknown: bool = False) -> packs.Loaded:
    _say_that_it_takes_time(path)
    return packs.open_unet(path, drop_unknown)


def inspect(args: argparse.Namespace) -> None:
    path = Path(args.file)
    _say_that_it_takes_time(args.file)
    loaded = packs.open_model(path, drop_unknown=True)
    description = loaded.description
    result = {
        "file": str(loaded.path),
        "kind": description.kind,
        **facts(description.architecture),
        "prediction": description.prediction,
        "licence": description.licence,
        "unknown": list(loaded.unknown),
    }
    if description.kind == "pack":
        result["units"] = list(description.units)
        result["experts"] = dict(description.condconv.experts) if description.condconv else {}
        result["log_gains"] = list(description.log_gain_units)
        for role in ("difference_of", "made_for"):
            checkpoint = getattr(description, role)
            result[role] = checkpoint and checkpoint.name
        result["carry"] = sorted({c for _, c in description.carry.pairs}) if description.carry else []
        result["pack_params"] = sum(s.tensor.numel for s in description.keys().values())
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{path.name}: {_headline(result)}")
    if description.kind == "pack":
        plays = ", ".join(description.units) or "no unit of its own"
        print(f"  a pack of {result['pack_params'] / 1e6:.2f} M parameters; it plays: {plays}")
        if result["difference_of"]:
            print(
                f"  its units are differences from {printable(result['difference_of'])}, added to the checkpoint's own"
            )
        if result["carry"]:
            print(f"  they take over what a finetune has changed in {len(result['carry'])} units")
        if result["made_for"]:
            print(f"  made for {printable(result['made_for'])}")
        if result["experts"]:
            print(
                "  experts per convolution: "
                + ", ".join(f"{conv} {count}" for conv, count in result["experts"].items())
            )
        if result["log_gains"]:
            print("  log gains for GRI attention: " + ", ".join(result["log_gains"]))
    _print_numbers(result)
    if description.prediction:
        print(f"  predicts: {description.prediction}")
    if description.licence:
        print(f"  licence: {printable(description.licence, TEXT)}")
    if loaded.unknown:
        print(f"  unknown, which ComfyUI ignores: {tensor_file.some(loaded.unknown)}")


def _headline(f: dict[str, Any]) -> str:
    return f"{f['family']} UNet, {'unpruned' if f['architecture'] == 'full' else f['architecture']}"


def _print_numbers(f: dict[str, Any]) -> None:
    print(
        f"  {f['params'] / 1e6:.2f} M parameters ({f['params'] / f['unpruned_params'] - 1:+.1%}), "
        f"{f['macs'] / 1e9:.1f} G MACs at a {f['latent']} x {f['latent']} latent "
        f"({f['macs'] / f['unpruned_macs'] - 1:+.1%})"
    )
    print("  largest shares of the work: " + ", ".join(f"{a} {share:.1%}" for a, share in f["largest"].items()))
    print("  cut: " + (", ".join(f["cut"]) or "nothing"))


def convert(args: argparse.Namespace) -> None:
    loaded = _open_unet(args.input, args.drop_unknown)
    if args.keep:
        loaded = _readdressed(loaded, loaded.description.architecture.keeping(args.keep))
    architecture = loaded.description.architecture
    form = surgery.Form(args.layout, args.numbering or packs.standalone_form(architecture).numbering)
    if args.keep and form != packs.standalone_form(architecture):
        raise ValueError(
            "--keep is written into a file's description, which only the ldm layout has; give --layout ldm and no "
            "--numbering"
        )
    tensors = _Progress(loaded.tensors, "convert")
    dtype = DTYPES[args.dtype]
    if form == packs.standalone_form(architecture):
        packs.write_unet(args.output, tensors, loaded.description, dtype, loaded.markers)
    else:
        _check_recognised(args.input, architecture, form)
        renamed = tensor_file.stored(surgery.convert(tensors, architecture, surgery.ADDRESSED, form), dtype)
        tensor_file.write_file(
            args.output, renamed | packs.markers(loaded.description, loaded.markers), {"format": "pt"}
        )
    print(
        f"wrote {args.output}: {len(tensors)} tensors, {form.layout} layout, {form.numbering}"
        + (f", without {tensor_file.some(loaded.unknown)}" if loaded.unknown else "")
    )


def _check_recognised(name: str, architecture: Architecture, form: surgery.Form) -> None:
    """Raises ValueError where names and shapes alone, without a description, would be taken for another network."""
    with contextlib.suppress(Unrecognised):
        shapes = {key: slot.shape for key, slot in architecture.keys(form.layout, form.numbering).items()}
        found = recognise(shapes, [architecture.config]).architecture
        if found.cut != architecture.cut:
            raise ValueError(
                f"{Path(name).name} keeps other layers than its names tell in this form; only its description does, "
                "which only the ldm "
                "layout has. Give --layout ldm and no --numbering"
            )


def _readdressed(loaded: packs.Loaded, architecture: Architecture) -> packs.Loaded:
    """A student that keeps other layers of the original than its file or the convention says."""
    names = surgery.readdressed(loaded.description.architecture, architecture)
    description = dataclasses.replace(loaded.description, architecture=architecture)
    return dataclasses.replace(loaded, tensors=tensor_file.Renamed(loaded.tensors, names), description=description)


def match_original(args: argparse.Namespace) -> None:
    student, original = _open_unet(args.student), _open_unet(args.original)
    ours, whole = (loaded.description.architecture for loaded in (student, original))
    if ours.config != whole.config:
        raise ValueError(
            f"{student.path.name} is a {ours.config.family} UNet and {original.path.name} a {whole.config.family} one; "
            "give the original that the student was pruned from"
        )
    if whole.cut:
        raise ValueError(
            f"{original.path.name} is pruned itself ({whole.name or 'a choice of its own'}); give the unpruned original"
        )
    found = match.match(student.tensors, ours, original.tensors, _telling("compare"))
    if args.json:
        print(
            json.dumps(
                {
                    "file": args.student,
                    "original": args.original,
                    "architecture": found.architecture.to_dict(),
                    "pairs": [dataclasses.asdict(pair) for pair in found.pairs],
                },
                indent=1,
            )
        )
    else:
        print(f"{student.path.name}: {_headline(facts(found.architecture))}")
        for pair in found.pairs:
            near = "" if pair.next is None else f", next nearest {pair.next:.3f}"
            note = "; resembles none, placed by its order" if pair.distance >= match.UNRELATED else ""
            print(f"  {pair.student:25} is {pair.original:25} distance {pair.distance:.3f}{near}{note}")
        print("  cut: " + (", ".join(in_order(ours.config, found.architecture.cut)) or "nothing"))
    if args.output:
        result = _readdressed(student, found.architecture)
        packs.write_unet(args.output, result.tensors, result.description, None, student.markers)
        print(
            f"wrote {args.output}: the same weights, which now say where they belong",
            file=sys.stderr if args.json else sys.stdout,
        )


def _telling(what: str) -> Callable[[str], None]:
    """Tells a person who waits how far a search has come."""

    def tell(place: str) -> None:
        if sys.stderr.isatty():
            print(f"{what}: {place}", file=sys.stderr)

    return tell


def extract_pack(args: argparse.Namespace) -> None:
    if args.experts_only:
        return extract_experts(args)
    loaded = _open_unet(args.student)
    architecture = loaded.description.architecture
    blocks = select(architecture.config, args.units)
    kept = {u.address for u in architecture.kept}
    units = tuple(a for a in blocks if a in kept)
    # What is cut outside the chosen units is the checkpoint's again.
    chosen = Architecture(architecture.config, architecture.cut_in(blocks), units).named()
    tensors = surgery.extract(loaded.tensors, architecture, units)
    training = {"extracted_from": Path(args.student).name}
    experts, further, theirs = _gathered(args, loaded, units) if args.experts_from else (None, {}, "")
    tensors |= further
    its = loaded.description.prediction
    licence = args.licence or packs.licence_of(loaded.description.licence, theirs)
    description = Description("pack", chosen, units, its, licence, training, condconv=experts)
    packs.write_pack(args.output, _Progress(tensors, "extract"), description, DTYPES[args.dtype])
    print(
        f"wrote {args.output}: {len(units)} units, {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters"
        + (f" ({chosen.name})" if chosen.name else "")
    )
    if any(a.startswith("stem.") for a in units):
        print(
            "it has units of the stem, which `assemble` can build into a file but Apply Pack cannot play; "
            "leave them out with --units '..., !stem'"
        )


def extract_experts(args: argparse.Namespace) -> None:
    """A pack of nothing but experts: of a pack that has some, or gathered from a teacher."""
    path = Path(args.student)
    file = TensorFile(path) if path.is_file() else None
    description = None if file is None else packs.describe(file)
    if args.experts_from:
        loaded = _open_unet(args.student)
        config = loaded.description.architecture.config
        experts, tensors, licence = _gathered(args, loaded, select(config, args.units))
    elif file is not None and description is not None and description.condconv:
        loaded = packs.open_pack(file)
        config = description.architecture.config
        units = set(select(config, args.units))
        every = description.condconv
        mine = {a: count for a, count in every.experts.items() if condconv.convolution(config, a).unit.address in units}
        if not mine:
            raise ValueError(
                f"{path.name} has no experts in {args.units!r}; it has them in {', '.join(description.expert_units)}"
            )
        experts = condconv.CondConv(mine, every.form)
        tensors = {key: loaded.tensors[key] for key in experts.keys(config)}
        licence = description.licence
    else:
        raise ValueError(
            f"{path.name} has no further experts; give a pack that has some, or gather them with --experts-from"
        )
    result = Description(
        "pack",
        Architecture.full(config),
        licence=args.licence or licence,
        training={"extracted_from": path.name},
        condconv=experts,
    )
    packs.write_pack(args.output, _Progress(tensors, "extract"), result, DTYPES[args.dtype])
    print(
        f"wrote {args.output}: experts for {len(experts.experts)} convolutions, "
        f"{sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters"
    )


def _gathered(
    args: argparse.Namespace, student: packs.Loaded, units: Iterable[str]
) -> tuple[condconv.CondConv, dict[str, Tensor], str]:
    """Experts for the 3x3 convolutions of units that the student keeps, from the other layers of a teacher's blocks
    (CLME), and the teacher's licence.
    """
    teacher = _open_unet(args.experts_from)
    config = student.description.architecture.config
    whole = teacher.description.architecture
    if whole.config != config or whole.cut:
        raise ValueError(
            f"{teacher.path.name} is {_headline(facts(whole))}; experts come from an unpruned {config.family} UNet"
        )
    kept = {u.address for u in student.description.architecture.kept}.intersection(units)
    convs = [a for a, conv in condconv.convolutions(config).items() if conv.unit.address in kept]
    experts, tensors, alone = condconv.clme(teacher.tensors, student.tensors, config, convs)
    for reason in alone.values():
        print(f"without further experts: {reason}")
    return experts, tensors, teacher.description.licence


def to_difference(args: argparse.Namespace) -> None:
    teacher = _open_unet(args.teacher)
    pack = packs.open_pack(args.pack)
    _check_same(teacher, pack)
    description, tensors = differences.to_difference(pack, teacher.tensors, teacher.path.name)
    packs.write_pack(args.output, _Progress(tensors, "subtract"), description, DTYPES[args.dtype])
    print(f"wrote {args.output}: {len(description.units)} units as differences from {teacher.path.name}")


def to_absolute(args: argparse.Namespace) -> None:
    checkpoint = _open_unet(args.checkpoint)
    pack = packs.open_pack(args.pack)
    _check_same(checkpoint, pack)
    description, tensors = differences.to_absolute(pack, checkpoint.tensors, checkpoint.path.name)
    licence = packs.licence_of(checkpoint.description.licence, description.licence)
    description = dataclasses.replace(description, licence=licence)
    packs.write_pack(args.output, _Progress(tensors, "add"), description, DTYPES[args.dtype])
    print(f"wrote {args.output}: {len(description.units)} units as they play in {checkpoint.path.name}")


def _check_new(path: str) -> None:
    """Raise ValueError where a file is there: of a list of files the last would be taken for the output, were it left
    out.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already, and comes last: give the name of a new file after those to read")


def mean_packs(args: argparse.Namespace) -> None:
    _check_new(args.output)
    first, *others = [packs.open_pack(path) for path in args.files]
    if not others:
        raise ValueError("a mean needs two packs or more, such as checkpoints of one training")

    if first.description.carry:
        raise ValueError(
            f"{first.path.name} carries over what a checkpoint has in other units, by products of matrices, whose mean "
            "is not that of the matrices; take the mean of packs without"
        )

    def kind(loaded: packs.Loaded) -> packs.Description:
        """All that it says but how it came to be."""
        few = loaded.description.training.get(few_step.KEY)
        return dataclasses.replace(loaded.description, training={few_step.KEY: few})

    for other in others:
        if kind(other) != kind(first) or other.tensors.keys() != first.tensors.keys():
            raise ValueError(
                f"{other.path.name} is another kind of pack than {first.path.name}: a mean is of packs that play the "
                "same units, made in the same way for the same checkpoint"
            )

    def mean(key: str) -> Tensor:
        return torch.stack([loaded.tensors[key].float() for loaded in (first, *others)]).mean(0)

    training = {**first.description.training, "mean_of": [loaded.path.name for loaded in (first, *others)]}
    tensors = _Progress({key: mean(key) for key in first.tensors}, "mean")
    description = dataclasses.replace(first.description, training=training)
    packs.write_pack(args.output, tensors, description, DTYPES[args.dtype])
    print(f"wrote {args.output}: the mean of {len(args.files)} packs of {len(first.description.units)} units")


def _check_same(unet: packs.Loaded, pack: packs.Loaded) -> None:
    """Raise ValueError where a pack is for UNets of another family than this one's."""
    ours, theirs = unet.description.architecture.config, pack.description.architecture.config
    if ours != theirs:
        raise ValueError(f"{pack.path.name} is a pack for {theirs.family} UNets; {unet.path.name} is {ours.family}")


def assemble(args: argparse.Namespace) -> None:
    trunk = _open_unet(args.checkpoint)
    pack = packs.open_pack(args.pack)
    if pack.description.condconv or pack.description.gri:
        raise ValueError(
            f"{Path(args.pack).name} has "
            f"{'convolutions with several experts' if pack.description.condconv else 'log gains for GRI attention'}, "
            "which no single UNet file can hold; use Apply Pack"
        )
    _check_same(trunk, pack)
    pack = differences.played_in(pack, trunk.tensors, trunk.path.name)
    target = pack.description.architecture
    ours = trunk.description.architecture.config
    units = pack.description.units
    its = trunk.description.architecture
    combined = Architecture(ours, target.cut | its.cut - its.cut_in(units))
    combined = dataclasses.replace(combined, own=tuple(u.address for u in combined.kept)).named()
    tensors = surgery.combine(trunk.tensors, pack.tensors, combined, units)
    training = {"trunk": Path(args.checkpoint).name, "pack": Path(args.pack).name}
    description = Description(
        "unet",
        combined,
        prediction=trunk.description.prediction or pack.description.prediction,
        licence=packs.licence_of(trunk.description.licence, pack.description.licence),
        training=training,
    )
    packs.write_unet(args.output, _Progress(tensors, "assemble"), description, DTYPES[args.dtype], trunk.markers)
    print(f"wrote {args.output}: {_headline(facts(combined))}, {combined.params / 1e6:.2f} M parameters")


def lora_onto(args: argparse.Namespace) -> None:
    name = Path(args.file).name
    reading = None if args.names == "auto" else args.names
    result = lora.report(TensorFile(args.file).shapes, Architecture.preset(args.onto), reading)
    lost = sum(map(len, result.dropped.values()))
    if args.json:
        print(json.dumps({"file": args.file, "onto": args.onto, **dataclasses.asdict(result)}, indent=1))
        return
    total_modules = len(result.kept) + lost
    print(
        f"{name} onto {args.onto}: {len(result.kept)} of {total_modules} modules act, each at its own address; "
        f"{lost} are dropped"
    )
    whose = "the original, unpruned UNet" if result.reading == lora.ORIGINAL else f"{args.onto} itself"
    sure = "" if result.told or reading else "; neither names nor shapes tell, so say it with --names"
    print(f"  it names the layers of {whose}{sure}")
    print("  modules of the UNet: " + ", ".join(f"{count} {kind}" for kind, count in result.kinds.items()))
    for address, modules in result.dropped.items():
        print(f"  {address} is cut: {len(modules)} dropped")
    if result.text:
        print(f"  {result.text} modules are for text encoders, which pruning does not touch")
    if result.peft:
        print(
            f"  {len(result.peft)} are named as PEFT does, as {printable(result.peft[0])}: these act on a MODEL of "
            "Load Pruned UNet; elsewhere ComfyUI's Load LoRA does not read them"
        )
    if result.misfits:
        print(
            f"  {len(result.misfits)} have another shape than the layer they name, as {printable(result.misfits[0])}: "
            "ComfyUI cannot add them"
        )
    if result.unknown:
        print(
            f"  {len(result.unknown)} names belong to no layer of this family, as {printable(result.unknown[0])}; "
            "many of them mean that the LoRA was made for another family"
        )


def shrink_lora(args: argparse.Namespace) -> None:
    _check_new(args.output)
    if not 0 < args.mb < math.inf:
        raise ValueError(f"--mb: wanted a finite number above 0, got {args.mb:g}")
    file, *others = [TensorFile(path) for path in args.files]
    for one in (file, *others):
        tensor_file.check_values(one, one)
    tensors = {key: file[key] for key in file}
    width = max((t.element_size() for t in tensors.values()), default=2)
    if others:
        tensors = lora_size.mean([tensors, *({key: other[key] for key in other} for other in others)])
    found, kept = lora_size.shrink(tensors, int(args.mb * 2**20 / width))
    ranks = [len(t) for key, t in found.items() if key.endswith(lora_size.DOWN)]
    if not ranks:
        raise ValueError(f"{args.mb:g} MB hold no layer of this LoRA; give it more")
    rank = {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(max(ranks))}
    tensor_file.write_file(args.output, found, {**file.metadata, **rank})
    print(f"wrote {args.output}: {len(ranks)} layers of rank {min(ranks)} to {max(ranks)}, {kept:.2%} of the change")


def presets(args: argparse.Namespace) -> None:
    rows = {}
    for name, row in PRESETS.items():
        f = facts(Architecture.preset(name))
        rows[name] = {"source": row.source, **{k: f[k] for k in ("family", "params", "macs", "latent", "cut")}}
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for name, told in rows.items():
        print(
            f"{name:12}{told['family']:6}{told['params'] / 1e6:9.2f} M params {told['macs'] / 1e9:9.2f} G MACs  "
            f"{told['source']}"
        )
        print(f"{'':12}cut: {PRESETS[name].cut}" + (f"   in: {PRESETS[name].on}" if PRESETS[name].on != "*" else ""))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m asdm_core", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help, description=help)
        p.set_defaults(run=function)
        return p

    p = command(
        "inspect",
        inspect,
        "Say what a file is: family, preset or the list of cut units, parameters, MACs, the units "
        "with the largest share; for packs, what they play. FILE is a UNet, a checkpoint, a pack or a diffusers "
        "folder.",
    )
    p.add_argument("file", metavar="FILE")
    p.add_argument("--json", action="store_true", help="print everything as JSON")

    p = command("convert", convert, "Rename the tensors of a UNet from whatever form it has into another one.")
    p.add_argument("input", metavar="IN")
    p.add_argument("output", metavar="OUT", help="a new .safetensors file")
    p.add_argument("--layout", choices=LAYOUTS, required=True, help="ldm is ComfyUI's own; diffusers is the library's")
    p.add_argument(
        "--numbering",
        choices=NUMBERINGS,
        help="renumbered (default where it exists): the small network others load; "
        "addressed: the unpruned network's names, with holes",
    )
    p.add_argument("--dtype", choices=STOCK_DTYPES, default="keep")
    p.add_argument(
        "--drop-unknown",
        action="store_true",
        help="leave out tensors that belong to no layer of the UNet, which ComfyUI ignores "
        "(as time_embedding.cond_proj of LCM checkpoints); without it they are an error",
    )
    p.add_argument(
        "--keep",
        metavar="BLOCKS",
        help="which transformer blocks of the original these are, where it is known and the file "
        "does not say: as 'down.2.*.transformer.0|3|6|9'. Without it, the first ones. `match` finds them by their "
        "weights",
    )

    p = command(
        "match",
        match_original,
        "Find which layers and transformer blocks of the original a pruned UNet has kept (SSD-1B, Vega, "
        "KOALA and the like), by nearest weights. LoRAs made for the original then act on the right ones.",
    )
    p.add_argument("student", metavar="STUDENT")
    p.add_argument(
        "original",
        metavar="ORIGINAL",
        help="the checkpoint the student was pruned from, or a finetune of the same base model",
    )
    p.add_argument(
        "output",
        metavar="OUT",
        nargs="?",
        help="a new .safetensors file of the student that says where its layers belong",
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON")

    p = command(
        "extract-pack",
        extract_pack,
        "Take some units of a trained UNet out into a pack, which then plays in any checkpoint "
        "of the family. Layers that were cut among these units are cut by the pack.",
    )
    p.add_argument("student", metavar="STUDENT")
    p.add_argument("output", metavar="OUT")
    p.add_argument("--units", required=True, help="a range expression, as 'down.0-1, up.2-3' (the units of M2)")
    p.add_argument(
        "--experts-from",
        metavar="TEACHER",
        help="give their 3x3 convolutions further experts (CondConv), gathered from the other "
        "layers of the same block of this unpruned UNet (CLME); those that have no layer of their shape there are "
        "named",
    )
    p.add_argument(
        "--experts-only",
        action="store_true",
        help="a pack of experts that join whatever plays these units. STUDENT is a "
        "pack with experts, as training makes them, or with --experts-from any UNet",
    )
    p.add_argument("--licence", default="", help="licence of the weights, kept in the file")
    p.add_argument("--dtype", choices=DTYPES, default="fp16")

    p = command(
        "to-difference",
        to_difference,
        "Turn a pack into differences from the teacher it was trained from. They are added to the weights of the "
        "checkpoint that the pack plays in, and keep its style.",
    )
    p.add_argument("pack", metavar="PACK")
    p.add_argument("teacher", metavar="TEACHER", help="the checkpoint whose units the pack's began as")
    p.add_argument("output", metavar="OUT")
    p.add_argument("--dtype", choices=DTYPES, default="fp16")

    p = command(
        "to-absolute",
        to_absolute,
        "Turn a pack of differences into the units that it plays in a checkpoint; with its teacher, the inverse of "
        "to-difference.",
    )
    p.add_argument("pack", metavar="PACK")
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("output", metavar="OUT")
    p.add_argument("--dtype", choices=DTYPES, default="fp16")

    p = command(
        "mean-pack",
        mean_packs,
        "Write the mean of several packs, such as the ends of two stretches of one training: often better than each.",
    )
    p.add_argument("files", metavar="PACK", nargs="+")
    p.add_argument("output", metavar="OUT")
    p.add_argument("--dtype", choices=DTYPES, default="fp16")

    p = command("assemble", assemble, "Build a pack into a checkpoint's UNet: one file that stock ComfyUI loads.")
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("pack", metavar="PACK")
    p.add_argument("output", metavar="OUT")
    p.add_argument("--dtype", choices=STOCK_DTYPES, default="fp16")

    p = command(
        "lora",
        lora_onto,
        "Say which modules of a LoRA (kohya, diffusers, LyCORIS) act on a pruned UNet and which are "
        "dropped because their unit is cut. Only names and shapes are read.",
    )
    p.add_argument("file", metavar="FILE")
    p.add_argument("--onto", metavar="PRESET", choices=PRESETS, required=True, help=f"one of {', '.join(PRESETS)}")
    p.add_argument(
        "--names",
        choices=["auto", *lora.READINGS],
        default="auto",
        help="whose layers the file names: those of the original UNet, or the pruned UNet's own, on which it was "
        "trained; "
        "auto tells by names and shapes where they do",
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON")

    p = command(
        "shrink-lora",
        shrink_lora,
        "Write a LoRA in fewer numbers: each layer keeps the singular values of its change that tell most for what "
        "they cost. Of several files, such as checkpoints of one training, the mean of their changes is taken, "
        "which is often better than each. The file stays one that every Load LoRA reads.",
    )
    p.add_argument("files", metavar="FILE", nargs="+")
    p.add_argument("output", metavar="OUT")
    p.add_argument("--mb", type=float, required=True, help="how large it may be, in MB of numbers")

    p = command("presets", presets, "List the pruned UNets asdm knows: source, family, parameters, MACs, cut units.")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may have letters that the console has not
            stream.reconfigure(errors="backslashreplace")
    try:
        if getattr(args, "output", None):
            tensor_file.check_output(args.output)
        args.run(args)
    except (BadFile, ValueError, OSError) as e:
        print(f"asdm: {printable(e, 2 * MESSAGE)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # what shells give a program that Ctrl-C stopped
