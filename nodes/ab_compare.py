"""A against B: the sampler that measures two MODELs."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io

from ..asdm_core.pictures import duration, finite
from .common import CATEGORY, SHOWS_COMPARISON, sampling_inputs
from .engine.comparison import ORIGINAL, Sampling, alike, decode, draw, faster, in_words, original_of, techniques, view
from .engine.picture import to_image
from .engine.timing import TimedModel, alternate


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
        rounds,
        original=None,
        label_a="",
        label_b="",
        **settings,
    ):
        if original is None and techniques(model) == ORIGINAL:
            raise ValueError(
                "asdm does nothing on this MODEL, so A and B would be the same. Put Feature Inheritance, Apply Pack "
                "or another of its "
                "nodes before `model`, or connect the MODEL to compare with to `original`."
            )
        plain = original_of(model) if original is None else original
        sampling = Sampling(**settings)
        sample, steps = sampling.of(positive, negative, latent_image), sampling.steps
        a, b = (
            TimedModel(label_a or techniques(plain), plain, sample),
            TimedModel(label_b or techniques(model), model, sample),
        )
        alternate((a, b), rounds, steps)
        batches = [decode(vae, side.latent) for side in (a, b)]
        pairs, size = alike(*batches), batches[0].shape[1:3]
        report = {
            "speedup": round(a.median / b.median, 4),
            "a": a.facts(steps),
            "b": b.facts(steps),
            "identical": torch.equal(*batches),
            "psnr": [pair and finite(pair[0]) for pair in pairs],
            "ssim": [pair and finite(pair[1]) for pair in pairs],
            **sampling.facts(model, batches[0], rounds),
        }
        title = faster(a.median, b.median)
        lines = [
            f"{sampling}, {size[1]} x {size[0]}"
            + (f", batch of {len(batches[0])}" if len(batches[0]) > 1 else "")
            + f"; seed {sampling.seed}; median of {rounds}",
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
