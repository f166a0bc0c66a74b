"""make serve: ComfyUI with this pack for a person, until Ctrl-C.

Workflows, models and images of the person lie in .host/ of this folder. The models of the ComfyUI
that is run (COMFYUI_PATH, or the one around the pack) are offered as well.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

import bootstrap
from demo.server import PACK, Server, ServerError, device_flags, model_folders

FOLDER = PACK / ".host"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8188, help="port of the web page, any free one if it is taken")
    options = parser.parse_args()
    try:
        host = bootstrap.host_path()
        print("serve: starting ComfyUI", flush=True)
        server = Server(host, FOLDER, flags=device_flags(), models=model_folders(host / "models"), port=options.port)
        with contextlib.suppress(KeyboardInterrupt), server:
            print(
                f"serve: ComfyUI with asdm is at {server.url}\n"
                f"serve: workflows are under Templates, asdm; models go into {FOLDER / 'models'}\n"
                f"serve: the log is {server.log_file}; Ctrl-C stops it",
                flush=True,
            )
            while server.alive:
                time.sleep(0.5)
            print(f"serve: ComfyUI ended by itself; the end of its log:\n{server.log()}", file=sys.stderr)
            return 1
    except (ServerError, bootstrap.SetupError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    print("\nserve: stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
