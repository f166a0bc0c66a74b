"""Weights, gradients, the optimiser's state and the average shared out among the processes (fully sharded data
parallel, FSDP2).

Every process holds a slice of each tensor; a layer is put together while it computes. Names stay, so everything else of
the loop works on the slices as on whole tensors. The frozen teacher, which is in half precision, is held whole by each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(unet: nn.Module, device: torch.device) -> None:
    """Keep only this process's slices of a diffusers UNet, in place. Raises ValueError where there is one process
    alone.
    """
    if not torch.distributed.is_initialized():
        raise ValueError(
            "run.shard shares a network out among several processes, and there is one: start with accelerate launch "
            "--multi_gpu, or torchrun, or leave it out"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in list(unet.modules()):
        if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)


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
