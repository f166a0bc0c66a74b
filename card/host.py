"""A ComfyUI in this process, with the pack in it, and what the machine is.

Imports no torch by itself: the host's flags and its memory come first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parents[1]  # by its own path: a linked pack lies in the ComfyUI of the link
PACK = "asdm_in_host"  # no import path, as in the host
BUNDLED = ROOT / "host"  # of `bootstrap.py bundle`


def find() -> Path | None:
    """The ComfyUI that is there: COMFYUI_PATH, the one the pack lies in, or the bundle's. Raises ValueError."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        folder = Path(given).expanduser().absolute()
        if not _is_host(folder):
            raise ValueError(f"COMFYUI_PATH is {folder}, and that is no ComfyUI: comfy/sd.py is expected in it.")
        return folder
    return next((folder for folder in (ROOT.parent.parent, BUNDLED) if _is_host(folder)), None)


def _is_host(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("comfy/sd.py", "nodes.py", "folder_paths.py"))


# Narrow networks gain nothing by more, and threads that wait for each other stand still on a machine that does other
# work as well.
CPU_THREADS = 1


def start(host: Path, flags: tuple[str, ...] = (), dynamic: bool = False) -> None:
    """Put ComfyUI on the path and let it read its flags, as its main.py would. Call before importing comfy.

    dynamic: choose the host's memory as main.py does, too; call before importing torch.
    """
    sys.path.insert(0, str(host))  # first: the host's nodes.py must not be hidden by our nodes/
    arguments, sys.argv = sys.argv, ["main.py", *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = arguments
    if dynamic:
        _dynamic_memory(comfy.cli_args)


def _dynamic_memory(cli) -> None:
    """What main.py does before it starts its server, for the flags that were read."""
    import cuda_malloc  # noqa: F401  chooses torch's allocator

    wanted = getattr(cli, "enables_dynamic_vram", lambda: False)()
    if wanted:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    on_nvidia = management.is_nvidia() and not management.is_wsl() and management.torch_version_numeric >= (2, 8)
    if not cli.args.enable_dynamic_vram and not (wanted and on_nvidia):
        return
    devices = management.get_all_torch_devices()
    try:
        ready = comfy_aimdo.control.init_devices((d.index, int(cli.args.vram_headroom * 1024**3)) for d in devices)
    except TypeError:  # comfy-aimdo before 0.4.10
        ready = comfy_aimdo.control.init_devices(d.index for d in devices)
    if ready:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def pack_module(name: str):
    """A module of the pack (`asdm_core.packs`, `card.correct`), imported as the host would."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    return importlib.import_module(f"{PACK}.{name}")


def device_flags() -> list[str]:
    """["--cpu"] on a machine without a graphics card that torch can use."""
    import torch

    gpu = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return [] if gpu else ["--cpu"]


# What the machine is ---------------------------------------------------------------------------------


def machine() -> dict:
    """Processor and graphics card, without anything personal."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            cpu,
        )
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": CPU_THREADS, "system": platform.system()}
    if torch.cuda.is_available():
        found |= {"threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name()}
    return found


def card() -> dict:
    """Memory and driver of the graphics card; nothing where there is none that torch drives by CUDA or ROCm."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
    }
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and (version := re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())):
        found["driver"] = version[0]
    elif hasattr(torch._C, "_cuda_getDriverVersion"):
        number = torch._C._cuda_getDriverVersion()
        found["driver"] = f"for CUDA {number // 1000}.{number % 1000 // 10}"
    return found


def versions(host: Path | None = None) -> dict:
    """Python, torch, the pack and, where given, ComfyUI."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    version = re.search(r'(?m)^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    found["asdm"] = version[1] if version else "unknown"
    if host is not None and (file := host / "comfyui_version.py").is_file():
        found["comfyui"] = file.read_text("utf-8").split('"')[1]
    return found
