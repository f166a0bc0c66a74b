"""Calibrate: learns from a few pictures which steps a person's own runs can do without, and keeps it as a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from comfy_api.latest import io

from ..asdm_core.forecast_fit import Offer, Recording, best_of, fits_of
from ..asdm_core.profile import FEWEST, Profile, file_name, write_profile
from .common import CATEGORY, PIXELS, SHOWS_PICTURE, sampling_inputs
from .engine import files
from .engine.comparison import Sampling
from .engine.forecasts import Recorded, response_of
from .engine.on_model import with_technique, without_technique
from .engine.picture import draw_offers, preview, to_image
from .engine.progress import Progress
from .engine.regional import Regional
from .speed_up import LIKENESS, SpeedUp, circumstances, with_speed_up

SAVINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FEWER = (0.2, 0.4, 0.6)  # of the steps are saved in runs with fewer of them


@dataclass(frozen=True, kw_only=True)
class Batches(Sampling):
    """What a sampler is asked for, batch after batch. samples: latents of the first pictures, (B, C, H, W)."""

    positive: list
    negative: list
    samples: torch.Tensor
    noise_mask: torch.Tensor | None

    def sigmas(self, model) -> torch.Tensor:
        """Noise levels, as KSampler has them."""
        device = model.load_device
        sampler = comfy.samplers.KSampler(
            model, self.steps, device, self.sampler_name, self.scheduler, self.denoise, model.model_options
        )
        return sampler.sigmas.cpu()

    def sample(self, model, batch: int, steps: int, callback) -> torch.Tensor:
        """Pictures of the batch of that number."""
        seed = (self.seed + batch) % 2**64
        noise = comfy.sample.prepare_noise(self.samples, seed)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            self.samples,
            denoise=self.denoise,
            noise_mask=self.noise_mask,
            callback=callback,
            seed=seed,
        )


def calibrate(model, run: Batches, batches: int, compare: bool) -> tuple[Profile, torch.Tensor]:
    """The profile of a run, learned from so many batches of it, and their pictures. model: without Speed Up.

    compare: also try fewer steps. Raises ValueError for samplers that cannot be foretold.
    """
    sigmas, sampler = run.sigmas(model), comfy.samplers.sampler_object(run.sampler_name)
    made_for = circumstances(model, sampler, sigmas, run.cfg, run.samples.shape)
    try:
        response = response_of(sampler, sigmas, model)
    except ValueError as e:
        raise ValueError(
            f"Calibrate cannot learn from runs of {run.sampler_name}: {e}. Take another sampler, such as euler or "
            "dpmpp_2m; Speed Up needs no profile for this one."
        ) from None
    if len(response) < 2:
        raise ValueError("Calibrate: in a run of one step there is nothing to leave out. Give the steps of your runs.")
    fewer = sorted({round(run.steps * (1 - saved)) for saved in FEWER} - {0, run.steps}) if compare else []
    progress = Progress(model, batches * (1 + len(fewer)), run.steps)

    def sampled(m, batch: int, steps: int) -> torch.Tensor:
        made = run.sample(m, batch, steps, progress.callback)
        progress.run_done()
        return made

    def latent(samples: torch.Tensor) -> torch.Tensor:
        return model.model.process_latent_in(samples).double()

    recordings, squares, pictures = [], [], []
    for batch in range(batches):
        recorded = Recorded()
        pictures.append(sampled(with_technique(model, recorded), batch, run.steps))
        squares.append(float(latent(pictures[-1]).square().mean()))
        recordings.append(recorded.results.recording(response, run.cfg, 1.0))
    size = float(np.mean(squares)) ** 0.5
    count = batches * len(run.samples)
    gram = np.mean([recording.gram for recording in recordings], axis=0)
    recording = Recording(response, gram, run.cfg, recordings[0].positions, size, count)
    found = []
    for steps in fewer:
        off = [
            float((latent(sampled(model, batch, steps)) - latent(full)).square().mean())
            for batch, full in enumerate(pictures)
        ]
        found.append(Offer(1 - steps / run.steps, float(np.mean(off)) ** 0.5 / size, steps))
    found += plans(recording, run.steps)
    offers = tuple(sorted(found, key=lambda offer: offer.saving))
    return Profile(made_for, offers, count, run.scheduler), torch.cat(pictures)


def plans(recording: Recording, steps: int) -> list[Offer]:
    """The best plan for each saving; a person may cancel the search."""
    fits = fits_of(recording, comfy.model_management.throw_exception_if_processing_interrupted)
    n, found = len(recording), {}
    for saving in SAVINGS:
        cost = max(1, round(n * (1 - saving)))
        if cost < n:
            best = best_of(fits, cost, patient=True)
            plan = replace(best.plan, steps=steps)
            found[plan] = Offer(best.saving, best.error, steps, plan)
    return list(found.values())


def in_words(profile: Profile, name: str) -> str:
    """What a profile offers, for people."""
    lines = [f"profile {name}, learned from {profile.pictures} pictures"]
    if profile.pictures < FEWEST:
        lines[0] += f": too few to rely on; use at least {FEWEST}"
    for likeness, error in LIKENESS.items():
        offer, fewer = profile.plan(error), profile.fewer_steps(error)
        text = f"{offer.saving:.0%} of the work saved, {offer.error:.1%} off" if offer else "nothing can be left out"
        lines.append(f"{likeness}: {text}" + (f"; {fewer.steps} steps are as good here" if fewer else ""))
    return "\n".join(lines)


class ASDMCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASDMCalibrate",
            display_name="Calibrate",
            category=CATEGORY,
            description="Learns from a few pictures which steps your own model, sampler and settings can do without, "
            "and keeps that as a profile in models/asdm_profiles. Speed Up takes it by itself wherever it fits.",
            search_aliases=["speed up", "profile", "optimal steps", "auto tune", "optimise my model"],
            inputs=[
                io.Model.Input("model", extra_dict=SHOWS_PICTURE),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image", tooltip="The size of the pictures, and so many at once."),
                *sampling_inputs(),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=64,
                    tooltip=f"So many are made and learned from, at least {FEWEST}; more make a better profile.",
                ),
                io.String.Input(
                    "name", default="my profile", tooltip="Of the profile. One of the same name is replaced."
                ),
                io.Combo.Input(
                    "likeness",
                    options=list(LIKENESS),
                    default="close",
                    tooltip="Of the MODEL that comes out. The profile serves all of them.",
                ),
                io.Boolean.Input(
                    "try_fewer_steps",
                    default=True,
                    advanced=True,
                    tooltip="Also makes the pictures in fewer steps, to show beside the plans what that would cost.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="With Speed Up and the profile."),
                io.String.Output(display_name="profile", tooltip="The profile as JSON, to keep or share."),
                io.Image.Output(display_name="picture"),
                io.Latent.Output(display_name="full_run", tooltip="The pictures, in which every step computed."),
            ],
            is_output_node=True,
            not_idempotent=True,  # it writes a file, and speaks in runs
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        pictures,
        name,
        likeness,
        try_fewer_steps=True,
        **settings,
    ):
        file = file_name(name)
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise_mask = latent_image.get("noise_mask")
        run = Batches(positive=positive, negative=negative, samples=samples, noise_mask=noise_mask, **settings)
        plain = without_technique(without_technique(model, SpeedUp), Regional)
        profile, made = calibrate(plain, run, -(-pictures // len(samples)), try_fewer_steps)
        path = write_profile(profile, file, files.profile_folders())
        text = in_words(profile, path.stem)
        height, width = samples.shape[-2:]
        title = f"{run}, {width * PIXELS} x {height * PIXELS}"
        picture = to_image(draw_offers(points(profile.offers), dict(LIKENESS), title, text))
        chosen = with_speed_up(model, SpeedUp(likeness, path.name))
        kept = {**latent_image, "samples": made}
        return io.NodeOutput(chosen, profile.to_json(), picture, kept, ui=preview(cls, picture, text))


def points(offers: Sequence[Offer]) -> dict[str, list[tuple[float, float, str]]]:
    """(saving, error, label) of the plans and of fewer steps."""
    return {
        "plans": [(o.saving, o.error, o.plan.letters()) for o in offers if o.plan is not None],
        "fewer steps": [(o.saving, o.error, str(o.steps)) for o in offers if o.plan is None],
    }
