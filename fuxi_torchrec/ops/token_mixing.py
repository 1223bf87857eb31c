"""FuXi's query-free token mixing on jagged rows: y_c = A_c v with causal maps A_c that no query or key enters.

A channel is ("positional", (weight_N,)) with A[i,j] = weight_N[i - j], ("zero", ()), or (name, parameters) with a map
of `time_maps.TIME_MAPS`, A[i,j] = f(t_{i+1} - t_j). Source: FuXi-β (arXiv 2508.10615), section 3; docs/models.md, "FuXi
block".

Shapes: T tokens, B users, N padded length, H heads, d value size per head, E = H * d, C channels; in a length group G
users, n positions, R rows of a strip, W its columns (all j up to the strip's last row).
"""

from typing import List, Literal, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops import triton_mixing
from fuxi_torchrec.ops.jagged import JaggedLayout, LengthGroup, from_padded, slots_with_zero_padding, to_padded
from fuxi_torchrec.ops.time_maps import TIME_MAPS, TimeGaps, gap_feature

Channel = Tuple[str, Sequence[Tensor]]
Implementation = Literal["auto", "reference", "blocked", "triton"]

STRIP_ROWS = 100
"""Rows of the maps that exist at a time, per user; columns right of a strip are skipped (causality)."""


def mix_tokens(
    values_THd: Tensor,
    layout: JaggedLayout,
    channels: Sequence[Channel],
    gaps: Optional[TimeGaps] = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Mixes every user's rows causally, once per channel.

    Args:
        values_THd: v, [T, H, d]; every head uses the same maps.
        layout: where the users lie in T.
        channels: see the module's docstring. Parameters are float32 (or v's wider type) and so are the maps; the
            products are in v's type.
        gaps: the batch's time gaps; needed by temporal channels, shared by all blocks.
        implementation: "reference" is dense, padded and obvious; "blocked" is exact and causal in length groups and
            strips of rows, keeps no map and makes it again in backward; "triton" is a fused CUDA kernel
            (`triton_mixing`); "auto" is the fastest for the input on a CPU, and on CUDA "triton" wherever its kernels
            know the channels, which no GPU has timed yet.

    Returns:
        [T, H, C, d] in v's type: per head, the channels' outputs side by side, in the order given.
    """
    assert len(channels) > 0, "at least one channel"
    if implementation == "reference":
        return _mix_reference(values_THd, layout, channels, gaps)
    if implementation == "triton" or (implementation == "auto" and triton_mixing.can_mix(values_THd, channels)):
        return triton_mixing.triton_mix_tokens(values_THd, layout, channels, gaps)
    assert implementation in ("auto", "blocked"), implementation
    params = [p for _, ps in channels for p in ps]
    counts = tuple((name, len(ps)) for name, ps in channels)
    return _BlockedMixing.apply(values_THd, layout, gaps, counts, *params)


def _mix_reference(values_THd, layout, channels, gaps):
    v_BNHd = to_padded(values_THd, layout)
    N = layout.max_length
    i_N1, j_N = torch.arange(N, device=layout.device)[:, None], torch.arange(N, device=layout.device)
    outputs = []
    for name, params in channels:
        if name == "zero":
            map_BNN = values_THd.new_zeros(1, N, N)
        elif name == "positional":
            map_BNN = params[0][(i_N1 - j_N).clamp(min=0)][None]
        else:
            time_map = TIME_MAPS[name]
            past_BN, next_BN = to_padded(gaps.timestamps_T, layout), to_padded(gaps.next_timestamps_T, layout)
            ticks_BNN = next_BN[:, :, None] - past_BN[:, None, :]
            feature_BNN = gap_feature(ticks_BNN, gaps.time_unit, time_map.feature, params[0].dtype)
            map_BNN = time_map.evaluate(feature_BNN, *params)
        map_BNN = map_BNN.masked_fill(j_N > i_N1, 0).to(values_THd.dtype).expand(layout.num_users, N, N)
        outputs.append(from_padded(torch.einsum("bij,bjhd->bihd", map_BNN, v_BNHd), layout))
    return torch.stack(outputs, 2)


class _BlockedMixing(torch.autograd.Function):
    """Keeps v and the parameters; a map exists for one strip of one length group at a time."""

    @staticmethod
    def forward(ctx, values_THd, layout, gaps, counts, *params):
        ctx.layout, ctx.gaps, ctx.counts = layout, gaps, counts
        T, H, d = values_THd.shape
        channels = _with_params(counts, params)
        with torch.autocast(values_THd.device.type, enabled=False):
            v_PE = values_THd.reshape(T, H * d).index_select(0, layout.token_P)
            ctx.save_for_backward(v_PE, *params)
            y_PHCd = v_PE.new_empty(len(v_PE), H, len(counts), d)
            for c, (name, channel_params) in enumerate(channels):
                y_PHd = y_PHCd[:, :, c]
                if name == "zero":
                    y_PHd.zero_()
                elif name == "positional":
                    _positional_forward(y_PHd, v_PE, layout, channel_params[0])
                else:
                    _temporal_forward(y_PHd, v_PE, layout, gaps, name, channel_params)
            return y_PHCd.index_select(0, layout.slot_T)

    @staticmethod
    def backward(ctx, grad_THCd):
        v_PE, *params = ctx.saved_tensors
        layout = ctx.layout
        T, H, _, d = grad_THCd.shape
        grad_PHCd = slots_with_zero_padding(grad_THCd.contiguous(), layout)
        grad_v_PE = torch.zeros_like(v_PE)
        grad_params: List[Tensor] = []
        for c, (name, channel_params) in enumerate(_with_params(ctx.counts, params)):
            grad_PE = grad_PHCd[:, :, c].reshape(len(v_PE), H * d)
            if name == "positional":
                grad_params.append(_positional_backward(grad_v_PE, grad_PE, v_PE, layout, channel_params[0]))
            elif name != "zero":
                grad_params += _temporal_backward(grad_v_PE, grad_PE, v_PE, layout, ctx.gaps, name, channel_params)
        grad_THd = grad_v_PE.index_select(0, layout.slot_T).view(T, H, d)
        return (grad_THd, None, None, None, *grad_params)


def _with_params(counts, params) -> List[Channel]:
    channels, start = [], 0
    for name, count in counts:
        channels.append((name, params[start : start + count]))
        start += count
    return channels


def _strips(layout: JaggedLayout):
    """(first row, the groups that reach it), groups longest first."""
    for first in range(0, layout.max_length, STRIP_ROWS):
        yield first, [g for g in layout.groups if g.length > first]


def _group_slots(x_P: Tensor, group: LengthGroup) -> Tensor:
    """The group's part of x as [n, G, ...], a view."""
    return x_P[group.start : group.stop].view(group.length, group.users, *x_P.shape[1:])


def _lag_strip(weight_N: Tensor, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """[R, W] Toeplitz rows first .. first + rows - 1: weight[i - j], zero where j > i."""
    used = weight_N[: first + rows].to(dtype)
    reversed_padded = torch.cat([used.flip(0), used.new_zeros(rows)])
    return reversed_padded.unfold(0, first + rows, 1)[:rows].flip(0)


def _sum_diagonals(grad_weight_N: Tensor, grad_RW: Tensor, first: int) -> None:
    """Adds the gradient of `_lag_strip`'s weights."""
    R, W = grad_RW.shape
    skewed = grad_RW.new_zeros(R * (W + R - 1))
    skewed.as_strided((R, W), (W + R - 2, 1), R - 1).copy_(grad_RW)
    by_lag = skewed.view(R, W + R - 1).sum(0)[:W].flip(0)
    grad_weight_N[:W] += by_lag


def _positional_forward(y_PHd: Tensor, v_PE: Tensor, layout: JaggedLayout, weight_N: Tensor) -> None:
    H, d = y_PHd.shape[1:]
    for first, groups in _strips(layout):
        lag_RW = _lag_strip(weight_N, first, min(STRIP_ROWS, layout.max_length - first), v_PE.dtype)
        for group in groups:
            last = min(first + STRIP_ROWS, group.length)
            v_WGE = _group_slots(v_PE, group)[:last]
            y_RGE = lag_RW[: last - first, :last] @ v_WGE.reshape(last, -1)
            y_nGHd = y_PHd[group.start : group.stop].unflatten(0, (group.length, group.users))
            y_nGHd[first:last] = y_RGE.view(last - first, group.users, H, d)


def _positional_backward(grad_v_PE, grad_PE, v_PE, layout, weight_N) -> Tensor:
    grad_weight_N = torch.zeros_like(weight_N)
    for first, groups in _strips(layout):
        rows = min(STRIP_ROWS, layout.max_length - first)
        lag_RW = _lag_strip(weight_N, first, rows, v_PE.dtype)
        grad_RW = weight_N.new_zeros(rows, first + rows)
        for group in groups:
            last = min(first + STRIP_ROWS, group.length)
            grad_RX = _group_slots(grad_PE, group)[first:last].reshape(last - first, -1)
            v_WX = _group_slots(v_PE, group)[:last].reshape(last, -1)
            grad_v_WX = _group_slots(grad_v_PE, group)[:last].view(last, -1)
            grad_v_WX.addmm_(lag_RW[: last - first, :last].T, grad_RX)
            grad_RW[: last - first, :last] += grad_RX @ v_WX.T
        _sum_diagonals(grad_weight_N, grad_RW.tril_(first), first)
    return grad_weight_N


def _temporal_forward(y_PHd, v_PE, layout: JaggedLayout, gaps: TimeGaps, name: str, params) -> None:
    H, d = y_PHd.shape[1:]
    time_map = TIME_MAPS[name]
    factor = time_map.factor(params)
    for first, groups in _strips(layout):
        for group in groups:
            last = min(first + STRIP_ROWS, group.length)
            feature_GRW = gaps.strip(group, (first, last), time_map.feature, params[0].dtype)
            map_GRW = time_map.factored(feature_GRW, params).to(v_PE.dtype)
            map_GRW[:, :, first:].tril_()
            y_GRE = torch.bmm(map_GRW, _group_slots(v_PE, group)[:last].transpose(0, 1))
            if factor is not None:
                y_GRE *= factor
            y_nGHd = y_PHd[group.start : group.stop].unflatten(0, (group.length, group.users))
            y_nGHd[first:last] = y_GRE.view(group.users, last - first, H, d).transpose(0, 1)


def _temporal_backward(grad_v_PE, grad_PE, v_PE, layout, gaps, name: str, params) -> List[Tensor]:
    time_map = TIME_MAPS[name]
    factor = time_map.factor(params)
    grad_params = [torch.zeros_like(p) for p in params]
    for first, groups in _strips(layout):
        for group in groups:
            last = min(first + STRIP_ROWS, group.length)
            feature_GRW = gaps.strip(group, (first, last), time_map.feature, params[0].dtype)
            map_GRW = time_map.factored(feature_GRW, params)
            map_GRW[:, :, first:].tril_()
            grad_GRE = _group_slots(grad_PE, group)[first:last].transpose(0, 1)
            v_GWE = _group_slots(v_PE, group)[:last].transpose(0, 1)
            grad_GRW = torch.bmm(grad_GRE, v_GWE.mT).to(map_GRW.dtype)
            grad_GRW[:, :, first:].tril_()
            scaled_GRE = grad_GRE if factor is None else (grad_GRE * factor).to(v_PE.dtype)
            grad_v_GWE = torch.bmm(map_GRW.to(v_PE.dtype).mT, scaled_GRE)
            _group_slots(grad_v_PE, group)[:last] += grad_v_GWE.transpose(0, 1)
            for total, part in zip(grad_params, time_map.gradients(feature_GRW, map_GRW, grad_GRW, params)):
                total += part.view_as(total)
    return grad_params
