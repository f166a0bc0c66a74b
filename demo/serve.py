"""make serve: ComfyUI with this pack for a person, until Ctrl-C.

Workflows, models and images of the person lie in .host/ of this folder. The models of the ComfyUI
that is run (COMFYUI_PATH, or the one around the pack) are offered as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
import webbrowser
from pathlib import Path

import bootstrap
from demo.server import PACK, WINDOWS, Server, ServerError, device_flags, model_folders

FOLDER = PACK / ".host"
PICTURES = PACK / "workflows" / "pictures"  # that workflows load
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in the host's log
PAUSE = 3  # seconds between two words about the start


def say(text: str) -> None:
    print(f"serve: {text}", flush=True)


class Starting:
    """Tells every few seconds what the host is doing while it starts."""

    def __init__(self):
        self._begun = self._said = time.monotonic()

    def __call__(self, server: Server) -> None:
        now = time.monotonic()
        if now - self._said >= PAUSE:
            self._said = now
            doing = COLOURS.sub("", server.log(1)).strip() or "loading torch"
            say(f"still starting, {now - self._begun:.0f} s: {doing[:100]}")


def offer_pictures(folder: Path) -> None:
    """Put the pictures that our workflows load into an input folder; what lies there stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES.glob("*.png"):
        if not (folder / picture.name).exists():
            shutil.copyfile(picture, folder / picture.name)


def open_page(url: str) -> str:
    """Open a page in the person's browser; returns why it could not, empty where it could."""
    shown = WINDOWS or sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    if not shown:
        return "this machine has no display"
    try:
        return "" if webbrowser.open(url) else "no browser was found"
    except webbrowser.Error as error:
        return str(error)


def serve(port: int, folder: Path, with_browser: bool) -> int:
    """Run ComfyUI until it ends; returns the exit status. Ctrl-C is the caller's."""
    host = bootstrap.host_path()
    say(f"starting ComfyUI from {host}")
    offer_pictures(folder / "input")
    models = model_folders(host / "models")
    with Server(host, folder, flags=device_flags(), models=models, port=port, waiting=Starting()) as server:
        if port not in (0, server.port):
            say(f"port {port} is taken by another program, so it is {server.port} this time")
        say(f"ComfyUI with asdm is at {server.url}")
        why = open_page(server.url) if with_browser else ""
        if why:
            say(f"open that page yourself: {why}")
        say(f"workflows are under Templates, asdm; models go into {folder / 'models'}")
        say(f"the log is {server.log_file}; Ctrl-C stops it")
        while server.alive:
            time.sleep(0.5)
        print(f"serve: ComfyUI ended by itself; the end of its log:\n{server.log()}", file=sys.stderr)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8188, help="port of the web page, any free one if it is taken")
    parser.add_argument("--no-open", action="store_true", help="do not open the page in a browser")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for models, images and settings")
    options = parser.parse_args()
    try:
        return serve(options.port, options.folder, not options.no_open)
    except (ServerError, bootstrap.SetupError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nserve: stopped", flush=True)
        return 0


if __name__ == "__main__":
    sys.exit(main())
