"""A against B: the sampler that measures two MODELs, and the view that compares pictures."""

from __future__ import annotations

import json

import comfy.samplers
import nodes as host_nodes
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..asdm_core import measure
from ..asdm_core.pictures import CELL, HEAT_HEAD, Row, duration, finite, grid, heat_map, likeness
from . import host, switch
from .load import CATEGORY, SHOWS_COMPARISON
from .picture import from_image, to_image
from .timing import Side, alternate

NAMES = "ABCDEFGH"
LARGEST_CELL = 512
ORIGINAL = "original"  # the name of a MODEL without anything of asdm


# What is compared -----------------------------------------------------------------------------------


def original_of(model):
    """A clone of MODEL without anything that asdm's nodes put on it."""
    return host.without_setup(switch.without_switches(model))


def techniques(model) -> str:
    """What asdm's nodes put on a MODEL, in a few words; ORIGINAL for nothing."""
    setup = host.setup_of(model)
    packs = [pack_id.rpartition("@")[0].removesuffix(".safetensors") for pack_id in setup.packs]
    inheritance = [f"{setup.inheritance.plan.name or 'custom'} inheritance"] if setup.inheritance else []
    regional = ["GRI attention"] if setup.regional else []
    switched = ["switched"] if switch.switches_of(model) else []
    return " + ".join([*packs, *inheritance, *regional, *switched]) or ORIGINAL


def sampling_inputs() -> list[io.Input]:
    """What a sampler needs, named as in KSampler."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Of the noise, the same for all.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of each run."),
        io.Float.Input(
            "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance, as in KSampler."
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="As in KSampler; below 1 for image to image.",
        ),
    ]


def sampler(positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise):
    """What KSampler does with these settings, as a function of the MODEL."""
    return lambda model: host_nodes.common_ksampler(
        model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
    )[0]


def decode(vae, latent: dict) -> torch.Tensor:
    return host_nodes.VAEDecode().decode(vae, latent)[0]


# Texts and pictures -----------------------------------------------------------------------------------


def alike(a: torch.Tensor, b: torch.Tensor) -> list[tuple[float, float] | None]:
    """PSNR and SSIM of each pair of two IMAGEs; None for all where their sizes differ.

    Of a shorter batch the last picture stands for those it lacks.
    """
    if a.shape[1:3] != b.shape[1:3]:
        return [None] * max(len(a), len(b))
    a, b = (paired(t, max(len(a), len(b)))[..., :3].movedim(-1, 1) for t in (a, b))
    return list(zip(measure.psnr(a, b).tolist(), measure.ssim(a, b).tolist(), strict=True))


def paired(images: torch.Tensor, count: int) -> torch.Tensor:
    """A batch as long as `count`: its last picture stands for those it lacks."""
    return images[[min(i, len(images) - 1) for i in range(count)]]


def in_words(pair: tuple[float, float] | None) -> str:
    return "sizes differ" if pair is None else likeness(*pair)


def faster(before: float, after: float) -> str:
    """Two times in words: "1.62x, 3.1 s to 1.9 s"."""
    return f"{before / after:.2f}x, {duration(before)} to {duration(after)}"


def cell_of(images: torch.Tensor) -> tuple[int, int]:
    """Size of a cell for pictures of an IMAGE: as large as they are, within limits that leave room for labels."""
    height, width = images.shape[1:3]
    scale = min(max(max(height, width), CELL), LARGEST_CELL) / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw(title: str, subtitle: str, labels: list[str], batches: list[torch.Tensor]) -> Image.Image:
    """All batches side by side, one line per picture. Two of one size get a heat-map; more than two their likeness to
    the first below.
    """
    count = max(map(len, batches))
    columns = [[from_image(picture) for picture in paired(batch, count)] for batch in batches]
    likenesses = [[in_words(pair) for pair in alike(batches[0], batch)] for batch in batches[1:]]
    heads, pair = [f"{name}  {label}".rstrip() for name, label in zip(NAMES, labels, strict=False)], len(batches) == 2
    with_heat = pair and batches[0].shape[1:3] == batches[1].shape[1:3]
    rows = []
    for i, pictures in enumerate(zip(*columns, strict=True)):
        caption = f"{i + 1} of {count}" if count > 1 else ""
        notes = [of[min(i, len(of) - 1)] for of in likenesses]
        if pair:
            rows.append(Row((*pictures, heat_map(*pictures)) if with_heat else pictures, caption, notes[0]))
        else:
            rows.append(Row(pictures, caption, notes=["", *notes]))
    return grid(title, subtitle, [*heads, HEAT_HEAD] if with_heat else heads, rows, cell_of(batches[0]))


def view(cls, title: str, labels: list[str], batches: list[torch.Tensor]) -> dict:
    """What web/compare.js shows: the pictures, saved with the workflow in them, their labels and likenesses."""
    saved = [
        ui.ImageSaveHelper.save_images(batch, f"asdm.compare.{name}", io.FolderType.temp, cls, compress_level=1)
        for name, batch in zip(NAMES, batches, strict=False)
    ]
    likenesses = {
        f"{i}{j}": [in_words(pair) for pair in alike(batches[i], batches[j])]
        for j in range(len(batches))
        for i in range(j)
    }
    return {"asdm_compare": ({"title": title, "labels": labels, "batches": saved, "likeness": likenesses},)}


# The nodes ------------------------------------------------------------------------------------------


class ASDMABCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMABCompare",
            display_name="A/B Compare",
            category=CATEGORY,
            description="Samples with two models in turn, on the same noise and prompts, and tells how much faster B "
            "is and how alike the "
            "pictures are. Loading and compiling do not count. Without an original, A is the same MODEL without "
            "anything of asdm. Takes the place of KSampler.",
            search_aliases=[
                "ab test",
                "benchmark",
                "speed test",
                "compare models",
                "two models",
                "before after",
                "psnr",
                "ssim",
                "ksampler",
            ],
            inputs=[
                io.Model.Input("model", tooltip="B: the model to be judged.", extra_dict=SHOWS_COMPARISON),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Vae.Input("vae"),
                *sampling_inputs(),
                io.Int.Input(
                    "rounds",
                    default=3,
                    min=1,
                    max=50,
                    tooltip="So many timed runs of each, after one that does not count. The median is reported; more "
                    "are more exact.",
                ),
                io.Model.Input(
                    "original",
                    optional=True,
                    tooltip="A: what B is compared with. Not connected: B without anything of asdm.",
                ),
                io.String.Input(
                    "label_a", default="", advanced=True, tooltip="Name of A on the picture. Empty: what it is."
                ),
                io.String.Input(
                    "label_b", default="", advanced=True, tooltip="Name of B on the picture. Empty: what it is."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="comparison",
                    tooltip="A, B and their difference, labelled, with time and likeness on it.",
                ),
                io.Image.Output(display_name="images_a"),
                io.Image.Output(display_name="images_b"),
                io.Latent.Output(display_name="latent_a"),
                io.Latent.Output(display_name="latent_b"),
                io.String.Output(display_name="report", tooltip="All numbers, as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        vae,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        rounds,
        original=None,
        label_a="",
        label_b="",
    ):
        if original is None and techniques(model) == ORIGINAL:
            raise ValueError(
                "asdm does nothing on this MODEL, so A and B would be the same. Put Feature Inheritance, Apply Pack "
                "or another of its "
                "nodes before `model`, or connect the MODEL to compare with to `original`."
            )
        plain = original_of(model) if original is None else original
        sample = sampler(positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        a, b = Side(label_a or techniques(plain), plain, sample), Side(label_b or techniques(model), model, sample)
        alternate((a, b), rounds, steps)
        batches = [decode(vae, side.latent) for side in (a, b)]
        pairs, size = alike(*batches), batches[0].shape[1:3]
        report = {
            "speedup": round(a.median / b.median, 4),
            "a": a.facts(steps),
            "b": b.facts(steps),
            "identical": torch.equal(*batches),
            "psnr": [pair and finite(pair[0]) for pair in pairs],
            "ssim": [pair and pair[1] for pair in pairs],
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": sampler_name,
            "scheduler": scheduler,
            "denoise": denoise,
            "width": size[1],
            "height": size[0],
            "batch_size": len(batches[0]),
            "rounds": rounds,
            "device": str(model.load_device),
            "torch": torch.__version__,
        }
        title = faster(a.median, b.median)
        lines = [
            f"{steps} steps, CFG {cfg:g}, {sampler_name}, {scheduler}, {size[1]} x {size[0]}"
            + (f", batch of {len(batches[0])}" if len(batches[0]) > 1 else "")
            + f"; seed {seed}; median of {rounds}",
            *([f"peak memory {a.peak / 2**20:.0f} MB and {b.peak / 2**20:.0f} MB"] if a.peak and b.peak else []),
            f"loading and compiling, paid once: {duration(a.paid_once)} and {duration(b.paid_once)}",
        ]
        picture = to_image(draw(title, "\n".join(lines), [a.label, b.label], batches))
        text = "\n".join([f"{title}; {', '.join(map(in_words, pairs[:4]))}{' ...' if len(pairs) > 4 else ''}", *lines])
        return io.NodeOutput(
            picture,
            *batches,
            a.latent,
            b.latent,
            json.dumps(report, indent=1),
            ui={"text": (text,), **view(cls, title, [a.label, b.label], batches)},
        )


class ASDMCompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        slots = io.Autogrow.TemplateNames(io.Image.Input("image"), [name.lower() for name in NAMES], min=2)
        return io.Schema(
            node_id="ASDMCompareImages",
            display_name="Compare Images (asdm)",
            category=CATEGORY,
            description="Compares two or more pictures or batches: a slider, flipping on a click, the difference, "
            "zoom in step, one pair "
            "of the batch after the other. Also draws them side by side with labels, to be saved.",
            search_aliases=[
                "image compare",
                "slider",
                "before after",
                "difference",
                "grid",
                "side by side",
                "psnr",
                "ssim",
            ],
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=slots,
                    tooltip="Two to eight pictures or batches; the first of one batch meets the first of the others.",
                ),
                io.String.Input(
                    "labels", default="", tooltip="Names of the pictures, separated by commas. Empty: only A, B, ..."
                ),
                io.String.Input("title", default="", tooltip="Headline of the drawing.", extra_dict=SHOWS_COMPARISON),
            ],
            outputs=[
                io.Image.Output(
                    display_name="comparison", tooltip="All of them side by side, labelled, two with their difference."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, labels, title):
        batches = [images[name.lower()] for name in NAMES if images.get(name.lower()) is not None]
        names = [name.strip() for name in labels.split(",")][: len(batches)]
        names += [""] * (len(batches) - len(names))
        picture = to_image(draw(title, "", names, batches))
        return io.NodeOutput(picture, ui=view(cls, title, names, batches))


NODES = [ASDMABCompare, ASDMCompareImages]
