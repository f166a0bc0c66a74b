"""Calls one function of a script inside a host process; started by the fixture `run_in_host`.

    python runner.py HOST_FOLDER CALL.json RESULT.json [arguments of ComfyUI ...]

The script can import what the host has (`comfy.sd`, `nodes`, ...) and `in_host` for the pack. The
pack's folder is never on sys.path: its `nodes/` would hide the host's `nodes.py`.
"""

import importlib.util
import json
import sys
from pathlib import Path


def main():
    host, call_file, result_file = sys.argv[1:4]
    here = sys.path[0]
    sys.path[:1] = [host]
    sys.path.append(here)
    sys.argv = ["main.py", *sys.argv[4:]]

    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv, now

    call = json.loads(Path(call_file).read_text())
    spec = importlib.util.spec_from_file_location(Path(call["script"]).stem, call["script"])
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    result = getattr(script, call["function"])(*call["args"], **call["kwargs"])
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
