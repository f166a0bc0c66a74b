"""What the pack adds to the start of ComfyUI: importing it, listing its nodes and asking each for its inputs.

    python bootstrap.py bench NAME=start [ARGS="--rounds 5"]

Each round is a fresh process that has imported the host's own nodes, as a starting ComfyUI has. The bound is 0.5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time

from bench._common import PACK, ROOT, pack_module, record, start_host

BOUND = 0.5


def once() -> dict[str, float]:
    """Seconds of one start, on the wall and of CPU."""
    start_host()
    import comfy_api.latest  # noqa: F401
    import folder_paths
    import nodes  # noqa: F401  the host's
    import server

    folder_paths.set_user_directory(tempfile.gettempdir())  # which the server would make in the person's ComfyUI
    loop = asyncio.new_event_loop()
    server.PromptServer(loop)  # which an extension registers replaced nodes with

    async def load():
        extension = await sys.modules[PACK].comfy_entrypoint()
        await extension.on_load()
        return [node.INPUT_TYPES() for node in await extension.get_node_list()]

    wall, cpu = time.perf_counter(), time.process_time()
    pack_module("nodes")
    count = len(loop.run_until_complete(load()))
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "nodes": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--notes", default="", help="kept in the record: what else the machine was doing")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once()))
        return
    rows = []
    for _ in range(args.rounds):
        done = subprocess.run(
            [sys.executable, "-m", "bench.start", "--once"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    # The quickest round: whatever else the machine does only ever adds.
    summary = {key: min(row[key] for row in rows) for key in ("seconds", "cpu_seconds")}
    record(
        "start",
        summary | {"bound_seconds": BOUND},
        rows,
        "python bootstrap.py bench NAME=start",
        start_host(),
        args.notes,
    )
    if summary["seconds"] > BOUND:
        raise SystemExit(f"the pack adds {summary['seconds']:.2f} s to the start, more than {BOUND} s")


if __name__ == "__main__":
    main()
