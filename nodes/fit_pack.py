"""Fitting a pack to a user's own MODEL, from prompts alone."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import io
from PIL import Image

from ..asdm_core import fit, packs, tensor_file
from ..asdm_core.assignment import Window
from ..asdm_core.text import printable
from .apply_pack import apply_pack, check_fit
from .common import CATEGORY, PIXELS, SHOWS_COMPARISON
from .engine import comparison, files, fitting
from .engine.picture import to_image
from .engine.progress import say_progress, time_left
from .save_unet import unused_path

SHOWN = 4  # prompts that the pictures show
STEPS = 6  # of these pictures, where the pack is for any
EVERY = 30.0  # seconds of learning between two previews
BAR = 1000


class Fitting:
    """One execution: what it shows while it learns, and what it keeps."""

    def __init__(self, copy: fitting.Copy, texts: fitting.Texts, shape: tuple[int, int, int], settings: fit.Settings):
        self.copy, self.shape, self.settings = copy, shape, settings
        self.diffusion = fitting.diffusion_of(copy.patcher)
        self.networks = copy.network(copy.unet, texts), copy.network(copy.student, texts)
        self.fit = fit.Fit(
            *self.networks, copy.taps, copy.parameters, self.diffusion, shape, len(texts), settings, copy.dtype
        )
        self._bar = comfy.utils.ProgressBar(BAR)
        self._previewer = latent_preview.Latent2RGBPreviewer(
            copy.patcher.model.latent_format.latent_rgb_factors,
            copy.patcher.model.latent_format.latent_rgb_factors_bias,
            copy.patcher.model.latent_format.latent_rgb_factors_reshape,
        )
        self._paused = 0.0  # seconds that previews took
        self._shown = 0.0
        self._theirs: torch.Tensor | None = None
        self._seconds = 1.0

    def clock(self) -> float:
        """Seconds of learning alone."""
        return time.perf_counter() - self._paused

    def run(self, seconds: float) -> fit.Told:
        self._seconds, self._shown = seconds, self.clock()
        return self.fit.run(seconds, self.clock, self._each)

    def _each(self, told: fit.Told) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self.clock() - self._shown > EVERY or told.steps == 1:
            began = time.perf_counter()
            preview = self._preview()
            self._paused += time.perf_counter() - began
            self._shown = self.clock()
        self._bar.update_absolute(int(BAR * told.share), BAR, preview)
        left = time_left(self._seconds * (1 - told.share))
        say_progress(f"{left}, {told.samples} samples, difference {told.loss:.4f}")

    def latents(self, network: fit.Network, count: int) -> torch.Tensor:
        """Of the first prompts, always from the same noises."""
        noise = torch.randn(SHOWN, *self.shape, generator=torch.Generator().manual_seed(self.settings.seed))
        numbers = list(range(min(count, self.fit.count)))
        noise = noise[: len(numbers)].to(self.copy.device)
        fewest, most = self.settings.steps
        steps = fewest if fewest == most else STEPS
        return fit.draw(network, self.diffusion, noise, numbers, steps, self.settings.guidance)

    def pairs(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the MODEL itself, and with the pack as it is now."""
        if self._theirs is None:
            self._theirs = self.latents(self.networks[0], SHOWN)
        return self._theirs[:count], self.latents(self.networks[1], count)

    def _preview(self):
        """The MODEL's own picture and the pack's, side by side."""
        with self.fit.averaged():
            both = self.pairs(1)
        left, right = (self._previewer.decode_latent_to_preview(latents.float()) for latents in both)
        picture = Image.new("RGB", (left.width + right.width, left.height))
        picture.paste(left, (0, 0))
        picture.paste(right, (left.width, 0))
        return "JPEG", picture, 2 * latent_preview.MAX_PREVIEW_RESOLUTION


def prompts_of(text: str) -> list[str]:
    """One a line. Raises ValueError where there is none."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(
            "Fit Pack learns from prompts, one a line, and none came. Write some as you would for this checkpoint; "
            "twenty or more make a better pack."
        )
    return found


def within(folder: Path, prefix: str) -> str:
    """A prefix of file names, which may begin with folders. Raises ValueError where it leads out of this folder."""
    path = Path(os.path.abspath(folder / prefix))
    if not prefix.strip() or not path.is_relative_to(os.path.abspath(folder)) or path == Path(os.path.abspath(folder)):
        raise ValueError(
            f"filename_prefix is the beginning of a file's name in models/asdm_packs, or in a folder there; got "
            f"{printable(prefix)}. Write one such as fitted or mine/fitted."
        )
    return str(path.relative_to(os.path.abspath(folder)))


class ASDMFitPack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMFitPack",
            display_name="Fit Pack",
            category=CATEGORY,
            description="Fits a pack to your own checkpoint: its units learn from this very MODEL, LoRAs included, "
            "from prompts alone, so that the pictures keep your checkpoint's style. No pictures are needed. The "
            "MODEL stays as it is. The fitted pack goes into models/asdm_packs, belongs to this checkpoint, and is "
            "played by Apply Pack. Cancel keeps what was learned until then.",
            search_aliases=["asdm", "train", "finetune", "distill", "style", "adapt pack"],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_COMPARISON),
                io.Clip.Input("clip"),
                io.Vae.Input("vae", tooltip="For the pictures before and after."),
                io.Combo.Input(
                    "pack_name",
                    options=files.packs(),
                    tooltip="The pack to begin with: a file from models/asdm_packs, or one of the embedded family.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One a line, as you write them for this checkpoint; twenty or more make a better pack.",
                ),
                io.Float.Input(
                    "minutes",
                    default=10.0,
                    min=0.05,
                    max=1440.0,
                    step=0.5,
                    tooltip="Of learning. The longer, the nearer to the checkpoint's own pictures.",
                ),
                io.Int.Input("width", default=512, min=64, max=2048, step=64, tooltip="Of the pictures it learns on."),
                io.Int.Input("height", default=512, min=64, max=2048, step=64, tooltip="Of the pictures it learns on."),
                io.String.Input(
                    "filename_prefix",
                    default="fitted",
                    tooltip="Beginning of the file's name in models/asdm_packs; a number follows.",
                ),
                io.Float.Input(
                    "cfg",
                    default=fit.Settings.guidance,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Guidance of the pictures it learns on, about that of your runs.",
                ),
                io.Int.Input(
                    "batch",
                    default=fit.Settings.walks,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Pictures at once. More need more memory.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=fit.Settings.lr,
                    min=1e-7,
                    max=0.1,
                    step=1e-7,
                    advanced=True,
                    tooltip="Lower it where the difference in the progress text rises.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    advanced=True,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noises it learns on.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="Of the runs that the pack is for, with the scheduler simple. With few of them it comes "
                    "nearer in the same time, and is not for others. 0: for any.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="With the fitted pack."),
                io.String.Output(display_name="pack_name", tooltip="The file in models/asdm_packs."),
                io.Image.Output(display_name="comparison", tooltip="The MODEL's own pictures, and with the pack."),
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, pack_name=None, **_):
        return files.changed(files.pack_path, pack_name)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        pack_name,
        prompts,
        minutes,
        width,
        height,
        filename_prefix,
        cfg,
        batch,
        learning_rate,
        seed,
        steps=0,
    ):
        pack = packs.open_pack(files.pack_path(pack_name))
        check_fit(model, pack.description, pack_name)
        fitting.check_model(model, pack)
        fitting.check_copy(model)
        texts = fitting.Texts(clip, prompts_of(prompts))
        folder = Path(folder_paths.get_folder_paths(files.PACK_FOLDER)[0])
        folder.mkdir(parents=True, exist_ok=True)
        path = tensor_file.check_output(unused_path(folder, within(folder, filename_prefix)))
        lengths = fit.walks_for(steps)
        settings = fit.Settings(walks=batch, steps=lengths, guidance=cfg, lr=learning_rate, seed=seed)
        shape = (model.model.latent_format.latent_channels, height // PIXELS, width // PIXELS)

        with fitting.learning():
            texts.prepare(model, width, height)
            copy = fitting.Copy(model, pack)
            try:
                one = Fitting(copy, texts, shape, settings)
                needed = copy.memory(one.networks[1], shape, batch)
                fitting.check_memory(needed, copy.make_room(needed), batch, cls._say)
                with one.fit.averaged():
                    own, before = one.pairs(SHOWN)
                try:
                    one.run(60 * minutes)
                finally:  # also where it was cancelled
                    told = one.fit.told
                    if told.steps:
                        spent = round(minutes * min(1.0, told.share), 3)
                        training = {"minutes": spent, "samples": told.samples, "guidance": cfg, "lr": learning_rate}
                        training["steps"] = steps
                        description, tensors = copy.learned(training)
                        packs.write_pack(path, tensors, description, torch.float16)
                        cls._say(f"kept {path.name}, after {told.samples} samples")
                after = one.pairs(SHOWN)[1]
            finally:
                copy.close()
        pictures = [comparison.decode(vae, {"samples": cls._scaled(model, x)}) for x in (own, before, after)]
        gained = [comparison.in_words(comparison.alike(pictures[0], p)[0]) for p in pictures[1:]]
        labels = ["checkpoint", f"{Path(pack_name).stem} before", "fitted"]
        learned = f"{told.samples} samples in {minutes:g} min\nbefore {gained[0]}\nnow {gained[1]}"
        text = f"{path.name}\n{learned}"
        name = str(path.relative_to(folder))
        played = apply_pack(model, path, name, Window())
        picture = comparison.draw(path.name, learned, labels, pictures)
        return io.NodeOutput(
            played,
            name,
            to_image(picture),
            ui={"text": (text,), **comparison.view(cls, path.name, labels, pictures)},
        )

    @classmethod
    def _say(cls, text: str) -> None:
        logging.info(f"asdm: Fit Pack: {text}")
        say_progress(text)

    @staticmethod
    def _scaled(model, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the host's VAE wants them."""
        return model.model.process_latent_out(latents.detach().float().cpu())
