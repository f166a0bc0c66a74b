"""Train what a recipe says: a pack or a pruned UNet from a teacher.

    accelerate launch -m train train/configs/sd15-m2.toml --set network.teacher=my-finetune.safetensors

    python -m train fit my-finetune.safetensors my-pack.safetensors fitted.safetensors --prompts prompts.txt

The same command goes on where it stopped. Several processes start as accelerate is configured, `accelerate launch
--config_file train/fsdp2.yaml -m train`, several on a CPU with `torchrun --nproc-per-node 2 -m train` as well.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

try:
    from . import dry_run, fit, sharding
    from .recipe import load
    from .criterion import Classifier
    from .loop import train
except ModuleNotFoundError as lacking:
    if (lacking.name or "train").startswith("train"):
        raise
    raise SystemExit(
        f"training needs {lacking.name}, which this Python has not, and ComfyUI has no use for. `python bootstrap.py "
        "setup` in a checkout of asdm makes an environment with all it needs; the node Fit Pack needs none."
    ) from None


def main(classifier: Classifier | None = None, encoder: fit.Encoder | None = None) -> None:
    """classifier: see criterion.Criterion. encoder: of the checkpoints that a pack is fitted to (train/fit.py)."""
    if sys.argv[1:2] == ["fit"]:
        return fit.main(sys.argv[2:], encoder)
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a file of train/configs/, or one of your own")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, such as optimiser.lr=1e-4"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the run, what it trains and its memory, and train nothing"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    args = parser.parse_args()
    try:
        config = load(args.recipe, args.set)
        if args.dry_run:
            print(dry_run.report(config, int(os.environ.get("WORLD_SIZE", "1")), args.cpu))
            return
        accelerator, config = sharding.accelerator_of(config, args.cpu)
        product = train(config, accelerator, classifier=classifier)
        accelerator.print(f"wrote {product}")
    except (ValueError, FloatingPointError, OSError) as e:
        raise SystemExit(str(e)) from None
    except RuntimeError as e:
        if not lost(e):
            raise
        reason = str(e).strip().splitlines()[0]
        raise SystemExit(
            f"another process of the run was lost ({reason:.200}); the same command goes on from the last checkpoint"
        ) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Whether this is how torch says that another process does not answer any more."""
    if isinstance(error, torch.distributed.DistError):
        return True
    said = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Timed out waiting")
    return any(words in str(error) for words in said)


if __name__ == "__main__":
    main()
