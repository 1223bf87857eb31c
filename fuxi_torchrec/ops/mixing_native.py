"""Token mixing by the C kernels of `ops.native` (CPU, float32): positional, `pow` and `exp` channels, exact.

No padding, no length groups, no map in memory: six rows of a map are made in the cache, multiplied, and forgotten; backward
makes them again. Work grows with the sum of squared lengths: `linear` overtakes it for long sequences.
"""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuxi_torchrec.ops import native
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.time_maps import Channel, TimeGaps

FORMS = ("pow", "exp")
"""Temporal channels that the kernels know."""
TASK_ROWS = 96
"""Rows of one user's maps that a thread takes at a time; a multiple of the kernel's tile of 3 or 6."""


def mix_native(
    values_THd: Tensor, layout: JaggedLayout, channels: Sequence[Channel], gaps: Optional[TimeGaps]
) -> Tensor:
    """See `token_mixing.mix_tokens`."""
    assert supports(values_THd, channels), "float32 on a CPU with a C compiler, and channels of this module's FORMS"
    names = tuple(name for name, _ in channels)
    return _NativeMixing.apply(values_THd, layout, gaps, names, *(p for _, ps in channels for p in ps))


def supports(values_THd: Tensor, channels: Sequence[Channel]) -> bool:
    names = [name for name, _ in channels]
    known = all(name in ("positional", "zero", *FORMS) for name in names)
    # The kernels take one channel of each kind.
    single = names.count("positional") <= 1 and sum(name in FORMS for name in names) <= 1
    return known and single and native.usable(values_THd, *(p for _, ps in channels for p in ps))


class _NativeMixing(torch.autograd.Function):
    """apply(values_THd, layout, gaps, names, *parameters in the order of the channels) -> [T, H, C, d]."""

    @staticmethod
    def forward(ctx, values_THd, layout, gaps, names, *params):
        ctx.layout, ctx.gaps, ctx.names = layout, gaps, names
        values_THd = _rows_at_one_distance(values_THd)
        ctx.save_for_backward(values_THd, *params)
        T, H, d = values_THd.shape
        mixed_THCd = values_THd.new_empty(T, H, len(names), d)
        for c, name in enumerate(names):
            if name == "zero":
                mixed_THCd[:, :, c].zero_()
        where, weight_N, sizes, scalars = _arguments(values_THd, layout, gaps, names, params)
        native.call("mix_forward", *where, weight_N, mixed_THCd, *sizes, *scalars)
        return mixed_THCd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THCd):
        values_THd, *params = ctx.saved_tensors
        where, weight_N, sizes, scalars = _arguments(values_THd, ctx.layout, ctx.gaps, ctx.names, params)
        grad_THd = torch.empty(values_THd.shape)
        grad_lags = torch.zeros(max(1, ctx.layout.max_length))
        sums_2 = torch.zeros(2, dtype=torch.float64)
        outputs = (grad_THCd.contiguous(), grad_THd, grad_lags, sums_2)
        native.call("mix_backward", *where, weight_N, *outputs, *sizes, *scalars)
        return grad_THd, None, None, None, *_parameter_gradients(ctx.names, params, grad_lags, sums_2, ctx.layout)


def _rows_at_one_distance(values_THd: Tensor) -> Tensor:
    """As it is where every row is contiguous, as for a part of the columns of a matrix."""
    T, H, d = values_THd.shape
    return values_THd if values_THd.stride()[1:] == (d, 1) else values_THd.contiguous()


def _by_kind(names, params):
    """(positional weights, name and parameters of the temporal channel), None where there is none."""
    start, weight_N, temporal = 0, None, None
    for name in names:
        count = {"positional": 1, "zero": 0}.get(name, 2)
        if name == "positional":
            weight_N = params[start]
        elif name != "zero":
            temporal = (name, params[start : start + count])
        start += count
    return weight_N, temporal


def _arguments(values_THd: Tensor, layout: JaggedLayout, gaps: Optional[TimeGaps], names, params):
    T, H, d = values_THd.shape
    weight_N, temporal = _by_kind(names, params)
    a = rate = 0.0
    times_T = next_times_T = None
    if temporal is not None:
        a, rate = _factor_and_rate(*temporal)
        times_T, next_times_T = gaps.timestamps_T.contiguous(), gaps.next_timestamps_T.contiguous()
    tasks = layout.row_tasks(TASK_ROWS)
    positional = names.index("positional") if weight_N is not None else -1
    temporal_place = names.index(temporal[0]) if temporal is not None else -1
    is_log = int(temporal is not None and temporal[0] == "pow")
    where = (values_THd, values_THd.stride(0), layout.offsets_B1, times_T, next_times_T)
    sizes = (tasks, len(tasks), layout.max_length, H, d, len(names), positional, temporal_place, is_log)
    time_unit = gaps.time_unit if gaps is not None else 1.0
    weight_N = None if weight_N is None else weight_N.contiguous()
    return where, weight_N, sizes, (a, rate, time_unit)


def _factor_and_rate(name: str, params: Sequence[Tensor]) -> Tuple[float, float]:
    a, b = params
    return a.item(), (b if name == "pow" else b.exp()).item()


def _parameter_gradients(names, params, grad_lags: Tensor, sums_2: Tensor, layout: JaggedLayout) -> List[Tensor]:
    """d/da = Σ dA U; d/db = −a Σ dA U L, times e^b for `exp`, whose rate is e^b."""
    gradients = []
    weight_N, temporal = _by_kind(names, params)
    for name in names:
        if name == "positional":
            grad_N = torch.zeros_like(weight_N)
            grad_N[: layout.max_length] = grad_lags[: layout.max_length]
            gradients.append(grad_N)
        elif name != "zero":
            a, b = temporal[1]
            slope = sums_2[1].float() * -a
            gradients += [sums_2[0].float().view_as(a), (slope if name == "pow" else slope * b.exp()).view_as(b)]
    return gradients
