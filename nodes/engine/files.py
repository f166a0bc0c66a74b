"""Where files are found: the host's model folders and the family that ships with the pack."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path, PurePath

import folder_paths

from ...asdm_core import profile
from ...asdm_core.diffusers_folder import is_shard, unet_in_folder
from ...asdm_core.packs import describe
from ...asdm_core.tensor_file import BadFile, TensorFile
from ...asdm_core.text import read_json

EMBEDDED = Path(__file__).resolve().parent.parent.parent / "models" / "emoji"
LORAS = EMBEDDED.parent / "loras"  # those of the family: only the host's own nodes list them
PACK_FOLDER = "asdm_packs"
PROFILE_FOLDER = "asdm_profiles"

NO_UNET = "none found"  # stands in the list where there is nothing to choose
_FOLDER_MARK = "/"  # ends the name of a diffusers folder in a list of files


def register_folders() -> None:
    """Make models/asdm_packs and models/asdm_profiles known to the host, so that extra model paths work for them too,
    and our LoRAs to its own nodes.
    """
    folder_paths.add_model_folder_path("loras", str(LORAS))
    for folder, extension in ((PACK_FOLDER, ".safetensors"), (PROFILE_FOLDER, profile.SUFFIX)):
        folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))
        known, extensions = folder_paths.folder_names_and_paths[folder]
        extensions.add(extension)


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


_EMA = "unet_ema"  # training writes averaged weights there, beside the last ones
_DEEPEST = 4  # folders within folders, as in author/model/unet or hub/models--author--model/snapshots/REVISION


def _diffusers_folders() -> dict[str, Path]:
    """UNets in diffusers form by name, from where the host keeps UNets and whole diffusers pipelines."""
    found: dict[str, Path] = {}

    def look(folder: Path, name: str, depth: int) -> None:
        try:
            inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError:  # unreadable, or gone in the meantime
            return
        for path in inside:
            here = f"{name}{path.name}{_FOLDER_MARK}"
            if unet_in_folder(path) is not None and _is_diffusers(path):
                found.setdefault(here, path)
                if (path / "unet").is_dir() and unet_in_folder(path / _EMA) is not None:
                    found.setdefault(f"{here}{_EMA}{_FOLDER_MARK}", path / _EMA)
            elif depth > 1:
                look(path, here, depth - 1)

    for root in _diffusers_roots():
        look(Path(root), "", _DEEPEST)
    return found


def _is_diffusers(folder: Path) -> bool:
    """Whether a folder is a pipeline's or a UNet's, and not another network's: a VAE's has a file of the same name."""
    if (folder / "model_index.json").is_file() or (folder / "unet").is_dir() or (folder / "unet_ema").is_dir():
        return True
    try:
        config = read_json((folder / "config.json").read_bytes())
    except (ValueError, OSError):
        return False
    if not isinstance(config, dict) or {"architectures", "model_type"} & config.keys():  # those of transformers
        return False
    return config.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"


def checkpoints() -> list[str]:
    """Names for Load Checkpoint (asdm): the embedded family first, then models/checkpoints."""
    embedded = sorted(
        _embedded("unet"), key=lambda name: "teacher" not in name
    )  # the teacher first: the packs are made for it
    return [*embedded, *filter(_readable, folder_paths.get_filename_list("checkpoints"))]


def unets() -> list[str]:
    """Names for Load Pruned UNet: diffusers folders (with a trailing slash) and single files; NO_UNET alone where there
    are none.
    """
    folders = _diffusers_folders()
    files = filter(_readable, folder_paths.get_filename_list("diffusion_models"))
    return [*folders, *(name for name in files if not _is_other_part(name, folders))] or [NO_UNET]


def _readable(name: str) -> bool:
    return name.endswith(".safetensors") and not is_shard(name)


def _is_other_part(name: str, folders: dict[str, Path]) -> bool:
    """Whether a file belongs to a listed pipeline and is not its UNet, but its VAE or text encoder."""
    parts = PurePath(name).parts
    owners = [n for n in range(1, len(parts)) if _FOLDER_MARK.join((*parts[:n], "")) in folders]
    return bool(owners) and len(parts) - owners[0] > 1 and parts[owners[0]] not in ("unet", _EMA)


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
    return _diffusers_folders().get(name) or _unlisted_folder(name) or _in_folder("diffusion_models", name)


def _unlisted_folder(name: str) -> Path | None:
    """A folder that is there and holds no UNet we read (pickle files, another framework's): opening it says which."""
    parts = PurePath(name).parts
    if not name.endswith(_FOLDER_MARK) or PurePath(name).is_absolute() or ".." in parts:
        return None
    folders = (Path(root, name) for root in _diffusers_roots())
    return next((folder for folder in folders if os.path.isdir(folder)), None)  # false for names too long


def _diffusers_roots() -> list[str]:
    return [root for kind in ("diffusion_models", "diffusers") for root in folder_paths.get_folder_paths(kind)]


def pack_path(name: str) -> Path:
    return _embedded("pack").get(name) or _in_folder(PACK_FOLDER, name)


def profiles() -> list[str]:
    """Names of the profiles in models/asdm_profiles; none outside of a server, which makes that folder known."""
    known = PROFILE_FOLDER in folder_paths.folder_names_and_paths
    return list(folder_paths.get_filename_list(PROFILE_FOLDER)) if known else []


def profile_folders() -> list[str]:
    """Where profiles lie; new ones are written to the first that can be written to."""
    return list(folder_paths.get_folder_paths(PROFILE_FOLDER))


def profile_path(name: str) -> Path:
    return _in_folder(PROFILE_FOLDER, name)


def read_profile(name: str) -> profile.Profile:
    """Raises BadProfile and ValueError, each one sentence."""
    path = profile_path(name)
    return _profile(str(path), *_stamp(path))


@lru_cache(maxsize=256)
def _profile(path: str, modified: int, size: int) -> profile.Profile:
    return profile.read_profile(path)


def fingerprint(path: Path) -> str:
    """What tells the host that a file was replaced, for its cache of results: a digest of names, times and sizes of all
    that is read with it. The host writes it into pictures, so it holds no paths.
    """
    beside: list[Path] = [path]
    if path.is_dir():
        beside = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json"))
    else:
        try:
            description = describe(TensorFile(path))
        except BadFile:
            description = None
        beside += [path.parent / name for name in description.companions.values()] if description else []
    return hashlib.sha256(repr([(str(p), *_stamp(p)) for p in beside]).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def changed(find, name: str) -> list:
    """The fingerprint of the file behind a name in a list; `find` is one of the functions above. A file that is gone is
    for the node itself to report.
    """
    try:
        return (
            [fingerprint(find(name))] if isinstance(name, str) else []
        )  # a name that comes by a link is not known yet
    except ValueError:
        return [name]


def _in_folder(kind: str, name: str) -> Path:
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        places = ", ".join(folder_paths.get_folder_paths(kind))
        raise ValueError(
            f"{name} is not there any more; it was looked for in {places}. Put it back, or choose another and run "
            "again."
        )
    return Path(path)
