"""Several processes (torchrun) that train one network, each with its share of every batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import control_group, rank, world


def broadcast_parameters(*modules: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers."""
    if world() > 1:
        for module in modules:
            for x in module.state_dict().values():
                dist.broadcast(x, 0, group=None if x.is_cuda else control_group())


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Between backward and step: the mean over the ranks, whose shares of a batch are equal.

    By hand, where DistributedDataParallel fights with phases, second forwards and autograd.grad.
    """
    if world() > 1:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        _average([p.grad for p in params if p.grad is not None])


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over the ranks."""
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def average_batch_norms(*modules: nn.Module) -> None:
    """The running statistics, gathered on each rank's share, become the same on all."""
    if world() > 1:
        kinds = nn.modules.batchnorm._BatchNorm
        norms = [m for module in modules for m in module.modules() if isinstance(m, kinds)]
        found = [x for m in norms for x in (m.running_mean, m.running_var) if x is not None]
        if found:
            _average(found)


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([x.detach().float().flatten() for x in tensors])
    dist.all_reduce(flat)
    flat /= world()
    parts = flat.split([x.numel() for x in tensors])
    for x, part in zip(tensors, parts):
        x.copy_(part.view_as(x))


class _Gather(torch.autograd.Function):
    """The batches of all ranks, one after the other. A gradient reaches the rank's own part, times
    the number of ranks: `average_gradients` takes a mean, and the whole loss has the sum."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return world() * grad[rank() * ctx.n : (rank() + 1) * ctx.n]


def gather(x):
    """A tensor (or a list of them) over the samples of all ranks."""
    if isinstance(x, list):
        return [gather(part) for part in x]
    return _Gather.apply(x) if torch.is_tensor(x) else x
