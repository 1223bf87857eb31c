"""Pointwise attention on jagged rows: HSTU's, FuXi-α's semantic channel, and FLASH's.

A^(head)[i,j] = f(q_i · k_j + bias[i,j]) · scale for j <= i of the same user, y = A v; f is SiLU, or relu². Sources: HSTU
(arXiv 2402.17152), equation 2; FLASH (arXiv 2202.10447), section 3.2; docs/models.md. The maps exist a tile at a time,
never above the diagonal's tiles, and backward makes them again: memory is linear in T.

Shapes: T tokens, P padded slots, H heads, q query/key and d value size per head; in a length group G users, n positions,
B = G * H, R rows of a strip, W its columns, w those of a tile.
"""

from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuxi_torchrec.ops import jagged
from fuxi_torchrec.ops.jagged import JaggedLayout, LengthGroup, Slots, from_padded, from_slots, to_padded, to_slots
from fuxi_torchrec.ops.row_wise.dispatch import wide
from fuxi_torchrec.ops.token_mixing.time_gaps import StripGaps, TimeGaps, gap_feature
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS
from fuxi_torchrec.ops.token_mixing.toeplitz import lag_strip, sum_diagonals

TILE_ENTRIES = 2**18
"""Entries of all heads' and users' maps that exist at a time; they stay in the cache."""
SMALLEST_TILE = 100
"""Columns of a tile at least."""


def silu_attention(
    queries_THq: Tensor,
    keys_THq: Tensor,
    values_THd: Tensor,
    layout: JaggedLayout,
    scale: float,
    lag_weights_N: Optional[Tensor] = None,
    bucket_weights: Optional[Tensor] = None,
    gaps: Optional[TimeGaps] = None,
) -> Tensor:
    """y = A v on jagged rows, [T, H, d].

    The bias is lag_weights_N[i - j] + bucket_weights[bucket(t_{i+1} - t_j)], the same for every head; without weights
    there is none. Bias and SiLU are float32 under autocast, the products are not.
    """
    strips = None
    if bucket_weights is not None:
        assert gaps is not None
        strips = gaps.strips("bucketed", bucket_weights.dtype)
    qkv_P = (to_slots(x, layout) for x in (queries_THq, keys_THq, values_THd))
    y_PHd = _PointwiseAttention.apply(*qkv_P, lag_weights_N, bucket_weights, layout.slots, strips, scale, _SILU)
    return from_slots(y_PHd, layout)


def squared_relu_attention(
    queries_THq: Tensor, keys_THq: Tensor, values_THd: Tensor, layout: JaggedLayout, lag_weights_N: Tensor
) -> Tensor:
    """y = A v on jagged rows with A[i,j] = relu(q_i · k_j + lag_weights_N[i - j])², [T, H, d]."""
    qkv_P = (to_slots(x, layout) for x in (queries_THq, keys_THq, values_THd))
    y_PHd = _PointwiseAttention.apply(*qkv_P, lag_weights_N, None, layout.slots, None, 1.0, _SQUARED_RELU)
    return from_slots(y_PHd, layout)


def silu_attention_reference(
    queries_THq: Tensor,
    keys_THq: Tensor,
    values_THd: Tensor,
    layout: JaggedLayout,
    scale: float,
    lag_weights_N: Optional[Tensor] = None,
    bucket_weights: Optional[Tensor] = None,
    gaps: Optional[TimeGaps] = None,
) -> Tensor:
    """Computes silu_attention padded and with whole maps, for tests."""
    q_BHNq, k_BHNq, v_BHNd = (to_padded(x, layout).transpose(1, 2) for x in (queries_THq, keys_THq, values_THd))
    scores_BHNN = q_BHNq @ k_BHNq.mT
    position_N = torch.arange(layout.max_length, device=layout.device)
    lag_NN = position_N[:, None] - position_N
    if lag_weights_N is not None:
        scores_BHNN = scores_BHNN + lag_weights_N[lag_NN.clamp(min=0)]
    if bucket_weights is not None:
        assert gaps is not None
        past_BN, next_BN = to_padded(gaps.timestamps_T, layout), to_padded(gaps.next_timestamps_T, layout)
        ticks_BNN = next_BN[:, :, None] - past_BN[:, None, :]
        bucket_BNN = gap_feature(ticks_BNN, gaps.time_unit, "bucket", bucket_weights.dtype)
        scores_BHNN = scores_BHNN + TIME_MAPS["bucketed"].evaluate(bucket_BNN, bucket_weights)[:, None]
    map_BHNN = (F.silu(scores_BHNN) * scale).masked_fill(lag_NN < 0, 0)
    return from_padded((map_BHNN @ v_BHNd).transpose(1, 2), layout)


class _Activation(NamedTuple):
    """f, which may overwrite its input, and (gradient by f, input of f) -> gradient by the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_SILU = _Activation(lambda x: F.silu(x, inplace=True), torch.ops.aten.silu_backward)
_SQUARED_RELU = _Activation(lambda x: x.clamp_(min=0).square_(), lambda grad, x: grad.mul_(x.clamp(min=0)).mul_(2))


class _Strip(NamedTuple):
    """Some rows of the maps of a group's users: `rows` of n, all columns up to their last, cut into `tiles`; bias_GRW is
    None where there is none."""

    rows: slice
    tiles: List[slice]
    bias_GRW: Optional[Tensor]
    bucket_GRW: Optional[Tensor]


class _PointwiseAttention(torch.autograd.Function):
    """apply(q_PHq, k_PHq, v_PHd, lag weights, bucket weights, slots, strips, scale, activation) -> y_PHd."""

    @staticmethod
    def forward(
        ctx: Any,
        q_PHq: Tensor,
        k_PHq: Tensor,
        v_PHd: Tensor,
        lag_weights_N: Optional[Tensor],
        bucket_weights: Optional[Tensor],
        slots: Slots,
        strips: Optional[StripGaps],
        scale: float,
        activation: _Activation,
    ) -> Tensor:
        ctx.save_for_backward(q_PHq, k_PHq, v_PHd, lag_weights_N, bucket_weights)
        ctx.slots, ctx.strips, ctx.scale, ctx.activation = slots, strips, scale, activation
        y_PHd = torch.empty_like(v_PHd, memory_format=torch.contiguous_format)
        with torch.autocast(v_PHd.device.type, enabled=False):
            for group in slots.groups:
                q_Bnq, k_Bnq, v_Bnd = (_by_head(x, group) for x in (q_PHq, k_PHq, v_PHd))
                y_Bnd = torch.zeros_like(v_Bnd)
                for rows, tiles, bias_GRW, _ in _strips(slots, group, v_PHd.shape[1], lag_weights_N, bucket_weights, strips):
                    for columns in tiles:
                        scores_BRw = _scores(q_Bnq[:, rows], k_Bnq[:, columns], bias_GRW, columns)
                        map_BRw = _causal(activation.forward(scores_BRw), rows, columns)
                        y_Bnd[:, rows].baddbmm_(map_BRw.to(v_Bnd.dtype), v_Bnd[:, columns], alpha=scale)
                _write_group(y_PHd, group, y_Bnd)
        return y_PHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PHd: Tensor) -> Tuple[Optional[Tensor], ...]:
        q_PHq, k_PHq, v_PHd, lag_weights_N, bucket_weights = ctx.saved_tensors
        grads_P = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_PHq, k_PHq, v_PHd)]
        grad_lags = None if lag_weights_N is None else torch.zeros_like(lag_weights_N)
        grad_buckets = None if bucket_weights is None else torch.zeros_like(bucket_weights)
        for group in ctx.slots.groups:
            q_Bnq, k_Bnq, v_Bnd, grad_Bnd = (_by_head(x, group) for x in (q_PHq, k_PHq, v_PHd, grad_PHd))
            grads = grad_q_Bnq, grad_k_Bnq, grad_v_Bnd = [torch.zeros_like(x) for x in (q_Bnq, k_Bnq, v_Bnd)]
            all_strips = _strips(ctx.slots, group, v_PHd.shape[1], lag_weights_N, bucket_weights, ctx.strips)
            for rows, tiles, bias_GRW, bucket_GRW in all_strips:
                by_bias_GRW = None if bias_GRW is None else bias_GRW.new_empty(group.users, *bias_GRW.shape[1:])
                scaled_BRd = grad_Bnd[:, rows] * ctx.scale
                for columns in tiles:
                    scores_BRw = _scores(q_Bnq[:, rows], k_Bnq[:, columns], bias_GRW, columns)
                    map_BRw = _causal(ctx.activation.forward(scores_BRw.clone()), rows, columns)
                    grad_v_Bnd[:, columns].baddbmm_(map_BRw.to(v_Bnd.dtype).mT, scaled_BRd)
                    by_map_BRw = torch.bmm(scaled_BRd, v_Bnd[:, columns].mT).to(scores_BRw.dtype)
                    by_scores_BRw = _causal(ctx.activation.backward(by_map_BRw, scores_BRw), rows, columns)
                    if by_bias_GRW is not None:
                        torch.sum(by_scores_BRw.unflatten(0, (group.users, -1)), 1, out=by_bias_GRW[:, :, columns])
                    by_scores_BRw = by_scores_BRw.to(q_Bnq.dtype)
                    grad_q_Bnq[:, rows].baddbmm_(by_scores_BRw, k_Bnq[:, columns])
                    grad_k_Bnq[:, columns].baddbmm_(by_scores_BRw.mT, q_Bnq[:, rows])
                if grad_lags is not None:
                    assert by_bias_GRW is not None
                    sum_diagonals(grad_lags, by_bias_GRW.sum(0), rows.start)
                if grad_buckets is not None:
                    assert by_bias_GRW is not None and bucket_GRW is not None
                    grad_buckets.index_add_(0, bucket_GRW.flatten(), by_bias_GRW.flatten())
            for grad_P, grad_Bn in zip(grads_P, grads):
                _write_group(grad_P, group, grad_Bn)
        return (*grads_P, grad_lags, grad_buckets, None, None, None, None)


def _by_head(x_PHw: Tensor, group: LengthGroup) -> Tensor:
    """The group's part of [P, H, w] as contiguous [G * H, n, w]."""
    x_nGHw = x_PHw[group.start : group.stop].unflatten(0, (group.length, group.users))
    return x_nGHw.permute(1, 2, 0, 3).contiguous().flatten(0, 1)


def _write_group(x_PHw: Tensor, group: LengthGroup, part_Bnw: Tensor) -> None:
    part_GHnw = part_Bnw.unflatten(0, (group.users, -1))
    x_PHw[group.start : group.stop].unflatten(0, (group.length, group.users)).copy_(part_GHnw.permute(2, 0, 1, 3))


def _strips(
    slots: Slots,
    group: LengthGroup,
    heads: int,
    lag_weights_N: Optional[Tensor],
    bucket_weights: Optional[Tensor],
    strips: Optional[StripGaps],
) -> Iterator[_Strip]:
    rows = min(jagged.STRIP_ROWS, group.length)
    width = max(SMALLEST_TILE, TILE_ENTRIES // (group.users * heads * rows))
    for first in range(0, group.length, rows):
        last = min(first + rows, group.length)
        bias_GRW = bucket_GRW = None
        if lag_weights_N is not None:
            bias_GRW = lag_strip(lag_weights_N, first, last - first, lag_weights_N.dtype)[None]
        if bucket_weights is not None:
            assert strips is not None
            bucket_GRW = strips.strip(group, first)
            time_GRW = TIME_MAPS["bucketed"].evaluate(bucket_GRW, bucket_weights)
            bias_GRW = time_GRW if bias_GRW is None else time_GRW.add_(bias_GRW)
        tiles = [slice(start, min(start + width, last)) for start in range(0, last, width)]
        yield _Strip(slice(first, last), tiles, bias_GRW, bucket_GRW)


def _scores(q_BRq: Tensor, k_Bwq: Tensor, bias_GRW: Optional[Tensor], columns: slice) -> Tensor:
    """A fresh [B, R, w] tensor, at least float32."""
    scores_BRw = wide(torch.bmm(q_BRq, k_Bwq.mT))
    if bias_GRW is not None:
        scores_BRw.unflatten(0, (len(bias_GRW), -1)).add_(bias_GRW[:, None, :, columns])
    return scores_BRw


def _causal(x_BRw: Tensor, rows: slice, columns: slice) -> Tensor:
    """Zeroes what lies above the diagonal, in place."""
    return x_BRw.tril_(rows.start - columns.start) if columns.stop > rows.start + 1 else x_BRw
