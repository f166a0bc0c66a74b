"""What the benchmarks share: the host in this process, random networks, and the record of a result."""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from card.host import PACK, ROOT, machine, pack_module, start  # noqa: F401  for the benchmarks
from card.host import versions as host_versions

RESULTS = ROOT / "bench" / "results"


class _OneCore(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the pack the asdm_core that benchmarks and train/ import by its plain name; else it is there twice."""

    name = f"{PACK}.asdm_core"

    def find_spec(self, name, path=None, target=None):
        ours = name == self.name or name.startswith(f"{self.name}.")
        return importlib.util.spec_from_loader(name, self) if ours else None

    def create_module(self, spec):
        module = importlib.import_module(spec.name.removeprefix(f"{PACK}."))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # it has run already, under its own name


sys.meta_path.insert(0, _OneCore())


def start_host(*flags: str) -> Path:
    """Put ComfyUI on the path and let it read its flags. Call before importing comfy."""
    if "COMFYUI_PATH" not in os.environ:
        raise SystemExit("start benchmarks with `python bootstrap.py bench`, which finds ComfyUI")
    host = Path(os.environ["COMFYUI_PATH"])
    start(host, (*flags, *([] if torch.cuda.is_available() else ["--cpu"])))
    return host


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near 1: the time of a network hardly depends on them, NaNs would."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            # One row of noise for all outputs: drawing a billion numbers would take longer than the benchmark.
            row = torch.randn(p[0].shape, generator=generator) / math.sqrt(p[0].numel())
            p.copy_(row.to(p.dtype).expand_as(p) * (1 if "proj_out" not in name else 0.1))
        else:
            p.fill_(
                1.0
                if "norm" in name and name.endswith("weight") or name.endswith(("layers.0.weight", "out.0.weight"))
                else 0.0
            )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of this process instead of seconds on the wall, "
        "for a machine that has other work; with one thread (OMP_NUM_THREADS=1) and no GPU",
    )
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Path, torch.device, Callable[[], float]]:
    """Read the arguments and start the host: (arguments, ComfyUI's folder, device, clock for
    `measure.time_alternating`).
    """
    args = parser.parse_args()
    host = start_host("--use-pytorch-cross-attention")
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    return args, host, device, clock_of(args, parser, device)


def clock_of(args: argparse.Namespace, parser: argparse.ArgumentParser, device: torch.device) -> Callable[[], float]:
    """The clock that the arguments of `add_common_arguments` ask for."""
    if args.cpu_time and (torch.get_num_threads() > 1 or device.type != "cpu"):
        parser.error(
            f"--cpu-time needs one thread on the CPU; this is {torch.get_num_threads()} on {device.type} (set "
            "OMP_NUM_THREADS=1)"
        )
    if args.cpu_time:
        return time.process_time
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def pyplot():
    """matplotlib's pyplot for drawing into files; None, and a line that says so, where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figure is drawn: matplotlib is not there")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def command_line(name: str) -> str:
    """The command that runs a benchmark as it was run now."""
    return f"python bootstrap.py bench NAME={name}" + (f" ARGS={shlex.join(sys.argv[1:])!r}" if sys.argv[1:] else "")


def versions(host: Path | None = None) -> dict:
    """Those of the machine, and the commit of the pack where this is a checkout."""
    if not (ROOT / ".git").exists():
        return host_versions(host)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return host_versions(host) | ({"asdm": done.stdout.strip()} if done.returncode == 0 else {})


def beside_earlier(
    name: str, summary: dict, rows: list[dict], command: str, part: Callable[[dict], object]
) -> tuple[dict, list[dict]]:
    """Summary and rows of a run, beside what bench/results/NAME.json has of parts that were not run now.

    part: row -> the part it belongs to. Each row says by which command it was made, when, and on which processor.
    """
    made = {"command": command, "date": date.today().isoformat(), "cpu": machine()["cpu"]}
    rows = [row | made for row in rows]
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return summary, rows
    old = json.loads(path.read_text())
    new = {part(row) for row in rows}
    kept = [{"command": old["command"]} | row for row in old["rows"] if part(row) not in new]
    return old["summary"] | summary, rows + kept


def record(
    name: str, summary: dict[str, float], rows: list[dict], command: str, host: Path | None = None, notes: str = ""
) -> Path:
    """Write bench/results/NAME.json and print the summary."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {
        "command": command,
        "machine": machine(),
        "versions": versions(host),
        "date": date.today().isoformat(),
        **({"notes": notes} if notes else {}),
        "summary": summary,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    width = max(map(len, summary), default=0)
    for key, value in summary.items():
        print(f"{key:{width}}  {value:.3f}")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


# Trade-offs ----------------------------------------------------------------------------------------


def upper_edge(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (saving, dB) that no other one beats in both, by saving."""
    edge: list[tuple[float, float]] = []
    for saving, quality in sorted(points, reverse=True):
        if not edge or quality > edge[-1][1]:
            edge.append((saving, quality))
    return edge[::-1]


def at_saving(points: list[tuple[float, float]], wanted: float) -> float | None:
    """Quality at a saving, read off the upper edge between its points; None beyond its ends."""
    edge = upper_edge(points)
    if edge[0][0] >= wanted:  # everything saves more and is as good
        return edge[0][1]
    for (s0, q0), (s1, q1) in zip(edge, edge[1:], strict=False):
        if s0 <= wanted <= s1:
            return q0 + (q1 - q0) * (wanted - s0) / (s1 - s0)
    return None
