"""The noise schedule a teacher was trained on, read from where it stands.

A diffusers folder says it in scheduler/scheduler_config.json; a single file by the marker `ztsnr`, where its schedule
ends in noise alone (zero terminal SNR, arXiv 2305.08891); a product of this package in its metadata. What says nothing
was trained on SD's own schedule, as ComfyUI takes it to be, unless the recipe names another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from asdm_core.diffusers_folder import open_file, unet_in_folder
from asdm_core.packs import ZERO_SNR_MARKER, describe
from asdm_core.tensor_file import BadFile
from asdm_core.text import read_json

from .diffusion import ALPHAS, STEPS, zero_terminal_snr

SCHEDULES = ("", "scaled_linear", "linear", "cosine", "zero_snr")
KEY = "schedule"  # in the metadata of a product
STANDARD: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": False,
}
_NAMED = {
    "scaled_linear": STANDARD,
    "linear": STANDARD | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": STANDARD | {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": STANDARD | {"rescale_betas_zero_snr": True},
}
# What a scheduler's config means by saying nothing (diffusers).
_DEFAULTS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "rescale_betas_zero_snr": False}


@dataclass(frozen=True)
class Schedule:
    """alphas: a^2 by step, (1000,). settings: how diffusers' schedulers say it."""

    settings: Mapping[str, Any] = field(default_factory=lambda: STANDARD)
    alphas: Tensor = field(default=ALPHAS, repr=False)

    @property
    def zero_snr(self) -> bool:
        """Whether nothing of the picture is left at the last step."""
        return not float(self.alphas[-1])

    @property
    def standard(self) -> bool:
        return dict(self.settings) == STANDARD

    def __str__(self) -> str:
        name = "given betas" if self.settings.get("trained_betas") else str(self.settings["beta_schedule"])
        return name + (" with zero terminal SNR" if self.zero_snr else "")


def schedule_of(settings: Mapping[str, Any], where: str = "schedule") -> Schedule:
    """The schedule of a diffusers scheduler's settings. Raises ValueError for one that is none of 1000 noise levels."""
    if "flow" in str(settings.get("_class_name", "")).lower() or "EDM" in str(settings.get("_class_name", "")):
        raise ValueError(
            f"{where}: {settings['_class_name']} has no noise schedule of {STEPS} steps; wanted a DDPM one"
        )
    if (steps := settings.get("num_train_timesteps", STEPS)) != STEPS:
        raise ValueError(f"{where}: num_train_timesteps is {steps!r}; wanted {STEPS}")
    found = {k: settings.get(k, default) for k, default in _DEFAULTS.items()}
    if settings.get("trained_betas") is not None:
        found["trained_betas"] = settings["trained_betas"]
    if found == STANDARD:
        return Schedule()
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    rescaled = bool(found["rescale_betas_zero_snr"])
    try:
        # Rescaled here, in double precision, as a single file's is.
        scheduler = DDPMScheduler(**(found | {"rescale_betas_zero_snr": False}))
        alphas = scheduler.alphas_cumprod.float()
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{where}: this is no noise schedule ({e})") from None
    if {k: v for k, v in found.items() if k != "rescale_betas_zero_snr"} == {
        k: v for k, v in STANDARD.items() if k != "rescale_betas_zero_snr"
    }:
        alphas = ALPHAS
    if rescaled:
        alphas = zero_terminal_snr(alphas)
    if alphas.shape != (STEPS,) or not alphas.isfinite().all() or not (alphas[1:] <= alphas[:-1]).all():
        raise ValueError(f"{where}: its noise does not rise over {STEPS} steps")
    return Schedule(found, alphas)


def read_schedule(teacher: str, named: str = "") -> Schedule:
    """The schedule of a teacher, a file or a folder; named: one of SCHEDULES, which wins over what its files say.

    Raises ValueError for schedules that are none of 1000 noise levels, as those of EDM.
    """
    if named:
        return schedule_of(_NAMED[named])
    path = Path(teacher)
    if not teacher or teacher == "random" or not path.exists():
        return Schedule()
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int) -> Schedule:
    if path.is_dir():
        for folder in (path, path.parent):  # a pipeline's folder, or the unet's own
            config = folder / "scheduler" / "scheduler_config.json"
            if config.is_file():
                try:
                    settings = read_json(config.read_bytes())
                except (ValueError, OSError):
                    raise ValueError(f"{config}: cannot be read as JSON") from None
                if not isinstance(settings, dict):
                    raise ValueError(f"{config}: wanted a JSON object")
                return schedule_of(settings, str(config))
        unet = unet_in_folder(path)
        if unet is None:
            return Schedule()
        path = unet
    try:
        file = open_file(path)
        description = describe(file)
    except BadFile as e:
        raise ValueError(f"network.teacher: {e}") from None
    if edm := [name for name in ("edm_mean", "edm_vpred.sigma_max") if name in file]:
        raise ValueError(
            f"network.teacher: {path.name} was trained on a schedule of EDM ({edm[0]}); wanted one of {STEPS} noise "
            "levels"
        )
    if description is not None and isinstance(description.training.get(KEY), dict):
        return schedule_of(description.training[KEY], path.name)
    return schedule_of(_NAMED["zero_snr"]) if ZERO_SNR_MARKER in file else Schedule()
