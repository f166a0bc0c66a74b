"""A Chromium to drive the front end with: the one there is, or the one that the system's packages offer.

    python -m demo.browser

`make test` runs this first. Playwright could download a Chromium, but not from a package registry.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

VARIABLE = "ASDM_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
WANTED = (
    f"The browser tests need Chromium, Chrome or Edge. Install one of them, or name its program in {VARIABLE}. "
    "On Debian: apt-get install chromium"
)


def find_browser() -> str | None:
    """The program of a Chromium, Chrome or Edge; None if there is none. Raises FileNotFoundError if the variable names
    nothing.
    """
    if named := os.environ.get(VARIABLE):
        if found := shutil.which(named):
            return found
        raise FileNotFoundError(f"{VARIABLE} names {named}, which is no program")
    return next((found for name in (*NAMES, *PLACES) if (found := shutil.which(name))), None)


def can_install() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get") is not None


def install_browser(log: Path) -> None:
    """Install Chromium from the system's packages. Raises subprocess.CalledProcessError."""
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with open(log, "wb") as out:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(
                command, env=quiet, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=True
            )


def main() -> None:
    """Have a browser if that is possible. Without one the other tests still run, and those that need it fail."""
    import bootstrap

    if find_browser():
        return
    if not can_install():
        print(WANTED, file=sys.stderr)
        return
    log = bootstrap.logs() / "chromium.log"
    print("installing Chromium for the browser tests, once", flush=True)
    try:
        install_browser(log)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(error.cmd)} failed; its output is in {log}\n{WANTED}", file=sys.stderr)


if __name__ == "__main__":
    main()
