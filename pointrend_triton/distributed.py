"""One training run in many processes, one per GPU, as `torchrun` starts them.

    torchrun --nproc_per_node=4 train.py CONFIG

Every process is a rank of one group. What is synchronised: gradients (DistributedDataParallel),
BatchNorm statistics (`sync_batchnorm`), the counts of an evaluation (`SegmentationMetrics`), and
the small things that the functions here exchange. Every function is also right without a group.

Values on the host go over gloo, beside NCCL for those on the GPU, so that they never wait for the
GPU. gloo takes the network interface of the host's name; GLOO_SOCKET_IFNAME names another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pointrend_triton.inference import pick_device

T = TypeVar("T")

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all: its rank from 0, their number, and the device that is its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins the group that torchrun's environment describes; leaves it when all ranks are done.

    Without RANK, WORLD_SIZE and LOCAL_RANK it is a world of one, with no group. On an error a rank
    does not wait for the others: it ends with its own message, and torchrun ends them.

    Args:
        device: "auto", "cuda" or "cpu"; in a world of one also "cuda:1" and the like.

    Raises:
        ValueError: only some of the variables are set, one is not a number, there is no GPU for
            this rank, or `device` names one GPU for all ranks.
    """
    if not any(name in os.environ for name in OWN):
        yield World(0, 1, pick_device(device))
        return
    missing = [name for name in (*OWN, *ADDRESS) if name not in os.environ]
    if missing:
        present = [name for name in OWN if name in os.environ]
        raise ValueError(
            f"the environment has {', '.join(present)}, but not {', '.join(missing)}: "
            "start with torchrun, which sets them all, or unset them for a single process"
        )
    rank, size, local_rank = (_number(name) for name in OWN)
    world = World(rank, size, _own_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # NCCL and kernel launches go to the current device
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size)
    yield world
    agree(False)  # a rank that exits ends the others, which may still be writing
    dist.destroy_process_group()


def agree(flag: bool) -> bool:
    """Whether `flag` is true on any rank: the same answer on all, which wait for each other.

    A host-to-host exchange that does not wait for the GPU, so it may be asked in every iteration.
    """
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def gather(value: T) -> list[T]:
    """The values of all ranks, by rank; small ones that pickle, on the host."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor of one shape, on its device."""
    if not dist.is_initialized():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sync_batchnorm(model: nn.Module, world: World) -> None:
    """Lets every BatchNorm2d below `model` normalise by the joined batch of all ranks, in training.

    Names, values and settings stay, and so do checkpoints. It comes before
    DistributedDataParallel and torch.compile.
    """
    if world.size == 1:
        return
    if world.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # has no state of its own


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the joined batch of all ranks; PyTorch's own SyncBatchNorm wants a GPU.

    Images and map sizes may differ between ranks: all values count the same. Every rank has to
    take part in the forward and in the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        output, mean, var = _NormOfAll.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return output


class _NormOfAll(torch.autograd.Function):
    """input [N,C,H,W], weight and bias [C] -> output, mean [C], unbiased variance [C]."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, dtype = input.shape[1], weight.dtype
        own_var, own_mean = torch.var_mean(input.to(dtype), (0, 2, 3), correction=0)
        own_mean, own_var = own_mean.double(), own_var.double()
        own_count = own_mean.new_tensor([input.numel() // channels])
        # in fp64, so that the difference of squares below is as good as a second pass
        sums = torch.cat([own_mean, own_var + own_mean**2, own_mean.new_ones(1)]) * own_count
        dist.all_reduce(sums)
        count = sums[-1]
        mean = sums[:channels] / count
        var = (sums[channels:-1] / count - mean**2).clamp(min=0)
        scale = (var + eps).rsqrt().to(dtype)
        unbiased = (var * count / (count - 1)).to(dtype)
        mean, var = mean.to(dtype), var.to(dtype)
        ctx.save_for_backward(input, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(input, mean, var, weight, bias, eps=eps), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        input, weight, mean, scale, count = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        normal = (input - _wide(mean)) * _wide(scale)
        # those of the parameters stay this rank's own: DistributedDataParallel joins them
        grad_bias, grad_weight = grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))
        sums = torch.stack([grad_bias, grad_weight]).double()
        dist.all_reduce(sums)
        mean_grad, mean_product = (sums / count).to(weight.dtype)
        centred = grad - _wide(mean_grad) - normal * _wide(mean_product)
        return (centred * _wide(weight * scale)).to(input.dtype), grad_weight, grad_bias, None


def _wide(channels: Tensor) -> Tensor:
    """[C] -> [1,C,1,1]."""
    return channels.view(1, -1, 1, 1)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(f"the environment's {name} must be a whole number, not {text!r}")
    return int(text)


def _own_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank: the GPU whose number on this machine is the rank's, or the CPU."""
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(
            f"device is {name!r}, but under torchrun every rank has a GPU of its own: "
            "it must be auto, cuda or cpu (CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"local rank {local_rank} has no GPU, as this machine has {gpus}: "
            "--nproc_per_node must not be more than that, or device must be cpu"
        )
    return torch.device("cuda", local_rank)
