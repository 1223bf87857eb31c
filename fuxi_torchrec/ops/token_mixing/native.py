"""Token mixing by the C kernels of `ops.native` (CPU, float32): positional, `pow` and `exp` channels, exact.

No padding, no length groups, no map in memory: six rows of a map are made in the cache, multiplied, and forgotten; backward
makes them again. Work grows with the sum of squared lengths: `linear` overtakes it for long sequences.
"""

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.jagged import JaggedLayout, row_tasks
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS, NATIVE
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps, Times
from fuxi_torchrec.ops.token_mixing.time_maps import Channel

TASK_ROWS = 96
"""Rows of one user's maps that a thread takes at a time; a multiple of the kernel's tile of 3 or 6."""


def mix_native(
    values_THd: Tensor, layout: JaggedLayout, channels: Sequence[Channel], gaps: Optional[TimeGaps]
) -> Tensor:
    """Mixes tokens in C; see `token_mixing.mix_tokens`."""
    if not supports(values_THd, channels):
        raise UserError(
            "model.token_mixing: native needs a CPU, float32, a C compiler, and at most one temporal channel, of "
            f"{_known_forms()}; auto takes what can be had"
        )
    kinds = " ".join(name for name, _ in channels)
    times = [] if gaps is None else list(gaps.times[:2])
    params, time_unit = [p for _, ps in channels for p in ps], 1.0 if gaps is None else gaps.time_unit
    tasks_K3 = layout.row_tasks(TASK_ROWS)
    return _mix(values_THd, layout.offsets_B1, tasks_K3, times, params, kinds, layout.max_length, time_unit)


def supports(values_THd: Tensor, channels: Sequence[Channel]) -> bool:
    """Tells whether the C kernels mix these channels."""
    names = [name for name, _ in channels]
    known = all(NATIVE in CHANNELS[name].versions for name in names)
    # The kernels take one channel of each kind.
    single = names.count("positional") <= 1 and sum(_is_temporal(name) for name in names) <= 1
    return known and single and native.takes(values_THd, *(p for _, ps in channels for p in ps))


def _is_temporal(name: str) -> bool:
    return CHANNELS[name].time_map is not None


def _known_forms() -> str:
    return ", ".join(name for name, record in CHANNELS.items() if NATIVE in record.versions and record.time_map)


def forward_of_users(
    mixed_THCd: Tensor, values_THd: Tensor, users: Sequence[Tuple[int, int]], channels: Sequence[Channel], times: Times
) -> None:
    """Writes the rows of some users, (first row, length) each; for channels and values that `supports` takes."""
    names, params = [name for name, _ in channels], [p for _, ps in channels for p in ps]
    for c, name in enumerate(names):
        if name == "zero":
            mixed_THCd[:, :, c].zero_()
    where, weight_N, sizes, scalars = _arguments_of_users(values_THd, users, times, params, names)
    native.call("mix_forward", *where, weight_N, mixed_THCd, *sizes, *scalars)


def backward_of_users(
    grad_THd: Tensor,
    grad_THCd: Tensor,
    values_THd: Tensor,
    users: Sequence[Tuple[int, int]],
    channels: Sequence[Channel],
    times: Times,
) -> List[Tensor]:
    """Writes the rows of these users into the values' gradient; returns the parameters' gradients."""
    names, params = [name for name, _ in channels], [p for _, ps in channels for p in ps]
    where, weight_N, sizes, scalars = _arguments_of_users(values_THd, users, times, params, names)
    longest, sums_2 = max(n for _, n in users), values_THd.new_zeros(2, dtype=torch.float64)
    grad_lags = values_THd.new_zeros(longest)
    native.call("mix_backward", *where, weight_N, grad_THCd, grad_THd, grad_lags, sums_2, *sizes, *scalars)
    return _parameter_gradients(names, params, grad_lags, sums_2)


Places = Tuple[Union[Tensor, int, None], ...]
Arguments = Tuple[Places, Optional[Tensor], Places, Tuple[float, float, float]]


def _arguments_of_users(
    values_THd: Tensor, users: Sequence[Tuple[int, int]], times: Times, params: Sequence[Tensor], names: List[str]
) -> Arguments:
    rows = [row for first, n in users for row in (first, first + n)]
    offsets_2B = torch.tensor(rows, dtype=torch.int64, device="cpu")
    tasks_K3 = row_tasks([n for _, n in users], TASK_ROWS)
    tasks_K3[:, 0] *= 2  # a user's rows begin at every other offset
    longest = max(n for _, n in users)
    return _arguments(
        _rows_at_one_distance(values_THd), offsets_2B, tasks_K3, times[:2], params, names, longest, times.time_unit
    )


@torch.library.custom_op("fuxi_torchrec::mix_native", mutates_args=())
def _mix(
    values_THd: Tensor,
    offsets_B1: Tensor,
    tasks_K3: Tensor,
    times: List[Tensor],
    params: List[Tensor],
    kinds: str,
    longest: int,
    time_unit: float,
) -> Tensor:
    """[T, H, C, d]. times: timestamps and next timestamps, int64 [T], or none without a temporal channel; params: the
    channels' parameters, one after the other; kinds: the channels' names, separated by spaces."""
    names = kinds.split()
    values_THd = _rows_at_one_distance(values_THd)
    T, H, d = values_THd.shape
    if int((tasks_K3[:, 2] - tasks_K3[:, 1]).sum()) != T:
        raise ValueError(f"the users' rows are not the {T} rows of values")
    mixed_THCd = values_THd.new_empty(T, H, len(names), d)
    for c, name in enumerate(names):
        if name == "zero":
            mixed_THCd[:, :, c].zero_()
    where, weight_N, sizes, scalars = _arguments(
        values_THd, offsets_B1, tasks_K3, times, params, names, longest, time_unit
    )
    native.call("mix_forward", *where, weight_N, mixed_THCd, *sizes, *scalars)
    return mixed_THCd


@_mix.register_fake
def _(
    values_THd: Tensor,
    offsets_B1: Tensor,
    tasks_K3: Tensor,
    times: Sequence[Tensor],
    params: Sequence[Tensor],
    kinds: str,
    longest: int,
    time_unit: float,
) -> Tensor:
    T, H, d = values_THd.shape
    return values_THd.new_empty(T, H, len(kinds.split()), d)


@torch.library.custom_op("fuxi_torchrec::mix_native_backward", mutates_args=())
def _mix_backward(
    grad_THCd: Tensor,
    values_THd: Tensor,
    offsets_B1: Tensor,
    tasks_K3: Tensor,
    times: List[Tensor],
    params: List[Tensor],
    kinds: str,
    longest: int,
    time_unit: float,
) -> List[Tensor]:
    """The gradients of values and of every parameter."""
    names = kinds.split()
    values_THd = _rows_at_one_distance(values_THd)
    where, weight_N, sizes, scalars = _arguments(
        values_THd, offsets_B1, tasks_K3, times, params, names, longest, time_unit
    )
    if grad_THCd.shape != (*values_THd.shape[:2], len(names), values_THd.shape[2]):
        raise ValueError(f"a gradient of shape {tuple(grad_THCd.shape)} of values of {tuple(values_THd.shape)}")
    grad_THd = torch.empty_like(values_THd, memory_format=torch.contiguous_format)
    grad_lags, sums_2 = values_THd.new_zeros(max(1, longest)), values_THd.new_zeros(2, dtype=torch.float64)
    outputs = (grad_THCd.contiguous(), grad_THd, grad_lags, sums_2)
    native.call("mix_backward", *where, weight_N, *outputs, *sizes, *scalars)
    return [grad_THd, *_parameter_gradients(names, params, grad_lags[:longest], sums_2)]


@_mix_backward.register_fake
def _(
    grad_THCd: Tensor,
    values_THd: Tensor,
    offsets_B1: Tensor,
    tasks_K3: Tensor,
    times: Sequence[Tensor],
    params: Sequence[Tensor],
    kinds: str,
    longest: int,
    time_unit: float,
) -> List[Tensor]:
    return [values_THd.new_empty(values_THd.shape), *map(torch.empty_like, params)]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    values_THd, offsets_B1, tasks_K3, times, params, *ctx.settings = inputs
    ctx.sizes = len(times), len(params)
    ctx.save_for_backward(values_THd, offsets_B1, tasks_K3, *times, *params)


def _backward(ctx: Any, grad_THCd: Tensor) -> Tuple[Any, ...]:
    values_THd, offsets_B1, tasks_K3, *rest = ctx.saved_tensors
    times, params = rest[: ctx.sizes[0]], rest[ctx.sizes[0] :]
    grad_THd, *grad_params = _mix_backward(grad_THCd, values_THd, offsets_B1, tasks_K3, times, params, *ctx.settings)
    return grad_THd, None, None, [None] * ctx.sizes[0], grad_params, None, None, None


_mix.register_autograd(_backward, setup_context=_setup_context)


def _rows_at_one_distance(values_THd: Tensor) -> Tensor:
    """As it is where every row is contiguous, as for a part of the columns of a matrix."""
    T, H, d = values_THd.shape
    return values_THd if values_THd.stride()[1:] == (d, 1) else values_THd.contiguous()


def _by_kind(names: Sequence[str], params: Sequence[Tensor]) -> Tuple[Optional[Tensor], Optional[Channel]]:
    """(positional weights, name and parameters of the temporal channel), None where there is none."""
    start, weight_N, temporal = 0, None, None
    for name in names:
        count = len(CHANNELS[name].parameters)
        if name == "positional":
            weight_N = params[start]
        elif _is_temporal(name):
            temporal = (name, params[start : start + count])
        start += count
    return weight_N, temporal


def _arguments(
    values_THd: Tensor,
    offsets_B1: Tensor,
    tasks_K3: Tensor,
    times: Sequence[Tensor],
    params: Sequence[Tensor],
    names: List[str],
    longest: int,
    time_unit: float,
) -> Arguments:
    """The kernels' arguments: where the rows are, the lag weights, the sizes, and the scalars.

    Raises:
        ValueError: they would read or write beyond a tensor's end.
    """
    T, H, d = values_THd.shape
    weight_N, temporal = _by_kind(names, params)
    _check_tasks(offsets_B1, tasks_K3, T, longest)
    if weight_N is not None and (weight_N.ndim != 1 or len(weight_N) < longest):
        raise ValueError(f"lag weights of shape {tuple(weight_N.shape)} for a sequence of {longest}")
    if temporal is not None and [x.shape for x in times] != [(T,)] * 2:
        raise ValueError(f"times of shapes {[tuple(x.shape) for x in times]} for {T} rows")
    a = rate = 0.0
    times_T = next_times_T = None
    if temporal is not None:
        a, rate = _factor_and_rate(*temporal)
        times_T, next_times_T = (x.contiguous() for x in times)
    positional = names.index("positional") if weight_N is not None else -1
    temporal_place = names.index(temporal[0]) if temporal is not None else -1
    is_log = int(temporal is not None and temporal[0] == "pow")
    where = (values_THd, values_THd.stride(0), offsets_B1, times_T, next_times_T)
    sizes = (tasks_K3, len(tasks_K3), longest, H, d, len(names), positional, temporal_place, is_log)
    return where, None if weight_N is None else weight_N.contiguous(), sizes, (a, rate, time_unit)


def _check_tasks(offsets_B1: Tensor, tasks_K3: Tensor, rows: int, longest: int) -> None:
    user_K, first_K, last_K = tasks_K3.unbind(1)
    if len(user_K) == 0:
        return
    if user_K.min() < 0 or user_K.max() >= len(offsets_B1) - 1:
        raise ValueError(f"tasks of users {int(user_K.min())} … {int(user_K.max())} of {len(offsets_B1) - 1}")
    start_K, stop_K = offsets_B1[user_K], offsets_B1[user_K + 1]
    inside_K = (start_K >= 0) & (stop_K <= rows) & (first_K >= 0) & (first_K < last_K) & (last_K <= stop_K - start_K)
    wrong_K = ~(inside_K & (stop_K - start_K <= longest))
    if wrong_K.any():
        k = int(wrong_K.nonzero()[0])
        raise ValueError(
            f"rows {int(first_K[k])} to {int(last_K[k])} of a user at {int(start_K[k])} to {int(stop_K[k])} of {rows} rows, "
            f"of {longest} at most"
        )


def _factor_and_rate(name: str, params: Sequence[Tensor]) -> Tuple[float, float]:
    a, b = params
    return a.item(), (b if name == "pow" else b.exp()).item()


def _parameter_gradients(
    names: Sequence[str], params: Sequence[Tensor], grad_lags: Tensor, sums_2: Tensor
) -> List[Tensor]:
    """d/da = Σ dA U; d/db = −a Σ dA U L, times e^b for `exp`, whose rate is e^b."""
    gradients = []
    weight_N, temporal = _by_kind(names, params)
    for name in names:
        if name == "positional":
            assert weight_N is not None
            grad_N = torch.zeros_like(weight_N)
            grad_N[: len(grad_lags)] = grad_lags
            gradients.append(grad_N)
        elif _is_temporal(name):
            assert temporal is not None
            a, b = temporal[1]
            slope = sums_2[1].float() * -a
            gradients += [sums_2[0].float().view_as(a), (slope if name == "pow" else slope * b.exp()).view_as(b)]
    return gradients
