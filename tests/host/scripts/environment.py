"""What a script finds inside a host process."""

import sys

import in_host


def main(*args, **kwargs):
    import comfy.cli_args
    import comfy.model_management
    import nodes

    return {
        "args": args,
        "kwargs": kwargs,
        "device": str(comfy.model_management.get_torch_device()),
        "pytorch_attention": comfy.cli_args.args.use_pytorch_cross_attention,
        "nodes_file": nodes.__file__,
        "pack_on_path": str(in_host.PACK) in sys.path,
        "node_ids": sorted(in_host.node_classes()),
    }


def fail():
    raise ValueError("on purpose")
