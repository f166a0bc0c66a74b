"""Calls one function of a script inside a host process.

    python runner.py HOST_FOLDER CALL.json RESULT.json [arguments of ComfyUI ...]
    python runner.py HOST_FOLDER - [arguments of ComfyUI ...]

The second form imports ComfyUI, and then each line it reads, {"call": ..., "result": ..., "base": ..., "output": ...,
"status": ...} (files, the base directory, files for all that is printed and for the status it ended with), is done by a
fork of it: a process that finds ComfyUI imported and nothing of the calls before. It answers "pid " and the number of
the process. It needs a system that can fork.

The script can import what the host has (`comfy.sd`, `nodes`, ...) and `in_host` for the pack. The
pack's folder is never on sys.path: its `nodes/` would hide the host's `nodes.py`.
"""

import gc
import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path


def import_comfyui(host, arguments):
    here = sys.path[0]
    sys.path[:1] = [host]
    sys.path.append(here)
    sys.argv = ["main.py", *arguments]

    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv, now


def play(call_file, result_file):
    call = json.loads(Path(call_file).read_text())
    spec = importlib.util.spec_from_file_location(Path(call["script"]).stem, call["script"])
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    result = getattr(script, call["function"])(*call["args"], **call["kwargs"])
    Path(result_file).write_text(json.dumps(result))


def answer_calls():
    import comfy.cli_args
    import comfy.sd  # noqa: F401  with it most of the host
    import folder_paths
    import nodes  # noqa: F401
    import pytest  # noqa: F401  for inside.py

    sys.path.append(str(Path(__file__).with_name("scripts")))
    import small  # noqa: F401  with it the pack

    gc.collect()
    gc.freeze()  # or a collection in a fork would write to, and so copy, all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        if pid := os.fork():
            print("pid", pid, flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            part = Path(request["status"] + ".part")
            part.write_text(str(status))
            part.replace(request["status"])
            continue
        status = 1
        try:
            with open(request["output"], "wb") as output, open(os.devnull) as nothing:
                for stream, number in ((nothing, 0), (output, 1), (output, 2)):
                    os.dup2(stream.fileno(), number)
            os.chdir(request["base"])
            comfy.cli_args.args.base_directory = request["base"]
            importlib.reload(folder_paths)  # in place: it works its folders out as it is imported
            play(request["call"], request["result"])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)  # what the parent registered to be done at its end is the parent's


def main():
    host, call_file, *arguments = sys.argv[1:]
    if call_file == "-":
        import_comfyui(host, arguments)
        answer_calls()
    else:
        import_comfyui(host, arguments[1:])
        play(call_file, arguments[0])


if __name__ == "__main__":
    main()
