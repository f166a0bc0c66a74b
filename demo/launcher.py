"""Runs ComfyUI's main.py, and ends when the process that started it ends.

    python launcher.py HOST_FOLDER [arguments of main.py ...]

The starter keeps our standard input open and never writes to it. End of file therefore
means that the starter is gone, however it went: no server is left behind on any system.
"""

import os
import runpy
import sys
import threading


def end_with_parent():
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    host = sys.argv[1]
    threading.Thread(target=end_with_parent, daemon=True).start()
    # As if main.py had been started itself. Our own folder must not stay on the path.
    sys.path[0] = host
    sys.argv = [os.path.join(host, "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
