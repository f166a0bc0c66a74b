"""make demo: A (the checkpoint) against B (the same, made faster) in a real headless ComfyUI.

Writes output/demo/: compare.png, headline.png, every image with its workflow in it, and report.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import bootstrap
from asdm_core.tensor_file import BadFile
from demo.job import DemoError, Job, find_job, networks, node_id
from demo.report import clear_results, image_name, summary, write_results
from demo.server import PACK, Client, PromptError, Server, ServerError, device_flags
from demo.timing import TimedRun, timed_run

OUTPUT = PACK / "output" / "demo"
WARM_UP_STEPS = 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="an SD1.5 .safetensors file: a path, or a name in ComfyUI's models")
    parser.add_argument(
        "--pack",
        help="the pack for B: a path, or a name in ComfyUI's models/asdm_packs; without one "
        "B is a checkpoint of yours with Speed Up, which needs no weights",
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps must be 3 or more, the first step is not timed; got {options.steps}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        host = bootstrap.host_path()
        job = find_job(options.checkpoint, options.pack, options.steps, [PACK / ".host" / "models", host / "models"])
        report = run(job, host, options.output)
    except (DemoError, BadFile, PromptError, ServerError, bootstrap.SetupError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped, and so is its ComfyUI", file=sys.stderr)
        return 1
    print(summary(report, options.output))
    return 0


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def run(job: Job, host: Path, output: Path) -> dict:
    """Run the whole comparison; writes the output folder and returns the report."""
    architectures = networks(job)
    others = ", ".join(f"{side.upper()} with {job.addition(side)}" for side in job.variants)
    say(f"A is {job.checkpoint.name}; the same {others}")
    say(f"{len(job.prompts)} prompts, {job.size} x {job.size}, {job.steps} steps, CFG {job.cfg:g}")
    clear_results(output)
    with tempfile.TemporaryDirectory(prefix="asdm-demo-") as base:
        started = time.monotonic()
        say("starting ComfyUI without a window")
        with Server(host, Path(base), flags=["--disable-api-nodes", *device_flags()], models=job.models) as server:
            client = Client(server.url)
            check(client, job)
            system = client.get("/system_stats")
            say(
                f"ComfyUI {system['system']['comfyui_version']} answers after {time.monotonic() - started:.0f} s; "
                "warming up"
            )
            first, *_ = [timed(client, job, side, 0, WARM_UP_STEPS) for side in job.sides]
            pictures = len(job.sides) * len(job.prompts)
            say(f"sampling {pictures} pictures takes up to {duration(pictures * job.steps * first.step_seconds[-1])}")
            runs: dict[str, list[TimedRun]] = {side: [] for side in job.sides}
            for index, prompt in enumerate(job.prompts):
                # All in turn, so that whatever else the machine does hits them alike. The times of one picture say
                # little on a busy machine; the medians at the end are of all pictures.
                for side in job.sides:
                    runs[side].append(run_one(client, job, side, index, output))
                say(f"{index + 1}/{len(job.prompts)}  {prompt}")
    say("ComfyUI is stopped; comparing")
    return write_results(job, architectures, runs, system, output)


def check(client: Client, job: Job) -> None:
    """Refuse early, and in words, what the host would refuse late."""
    known = client.object_info()
    missing = sorted({node["class_type"] for side in job.sides for node in job.graph(side, 0).values()} - known.keys())
    if missing:
        raise DemoError(f"this ComfyUI lacks the nodes {', '.join(missing)}; the pack did not load in it")
    for node, name, file in ((job.loader, "ckpt_name", job.checkpoint), ("ASDMApplyPack", "pack_name", job.pack)):
        if file and file.name not in client.choices(node, name):
            raise DemoError(f"ComfyUI does not offer {file} in {node}: the file is not of the kind this node loads")


def timed(client: Client, job: Job, side: str, index: int, steps: int | None = None) -> TimedRun:
    """One image of one side."""
    graph = job.graph(side, index, steps)
    return timed_run(client.url, graph, node_id(graph, "Sampler"))


def run_one(client: Client, job: Job, side: str, index: int, output: Path) -> TimedRun:
    """One image of one side, saved as the host wrote it, metadata included."""
    done = timed(client, job, side, index)
    png = client.fetch(done.outputs[node_id(job.graph(side, index), "Save")]["images"][0])
    (output / image_name(side, index)).write_bytes(png)
    return done


if __name__ == "__main__":
    sys.exit(main())
