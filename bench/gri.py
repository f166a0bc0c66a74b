"""GRI attention against full attention, HyperTile and Token Merging: time, error, pictures, a whole UNet.

    python bootstrap.py bench NAME=gri [ARGS="--parts calls activations --rounds 3"]

calls: the shallow self-attention of SD1.5, 8 heads of 40, batch 2 (classifier-free guidance), on 64 x 64 and 128 x 128
tokens (512 and 1024 pixels), with the host's attention function. The maps are random but smooth: noise at an eighth of
the resolution, interpolated, with finer noise on it.

activations: queries, keys and values that networks make. The emoji teacher's, in image-to-image runs on maps larger
than it was trained for: sheets of many emoji, and one emoji enlarged; every self-attention of its first level. And
those of a network of one level of SD1.5's width with random weights. With gains: fitted on other pictures.

Errors are relative (L2), against full attention. HyperTile and Token Merging are measured as published, with keys and
values tiled or merged as well, and as the host's own nodes do it ("node": HyperTile's queries of a tile see a stripe of
rows, Token Merging leaves the keys whole). The time of Token Merging includes its matching. error_... in the summary is
the mean over the emoji activations at 64 x 64, at equal time: of GRI in its automatic settings, and of the others at
the time that GRI takes there, read off the line through those of their settings that no other one beats in both time
and error, on logarithmic axes. Where none is as quick it is that of the quickest. error_..._random is the same for
random weights, error_..._1024 for the smooth maps of 128 x 128.

pictures: the emoji teacher with GRI against itself without, before and after a fit of the gains, which come from a
pack: PSNR, recognition, and the Frechet distance of the classifier's features, at 16 x 16 latents, where it was
trained, and on sheets of 32 x 32. A gain is fitted head by head, to the least error against full attention in other
runs; trained gains are those of a pack (--gains) that train/configs/emoji-gri.toml learned by distillation, at 16 x 16.

unet: SD1.5 with random weights at 1024 x 1024, the node's automatic settings; and with nothing in the place of the same
attentions, which no attention can beat. Everything is measured in turn; names in the summary end in the type where it
is not fp32.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from asdm_core import gri as core_gri
from asdm_core import packs
from asdm_core.architecture import Architecture
from asdm_core.assignment import Window
from asdm_core.measure import psnr, ratio, time_alternating
from asdm_core.tensor_file import DTYPES
from bench._attention import Larger, Map, error, full, recorded
from bench._common import (
    ROOT,
    add_common_arguments,
    at_saving,
    begin,
    beside_earlier,
    command_line,
    pack_module,
    pyplot,
    record,
    upper_edge,
)
from bench._unets import SD15, build, with_technique

BATCH, HEADS, DIM = 2, 8, 40
SIDES = {512: 64, 1024: 128}
GRI = ((8, 8), (16, 8), (8, 4), (16, 4), (32, 8), (32, 4))  # windows, cells
TILES = ((8, 8), (8, 16), (16, 16), (16, 32), (32, 32))  # rows, columns of tokens; the node's default is 32
MERGES = (
    (0.9, 4),
    (0.75, 4),
    (0.75, 2),
    (0.65, 2),
    (0.5, 2),
    (0.3, 2),
)  # ratio, side of its cells: 2 allows at most 0.75
GAINS = torch.arange(-3, 1.01, 0.25)  # that a fit tries


def smooth(side: int, channels: int, seed: int) -> torch.Tensor:
    """(B, N, channels)"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(BATCH, channels, side // 8, side // 8, generator=generator)
    fine = 0.3 * torch.randn(BATCH, channels, side, side, generator=generator)
    return (F.interpolate(coarse, (side, side), mode="bicubic") + fine).flatten(2).transpose(1, 2).contiguous()


# Ways to attend: a Map -> (B, N, heads * dim) --------------------------------------------------------


def gri(window: int, pool: int, gains: dict | None = None):
    """gains: block -> (heads,)"""
    regional = pack_module("nodes.engine.regional")
    played = regional.Attention(regional.Regional(window, pool), SD15)
    names = regional.Regional(stages=4).blocks(SD15)
    played.log_gains = {names[block]: {0: lambda q, g=g: g} for block, g in (gains or {}).items()}

    def attend(m):
        return played.play(
            m.q,
            m.k,
            m.v,
            {
                "n_heads": m.heads,
                "attn_precision": None,
                "block": m.block,
                "block_index": 0,
                "activations_shape": [len(m.q), m.q.shape[2], m.side, m.side],
                "transformer_index": 0,
            },
        )

    return attend


def hypertile(rows: int, columns: int):
    """As published (tfernd/HyperTile): tiles attend to themselves alone."""

    def attend(m):
        b = len(m.q)
        high = m.side // rows
        wide = m.side // columns

        def fold(t):
            return t.view(b, high, rows, wide, columns, -1).transpose(2, 3).reshape(b * high * wide, rows * columns, -1)

        out = full(Map(*map(fold, (m.q, m.k, m.v)), m.heads))
        return out.view(b, high, wide, rows, columns, -1).transpose(2, 3).reshape(m.q.shape)

    return attend


def tome(ratio: float, cell: int):
    """As published (dbolya/tomesd), by the host's own matching."""

    def attend(m):
        from comfy_extras.nodes_tomesd import bipartite_soft_matching_random2d

        merge, unmerge = bipartite_soft_matching_random2d(m.q, m.side, m.side, cell, cell, int(ratio * m.q.shape[1]))
        return unmerge(full(Map(merge(m.q), merge(m.k), merge(m.v), m.heads)))

    return attend


class Patches:
    """Takes what a node patches into a MODEL."""

    def clone(self):
        return self

    def set_model_attn1_patch(self, patch):
        self.before = patch

    def set_model_attn1_output_patch(self, patch):
        self.after = patch


def by_node(node, *inputs):
    """What a node of the host makes of self-attention."""
    patches = Patches()
    node.execute(patches, *inputs)

    def attend(m):
        options = {"original_shape": [len(m.q), 4, m.side, m.side]}
        return patches.after(full(Map(*patches.before(m.q, m.k, m.v, options), m.heads)), options)

    return attend


def ways() -> dict:
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    return {
        "full": full,
        **{f"gri {w}/{p}": gri(w, p) for w, p in GRI},
        **{f"hypertile {rows} x {columns}": hypertile(rows, columns) for rows, columns in TILES},
        **{
            f"hypertile {rows}, node": by_node(HyperTile, 8 * rows, 1, 0, False)
            for rows, columns in TILES
            if rows == columns
        },
        **{f"tome {r:g} of {cell} x {cell}": tome(r, cell) for r, cell in MERGES},
        **{f"tome {r:g}, node": by_node(TomePatchModel, r) for r, cell in MERGES if cell == 2},
    }


def compare(maps: list[Map], attend: dict, rounds: int, device: torch.device, clock, **more) -> list[dict]:
    """Time of each way on the first map, error on each map."""
    with torch.inference_mode():
        torch.manual_seed(0)  # of Token Merging
        errors = {name: [error(way(m), m.wanted) for m in maps] for name, way in attend.items()}
        times = time_alternating(
            {name: functools.partial(way, maps[0]) for name, way in attend.items()},
            rounds,
            0,
            torch.cuda.synchronize if device.type == "cuda" else None,
            clock,
        )
    return [
        {
            **more,
            "way": name,
            "tokens": maps[0].q.shape[1],
            "dtype": str(maps[0].q.dtype).removeprefix("torch."),
            "seconds": statistics.median(times[name]),
            "speedup": ratio(times, "full", name),
            "error": statistics.mean(errors[name]),
            **({"errors": errors[name]} if len(maps) > 1 else {}),
        }
        for name in attend
    ]


def automatic(side: int) -> str:
    settings = core_gri.GRI.choose(side, side)
    return f"gri {settings.window}/{settings.pool}"


def edge(rows: list[dict], kind: str) -> list[tuple[float, float]]:
    """(seconds, error) of those settings of a kind that no other one beats in both, the quickest last."""
    points = [
        (-math.log(row["seconds"]), -math.log(row["error"]))
        for row in rows
        if row["way"].startswith(kind) and "gains" not in row["way"]
    ]
    return [(math.exp(-time), math.exp(-quality)) for time, quality in upper_edge(points)]


def at_equal_time(rows: list[dict], kind: str, seconds: float) -> float:
    """Error of a kind at a time: on the line through `edge` (both axes logarithmic), or its quickest setting's where
    none is as quick.
    """
    points = edge(rows, kind)
    found = at_saving([(-math.log(time), -math.log(error)) for time, error in points], -math.log(seconds))
    return points[-1][1] if found is None else math.exp(-found)


def errors(rows: list[dict], side: int, suffix: str = "") -> dict[str, float]:
    chosen = next(row for row in rows if row["way"] == automatic(side))
    return {
        f"error_gri{suffix}": chosen["error"],
        **{f"error_{kind}{suffix}": at_equal_time(rows, kind, chosen["seconds"]) for kind in ("hypertile", "tome")},
    }


def bench_calls(dtype: torch.dtype, rounds: int, device: torch.device, clock) -> tuple[dict, list[dict]]:
    summary = {}
    rows = []
    for pixels, side in SIDES.items():
        q, k, v = (smooth(side, HEADS * DIM, seed).to(device, dtype) for seed in range(3))
        m = Map(q, k, v, HEADS)
        found = compare([m], ways(), rounds, device, clock, part="calls")
        show(found, f"calls {pixels}")
        summary[f"attention_speedup_{pixels}"] = next(row["speedup"] for row in found if row["way"] == automatic(side))
        rows += found
    return summary | errors(found, side, "_1024"), rows


def show(rows: list[dict], what: str) -> None:
    for row in rows:
        print(
            f"{what:22} {row['way']:26} {row['seconds'] * 1000:9.1f} ms  x{row['speedup']:6.2f}  error "
            f"{row['error']:.4f}",
            flush=True,
        )


# What networks attend to ----------------------------------------------------------------------------


def random_weights(side: int, device: torch.device, dtype: torch.dtype) -> list[Map]:
    """The self-attentions of a network of one level of SD1.5's width, with random weights."""
    config = replace(SD15, family="", channel_mult=(1,), down=((1, 1),), mid=1, up=((1, 1, 1),))
    unet = build(config, dtype, device)
    found = []
    torch.manual_seed(0)
    for p in unet.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)

    def remember(q, k, v, options):
        found.append(Map(q, k, v, options["n_heads"], options["block"]))
        return full(found[-1])

    blocks = [("input", 1), ("input", 2), ("output", 0), ("output", 1), ("output", 2)]
    x = smooth(side, 4, 0)[:1].transpose(1, 2).unflatten(2, (side, side)).to(device, dtype)
    with torch.inference_mode():
        unet(
            x,
            torch.tensor([500.0], device=device),
            torch.randn(1, 77, SD15.context_dim, device=device, dtype=dtype),
            transformer_options={"patches_replace": {"attn1": dict.fromkeys(blocks, remember)}},
        )
    return found


def fit_gains(maps: list[Map], window: int, pool: int) -> dict:
    """For each block, the gains (heads,) that bring GRI nearest to full attention, each head by itself."""
    found = {}
    with torch.inference_mode():
        for block in dict.fromkeys(m.block for m in maps):
            tried = []
            for gain in GAINS:
                attend = gri(window, pool, {block: gain.expand(maps[0].heads)})
                total = torch.zeros(maps[0].heads)
                for m in (m for m in maps if m.block == block):
                    wanted = m.wanted.unflatten(2, (m.heads, -1))
                    total = total + (attend(m).unflatten(2, (m.heads, -1)) - wanted).square().sum(
                        (0, 1, 3)
                    ) / wanted.square().sum((0, 1, 3))
                tried.append(total)
            found[block] = GAINS[torch.stack(tried).argmin(0)]
    return found


def bench_activations(family: Larger, rounds: int, device: torch.device, clock) -> tuple[dict, list[dict]]:
    maps = family.maps(64, 0)
    window, pool = map(int, automatic(64).removeprefix("gri ").split("/"))
    gains = fit_gains(family.maps(64, 1), window, pool)
    attend = ways() | {f"gri {window}/{pool}, gains": gri(window, pool, gains)}
    rows = compare(maps, attend, rounds, device, clock, part="activations", of="emoji")
    show(rows, "emoji")
    summary = errors(rows, 64) | {"error_gri_gains": rows[-1]["error"]}
    more = compare(
        random_weights(64, device, torch.float32),
        ways(),
        rounds,
        device,
        clock,
        part="activations",
        of="random weights",
    )
    show(more, "random weights")
    return summary | errors(more, 64, "_random"), rows + more


# Pictures -------------------------------------------------------------------------------------------


def with_gains(model, config, gains: dict, folder: Path):
    """A clone of MODEL with gains from a pack, as Apply Pack would give it."""
    names = pack_module("nodes.engine.regional").Regional(stages=4).blocks(config)
    description = packs.Description(
        "pack",
        Architecture.full(config),
        gri=core_gri.LogGains(tuple(names[block] for block in gains)),
    )
    by_unit = {names[block]: gain for block, gain in gains.items()}
    path = folder / "gains.safetensors"
    packs.write_pack(
        path, {key: by_unit[slot.unit.address] for key, slot in description.keys().items()}, description, None
    )
    return pack_module("nodes.apply_pack").apply_pack(model, path, path.name, Window())


def show_pictures(columns: list[torch.Tensor], path: Path) -> None:
    """Pictures (N, 3, H, W), a column for each way."""
    from PIL import Image

    shown = torch.cat([torch.cat([*pictures], 1) for pictures in columns], 2)
    Image.fromarray((shown.movedim(0, -1) * 255).round().clamp(0, 255).byte().cpu().numpy()).save(path, quality=88)


def bench_pictures(family: Larger, trained: Path, clock) -> tuple[dict, list[dict]]:
    """trained: a pack with gains."""
    from train.metrics import frechet

    regional, apply_pack = pack_module("nodes.engine.regional"), pack_module("nodes.apply_pack")
    config = pack_module("nodes.engine.network").architecture_of(family.model).config
    summary = {}
    rows = []
    for side in (16, 32):
        window, pool = (16, 4) if side > 16 else (8, 4)
        if side == 16:
            maps = recorded(
                family.model,
                lambda model: family.sample(model, family.noise[:8].flip(0), [[family.cond[0][0][:8], {}]]),
            )
        else:
            maps = family.maps(side, 1)
        gains = fit_gains(maps, window, pool)

        def draw(model, side=side):
            before = clock()
            if side > 16:
                latents = torch.cat([family.again(model, sheet) for sheet in family.sheets(side).split(2)])
            else:
                latents = torch.cat(
                    [
                        family.sample(model, noise, [[context, {}]])
                        for noise, context in zip(family.noise.split(16), family.cond[0][0].split(16), strict=True)
                    ]
                )
            with torch.inference_mode():
                pictures = family.pictures(latents)
                return pictures, family.cut_out(pictures) if side > 16 else pictures, clock() - before

        def features(emoji):
            with torch.inference_mode():
                return torch.cat([family.classifier.features(part) for part in emoji.split(32)])

        with tempfile.TemporaryDirectory() as folder:
            played = with_technique(family.model, regional.Regional(window, pool, 1))
            models = {
                "full": family.model,
                "gri": played,
                "gri, gains": with_gains(played, config, gains, Path(folder)),
                "gri, trained gains": apply_pack.apply_pack(played, trained, trained.name, Window()),
            }
            made = {name: draw(model) for name, model in models.items()}
        sheets, emoji, _ = made["full"]
        if side > 16:
            show_pictures([pictures[:2] for pictures, _, _ in made.values()], ROOT / "docs" / "gri-pictures.jpg")
        for name, (pictures, parts, seconds) in made.items():
            row = {
                "part": "pictures",
                "latents": side,
                "way": name if name == "full" else name.replace("gri", f"gri {window}/{pool}"),
                "emoji": len(parts),
                "seconds": seconds,
                "top1": family.top1(parts),
            }
            if name != "full":
                row |= {
                    "psnr": float(psnr(pictures, sheets).mean()),
                    "fed": frechet(features(parts), features(emoji)),
                    "gains": {"/".join(map(str, block)): gain.tolist() for block, gain in gains.items()}
                    if name == "gri, gains"
                    else None,
                }
                summary[f"psnr_{name.replace(', ', '_').replace(' ', '_')}_{side}"] = row["psnr"]
            rows.append(row)
            print(
                *(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{value}"
                    for key, value in row.items()
                    if key != "gains"
                ),
                flush=True,
            )
    return summary, rows


# The whole UNet -------------------------------------------------------------------------------------


def bench_unet(name: str, rounds: int, device: torch.device, clock) -> tuple[dict, list[dict]]:
    dtype = DTYPES[name]
    regional = pack_module("nodes.engine.regional")
    unet = build(SD15, dtype, device)
    played = regional.Attention(regional.Regional(), SD15)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 4, 128, 128, generator=generator).to(device, dtype)
    context = torch.randn(BATCH, 77, SD15.context_dim, generator=generator).to(device, dtype)
    t = torch.full((BATCH,), 500.0, device=device)

    def call(options):
        with torch.inference_mode():
            assert unet(x, t, context, transformer_options=options).isfinite().all()

    with torch.inference_mode():
        unet(x[..., :64, :64], t, context)  # warms every layer up, at a quarter of the size
    nothing = {"patches_replace": {"attn1": dict.fromkeys(played.blocks, lambda q, k, v, options: v)}}
    gri_in_all = played.entered({}, played.blocks)
    times = time_alternating(
        {"full": lambda: call({}), "gri": lambda: call(gri_in_all), "nothing": lambda: call(nothing)},
        rounds,
        0,
        torch.cuda.synchronize if device.type == "cuda" else None,
        clock,
    )
    rows = [
        {
            "part": "unet",
            "unet": way,
            "pixels": 1024,
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": statistics.median(times[way]),
            "speedup": ratio(times, "full", way),
        }
        for way in times
    ]
    print(
        *(f"unet {row['unet']:7} {row['seconds']:8.2f} s  x{row['speedup']:.2f}" for row in rows), sep="\n", flush=True
    )
    suffix = "" if name == "fp32" else f"_{name}"
    speedup = {row["unet"]: row["speedup"] for row in rows}
    return {f"unet_speedup_1024{suffix}": speedup["gri"], f"unet_limit_1024{suffix}": speedup["nothing"]}, rows


def draw(rows: list[dict], path: Path) -> None:
    """Error against time, one plot for each kind of map."""
    if (plt := pyplot()) is None:
        return

    colours = {"gri": "#d1495b", "hypertile": "#2b59c3", "tome": "#3a9d5d"}
    plots = {
        "emoji teacher, 64 x 64 tokens": [r for r in rows if r.get("of") == "emoji"],
        "random weights, 64 x 64 tokens": [r for r in rows if r.get("of") == "random weights"],
        "smooth random maps, 128 x 128 tokens": [r for r in rows if r["part"] == "calls" and r["tokens"] == 128**2],
    }
    plots = {title: found for title, found in plots.items() if found}
    figure, axes = plt.subplots(1, len(plots), figsize=(4.6 * len(plots), 4.2), squeeze=False)
    for ax, (title, found) in zip(axes.flat, plots.items(), strict=True):
        for kind, colour in colours.items():
            best = edge(found, kind)
            ax.plot(
                *zip(*((1000 * seconds, error) for seconds, error in best), strict=True),
                color=colour,
                lw=1.2,
                alpha=0.7,
            )
            for node, marker in ((False, "o"), (True, "^")):
                points = [
                    (r["seconds"] * 1000, r["error"], r["way"])
                    for r in found
                    if r["way"].startswith(kind) and r["way"].endswith("node") == node
                ]
                ax.scatter(
                    *list(zip(*points, strict=True))[:2],
                    color=colour,
                    marker=marker,
                    s=34,
                    zorder=3,
                    label={"gri": "GRI", "hypertile": "HyperTile", "tome": "Token Merging"}[kind]
                    + ", the host's node" * node,
                ) if points else None
                for x, y, way in points:
                    if any(math.isclose(y, error) for _, error in best):
                        ax.annotate(
                            way.removesuffix(", node").split(" ", 1)[1],
                            (x, y),
                            textcoords="offset points",
                            xytext=(5, 3),
                            fontsize=7,
                            color=colour,
                        )
        whole = next(r["seconds"] for r in found if r["way"] == "full") * 1000
        ax.axvline(whole, color="#8a94a6", lw=1, zorder=0, label="full attention (error 0)")
        ax.set(
            xscale="log",
            yscale="log",
            title=title,
            xlabel="time of a call (ms)",
            ylabel="error against full attention (relative)",
        )
        ax.grid(True, which="both", alpha=0.2)
    axes.flat[-1].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


PARTS = ("calls", "activations", "pictures", "unet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the others keep what was recorded of them"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of calls and unet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unet-rounds", type=int, default=1)
    parser.add_argument("--emoji", type=int, default=80, help="pictures of the parts on the emoji family")
    parser.add_argument(
        "--gains",
        type=Path,
        default=ROOT / "models" / "emoji" / "emoji-gri.safetensors",
        help="a pack with trained gains, of part pictures",
    )
    add_common_arguments(parser)
    args, host, device, clock = begin(parser)
    dtype = DTYPES[args.dtype]
    summary: dict[str, float] = {}
    rows: list[dict] = []
    family: Any = Larger(args.emoji) if {"activations", "pictures"} & set(args.parts) else None
    calls = {
        "calls": lambda: bench_calls(dtype, args.rounds, device, clock),
        "activations": lambda: bench_activations(family, args.rounds, device, clock),
        "pictures": lambda: bench_pictures(family, args.gains, clock),
        "unet": lambda: bench_unet(args.dtype, args.unet_rounds, device, clock),
    }
    command = command_line("gri")
    for part in args.parts:
        found, more = calls[part]()
        summary |= found
        rows += more
    summary, rows = beside_earlier(
        "gri", summary, rows, command, lambda row: (row["part"], row.get("dtype") if row["part"] == "unet" else None)
    )
    draw(rows, ROOT / "docs" / "gri.png")
    record("gri", summary, rows, command, host, args.notes)


if __name__ == "__main__":
    main()
