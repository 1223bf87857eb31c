"""All ranks' rows on every rank, with gradients that find their way back.

Shape suffixes: P rows of all ranks, M the most rows of a rank, W ranks, D width.
"""

from typing import Any, List, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(rows: Tensor, counts: List[int]) -> Tensor:
    """Gathers every rank's rows [counts[r], D], laid one behind the other in the order of ranks, [Σ counts, D].

    A collective, forward and backward: a row's gradient is the sum of those that all ranks give it.

    Args:
        rows: this rank's; any float type.
        counts: how many rows each rank has, the same list on every rank.
    """
    return _GatherRows.apply(rows, counts)


def gather_values(values: Tensor, counts: List[int]) -> Tensor:
    """Gathers every rank's values [counts[r]] of any type, without a gradient, in the order of ranks, [Σ counts]."""
    return _gather(values.detach()[:, None], counts)[:, 0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: List[int]) -> Tensor:
        ctx.counts = counts
        return _gather(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> Tuple[Tensor, None]:
        most, rank = max(ctx.counts), dist.get_rank()
        padded_WMD = grad_PD.new_zeros(len(ctx.counts), most, grad_PD.shape[1])
        for to, part in zip(padded_WMD, grad_PD.split(ctx.counts)):
            to[: len(part)] = part
        mine_MD = grad_PD.new_empty(most, grad_PD.shape[1])
        dist.reduce_scatter_tensor(mine_MD, padded_WMD.flatten(0, 1))
        return mine_MD[: ctx.counts[rank]], None


def _gather(rows: Tensor, counts: List[int]) -> Tensor:
    """One all-gather of equally long blocks, which every backend has; what pads the shorter ones is cut off."""
    most = max(counts)
    mine_MD = rows
    if len(rows) < most:
        mine_MD = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
    blocks = rows.new_empty(len(counts) * most, rows.shape[1])
    dist.all_gather_into_tensor(blocks, mine_MD.contiguous())
    if min(counts) == most:
        return blocks
    return torch.cat([block[:count] for block, count in zip(blocks.split(most), counts)])
