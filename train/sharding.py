"""Several processes as accelerate is configured (`accelerate config`, `accelerate launch`): copies of the student in
each (DDP), or weights, gradients, the optimiser's state and the average shared out among them (FSDP2).

With FSDP2 every process holds a slice of each tensor; a layer is put together while it computes. Names stay, so
everything else of the loop works on the slices as on whole tensors. The frozen teacher, which is in half precision, is
held whole by each. Weights are float32 and the passes in run.precision (autocast), as with DDP: it is the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import Config

LAYERS = ["ResnetBlock2D", "BasicTransformerBlock"]  # what is put together at once, where nothing else is configured
# What accelerate launch sets of its configuration, and where a recipe says the same.
ENVIRONMENT = {
    "ACCELERATE_DYNAMO_BACKEND": ("no", "dynamo_config", "--set run.compile=inductor"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient_accumulation_steps", "run.batch and run.micro_batch"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed", "FSDP with fsdp_version: 2"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM", "FSDP with fsdp_version: 2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "parallelism_config", "FSDP with fsdp_version: 2"),
}


def accelerator_of(config: Config, cpu: bool) -> tuple[Accelerator, Config]:
    """The processes as accelerate is configured, and the recipe with run.shard as that says.

    Raises ValueError for a configuration that would be followed in part alone.
    """
    for name, (plain, said, instead) in ENVIRONMENT.items():
        if os.environ.get(name, plain).lower() not in (plain, ""):
            raise ValueError(f"accelerate's configuration has {said}, which this loop does not follow: {instead}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.run.precision):
        raise ValueError(
            f"accelerate's configuration says mixed_precision: {precision}, the recipe run.precision = "
            f"{config.run.precision}; make them the same, --set run.precision={precision}"
        )
    plugin = None
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()
        _check(plugin)
        checkpoints = config.run.checkpoint_gradients or bool(plugin.activation_checkpointing)
        if config.run.offload:
            print("run.offload is off: what it keeps on the CPU is shared out among the processes", flush=True)
        config = replace(config, run=replace(config.run, shard=True, offload=False, checkpoint_gradients=checkpoints))
    accelerator = Accelerator(cpu=cpu, mixed_precision=config.run.precision, fsdp_plugin=plugin)
    if config.run.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("run.precision: fp16 is for graphics cards; on a CPU take bf16 or no")
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # As accelerate does it for cards; processors take the same way through it.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator, config


def _check(plugin: FullyShardedDataParallelPlugin) -> None:
    for wrong, said, instead in (
        (plugin.fsdp_version != 2, f"fsdp_version: {plugin.fsdp_version}", "fsdp_version: 2"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params", "more processes, or run.offload"),
        (bool(plugin.ignored_modules), "fsdp_ignored_modules", "leave it out"),
        (plugin.activation_checkpointing_offload, "fsdp_activation_checkpointing_offload", "leave it out"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading", "false: each process reads the files"),
    ):
        if wrong:
            raise ValueError(f"accelerate's configuration has {said}, which this loop does not follow: {instead}")


def shard(unet: nn.Module, accelerator: Accelerator) -> None:
    """Keep only this process's slices of a diffusers UNet, in place, in the layers that accelerate's configuration
    names. Raises ValueError where there is one process alone, or no layer of such a name.
    """
    if not torch.distributed.is_initialized():
        raise ValueError(
            "run.shard shares a network out among several processes, and there is one: start with accelerate launch "
            "--multi_gpu, or torchrun, or leave it out"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=LAYERS
    )
    mesh = init_device_mesh(accelerator.device.type, (torch.distributed.get_world_size(),))
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, unet)
    for module in list(unet.modules())[:0:-1]:  # what lies within a layer comes before it
        if chosen and chosen(module):
            fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(unet, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)


def synchronise(unet: nn.Module, whether: bool) -> None:
    """Whether the next backward pass shares its gradients out."""
    assert isinstance(unet, FSDPModule)
    unet.set_requires_gradient_sync(whether)


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sliced as another is."""
    return (
        distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
        if isinstance(model, DTensor)
        else tensor
    )


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors put together from their slices. Every process must call it; only those that `keep` get them."""
    found = {}
    for key, tensor in tensors.items():
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[key] = whole
    return found


@contextmanager
def put_together(unet: nn.Module) -> Iterator[None]:
    """A UNet with whole parameters, to be read. Every process must enter it."""
    sharded = [m for m in unet.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def let_gloo_end(accelerator: Accelerator) -> None:
    """Give the threads of gloo a second of the interpreter after the last thing that the processes did together.

    Such a thread takes the lock of its group and then waits for the interpreter, to let go of what it has done; if the
    group is freed in that moment, as it is with the network that DistributedDataParallel wraps, the interpreter waits
    for the lock, and the process never ends (torch 2.11).
    """
    if accelerator.num_processes > 1:
        time.sleep(1)
