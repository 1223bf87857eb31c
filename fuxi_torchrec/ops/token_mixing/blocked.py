"""Token mixing, exact and causal, in length groups and strips of rows: no map is kept, backward makes it again.

Shapes: T tokens, P padded slots, H heads, d value size per head, E = H * d, C channels; in a length group G users, n
positions, R rows of a strip, W its columns (all j up to the strip's last row).
"""

from typing import Dict, List, Sequence

import torch
from torch import Tensor

from fuxi_torchrec.ops import jagged
from fuxi_torchrec.ops.jagged import LengthGroup, Slots
from fuxi_torchrec.ops.token_mixing.time_gaps import StripGaps
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS, Channel
from fuxi_torchrec.ops.token_mixing.toeplitz import lag_strip, sum_diagonals


def blocked_forward(
    y_PHCd: Tensor, v_PE: Tensor, slots: Slots, channels: Sequence[Channel], gaps: Dict[int, StripGaps]
) -> None:
    """Writes the mixed rows of every padded slot; gaps: of the temporal channels, by their number."""
    for c, (name, params) in enumerate(channels):
        y_PHd = y_PHCd[:, :, c]
        if name == "zero":
            y_PHd.zero_()
        elif name == "positional":
            _positional_forward(y_PHd, v_PE, slots, params[0])
        else:
            _temporal_forward(y_PHd, v_PE, gaps[c], name, params)


def blocked_backward(
    grad_v_PE: Tensor,
    grad_PHCd: Tensor,
    v_PE: Tensor,
    slots: Slots,
    channels: Sequence[Channel],
    gaps: Dict[int, StripGaps],
) -> List[Tensor]:
    """Adds v's gradient to grad_v and returns the parameters'; grad is zero in slots past a user's end."""
    grad_params: List[Tensor] = []
    for c, (name, params) in enumerate(channels):
        grad_PE = grad_PHCd[:, :, c].reshape(v_PE.shape)
        if name == "positional":
            grad_params.append(_positional_backward(grad_v_PE, grad_PE, v_PE, slots, params[0]))
        elif name != "zero":
            grad_params += _temporal_backward(grad_v_PE, grad_PE, v_PE, gaps[c], name, params)
    return grad_params


def _group_slots(x_P: Tensor, group: LengthGroup) -> Tensor:
    """The group's part of x as [n, G, ...], a view."""
    return x_P[group.start : group.stop].view(group.length, group.users, *x_P.shape[1:])






def _positional_forward(y_PHd: Tensor, v_PE: Tensor, slots: Slots, weight_N: Tensor) -> None:
    H, d = y_PHd.shape[1:]
    for first, groups in slots.strips():
        lag_RW = lag_strip(weight_N, first, min(jagged.STRIP_ROWS, slots.max_length - first), v_PE.dtype)
        for group in groups:
            last = min(first + jagged.STRIP_ROWS, group.length)
            v_WGE = _group_slots(v_PE, group)[:last]
            y_RGE = lag_RW[: last - first, :last] @ v_WGE.reshape(last, -1)
            y_nGHd = y_PHd[group.start : group.stop].unflatten(0, (group.length, group.users))
            y_nGHd[first:last] = y_RGE.view(last - first, group.users, H, d)


def _positional_backward(grad_v_PE: Tensor, grad_PE: Tensor, v_PE: Tensor, slots: Slots, weight_N: Tensor) -> Tensor:
    grad_weight_N = torch.zeros_like(weight_N)
    for first, groups in slots.strips():
        rows = min(jagged.STRIP_ROWS, slots.max_length - first)
        lag_RW = lag_strip(weight_N, first, rows, v_PE.dtype)
        grad_RW = weight_N.new_zeros(rows, first + rows)
        for group in groups:
            last = min(first + jagged.STRIP_ROWS, group.length)
            grad_RX = _group_slots(grad_PE, group)[first:last].reshape(last - first, -1)
            v_WX = _group_slots(v_PE, group)[:last].reshape(last, -1)
            grad_v_WX = _group_slots(grad_v_PE, group)[:last].view(last, -1)
            grad_v_WX.addmm_(lag_RW[: last - first, :last].T, grad_RX)
            grad_RW[: last - first, :last] += grad_RX @ v_WX.T
        sum_diagonals(grad_weight_N, grad_RW.tril_(first), first)
    return grad_weight_N


def _temporal_forward(y_PHd: Tensor, v_PE: Tensor, gaps: StripGaps, name: str, params: Sequence[Tensor]) -> None:
    H, d = y_PHd.shape[1:]
    time_map = TIME_MAPS[name]
    factor = time_map.factor(params)
    for first, groups in gaps.slots.strips():
        for group in groups:
            last = min(first + jagged.STRIP_ROWS, group.length)
            feature_GRW = gaps.strip(group, first)
            map_GRW = time_map.factored(feature_GRW, params).to(v_PE.dtype)
            map_GRW[:, :, first:].tril_()
            y_GRE = torch.bmm(map_GRW, _group_slots(v_PE, group)[:last].transpose(0, 1))
            if factor is not None:
                y_GRE *= factor
            y_nGHd = y_PHd[group.start : group.stop].unflatten(0, (group.length, group.users))
            y_nGHd[first:last] = y_GRE.view(group.users, last - first, H, d).transpose(0, 1)


def _temporal_backward(
    grad_v_PE: Tensor, grad_PE: Tensor, v_PE: Tensor, gaps: StripGaps, name: str, params: Sequence[Tensor]
) -> List[Tensor]:
    time_map = TIME_MAPS[name]
    factor = time_map.factor(params)
    grad_params = [torch.zeros_like(p) for p in params]
    for first, groups in gaps.slots.strips():
        for group in groups:
            last = min(first + jagged.STRIP_ROWS, group.length)
            feature_GRW = gaps.strip(group, first)
            map_GRW = time_map.factored(feature_GRW, params)
            map_GRW[:, :, first:].tril_()
            grad_GRE = _group_slots(grad_PE, group)[first:last].transpose(0, 1)
            v_GWE = _group_slots(v_PE, group)[:last].transpose(0, 1)
            grad_GRW = torch.bmm(grad_GRE, v_GWE.mT).to(map_GRW.dtype)
            grad_GRW[:, :, first:].tril_()
            scaled_GRE = grad_GRE if factor is None else (grad_GRE * factor).to(v_PE.dtype)
            grad_v_GWE = torch.bmm(map_GRW.to(v_PE.dtype).mT, scaled_GRE)
            _group_slots(grad_v_PE, group)[:last] += grad_v_GWE.transpose(0, 1)
            for total, part in zip(grad_params, time_map.backward(feature_GRW, map_GRW, grad_GRW, *params)):
                total += part.view_as(total)
    return grad_params
