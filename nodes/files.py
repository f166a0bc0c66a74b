"""Where files are found: the host's model folders and the family that ships with the pack."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import folder_paths

from ..asdm_core.packs import BadFile, TensorFile, describe

EMBEDDED = Path(__file__).resolve().parent.parent / "models" / "emoji"
PACK_FOLDER = "asdm_packs"

NO_UNET = "none found"  # stands in the list where there is nothing to choose
_FOLDER_MARK = "/"  # ends the name of a diffusers folder in a list of files


def register_folders() -> None:
    """Make models/asdm_packs known to the host, so that extra model paths work for it too."""
    folder_paths.add_model_folder_path(PACK_FOLDER, str(Path(folder_paths.models_dir) / PACK_FOLDER))
    known, extensions = folder_paths.folder_names_and_paths[PACK_FOLDER]
    extensions.add(".safetensors")


@lru_cache(maxsize=256)
def _kind(path: str, modified: float, size: int) -> str:
    try:
        description = describe(TensorFile(path))
    except BadFile:
        return ""
    return description.kind if description else ""


def _embedded(kind: str) -> dict[str, Path]:
    found = {}
    for path in sorted(EMBEDDED.glob("*.safetensors")):
        stat = path.stat()
        if _kind(str(path), stat.st_mtime, stat.st_size) == kind:
            found[path.name] = path
    return found


def _is_unet_folder(path: Path) -> bool:
    return any(
        (path / sub / "config.json").is_file() and any((path / sub).glob("*.safetensors")) for sub in ("", "unet")
    )


def _diffusers_folders(kind: str) -> dict[str, Path]:
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(kind)):
        if root.is_dir():
            found.update(
                {p.name + _FOLDER_MARK: p for p in sorted(root.iterdir()) if p.is_dir() and _is_unet_folder(p)}
            )
    return found


def checkpoints() -> list[str]:
    """Names for Load Checkpoint (asdm): the embedded family first, then models/checkpoints."""
    embedded = sorted(
        _embedded("unet"), key=lambda name: "teacher" not in name
    )  # the teacher first: the packs are made for it
    return [*embedded, *folder_paths.get_filename_list("checkpoints")]


def unets() -> list[str]:
    """Names for Load Pruned UNet: diffusers folders (with a trailing slash) and single files; NO_UNET alone where there
    are none.
    """
    return [*_diffusers_folders("diffusion_models"), *folder_paths.get_filename_list("diffusion_models")] or [NO_UNET]


def packs() -> list[str]:
    """Names for Apply Pack: embedded packs first, then models/asdm_packs."""
    return [*_embedded("pack"), *folder_paths.get_filename_list(PACK_FOLDER)]


def checkpoint_path(name: str) -> Path:
    return _embedded("unet").get(name) or _in_folder("checkpoints", name)


def unet_path(name: str) -> Path:
    if name == NO_UNET:
        places = ", ".join(folder_paths.get_folder_paths("diffusion_models"))
        raise ValueError(
            f"there is no UNet to load yet. Put a .safetensors file or a diffusers folder into one of {places}, "
            "press R to refresh the lists, and choose it."
        )
    return _diffusers_folders("diffusion_models").get(name) or _in_folder("diffusion_models", name)


def pack_path(name: str) -> Path:
    return _embedded("pack").get(name) or _in_folder(PACK_FOLDER, name)


def _in_folder(kind: str, name: str) -> Path:
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        places = ", ".join(folder_paths.get_folder_paths(kind))
        raise ValueError(
            f"{name} is not there any more; it was looked for in {places}. Put it back, or choose another and run "
            "again."
        )
    return Path(path)
