"""Token mixing as an operator that torch.compile and torch.export can see: users of up to `linear_from` rows in groups
(`blocked.py`, or `native.py`), longer ones one by one (`linear.py`). Backward keeps v and makes everything
else again.

Shapes: T tokens, P padded slots, H heads, d value size per head, E = H * d, C channels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import Slots
from fuxi_torchrec.ops.token_mixing import native as mixing_native
from fuxi_torchrec.ops.token_mixing.blocked import blocked_backward, blocked_forward
from fuxi_torchrec.ops.token_mixing.linear import LinearGaps, linear_backward, linear_forward
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS
from fuxi_torchrec.ops.token_mixing.time_gaps import FeatureKey, StripGaps, Times
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS, Channel


@dataclass
class _Mixing:
    """The operator's arguments, put together."""

    times: Times
    slots: Slots
    features: Sequence[Tensor]
    channels: List[Channel]
    linear_from: Optional[int]
    in_c: bool

    @classmethod
    def of(
        cls,
        times: Sequence[Tensor],
        slots: Sequence[Tensor],
        features: Sequence[Tensor],
        params: Sequence[Tensor],
        kinds: str,
        linear_from: Optional[int],
        in_c: bool,
        time_unit: float,
        tolerance: float,
    ) -> "_Mixing":
        channels: List[Channel] = []
        rest = list(params)
        for name in kinds.split():
            count = len(CHANNELS[name].parameters)
            channels.append((name, rest[:count]))
            rest = rest[count:]
        timestamps_T, next_timestamps_T = times
        gaps = Times(timestamps_T, next_timestamps_T, time_unit, tolerance)
        return cls(gaps, Slots(*slots), features, channels, linear_from, in_c)

    @cached_property
    def _split(self) -> Tuple[List[Tuple[int, int]], Slots]:
        return self.slots.split(self.linear_from)

    @property
    def long(self) -> List[Tuple[int, int]]:
        return self._split[0]

    @property
    def short(self) -> Slots:
        return self._split[1]

    @property
    def short_users(self) -> List[Tuple[int, int]]:
        """(first row, length) each."""
        return [tuple(row[3:]) for row in self.short.users_B5.tolist()]

    @cached_property
    def gaps(self) -> Tuple[Dict[int, StripGaps], Dict[int, LinearGaps]]:
        """Of the temporal channels, by their number, for short and for long users."""
        strips, linear = {}, {}
        for c, (name, params) in enumerate(self.channels):
            if CHANNELS[name].time_map is not None:
                strips[c], linear[c] = _gaps(name, params[0].dtype, self.times, *self._split, self.in_c, self.features[c])
        return strips, linear


def _gaps(
    name: str,
    dtype: torch.dtype,
    times: Times,
    long: Sequence[Tuple[int, int]],
    short: Slots,
    in_c: bool,
    cached: Tensor,
) -> Tuple[StripGaps, LinearGaps]:
    if in_c:  # whose kernels make theirs in registers
        short = Slots(short.users_B5[:0], *(x[:0] for x in (short.token_P, short.slot_T, short.padding_slots)))
    strips = StripGaps(short, times, TIME_MAPS[name].feature, dtype)
    linear = LinearGaps(name, long, times, dtype)
    if not cached.numel():
        return strips, linear
    of_strips, of_linear = cached.split([strips.count(), linear.count()])
    return (
        StripGaps(short, times, TIME_MAPS[name].feature, dtype, of_strips),
        LinearGaps(name, long, times, dtype, of_linear),
    )


def make_features(key: FeatureKey, times: Times, slots: Slots, most: int) -> Tensor:
    """What a temporal channel reads of the times, in one flat tensor for the operator's `features`; empty where that would
    be more than `most` entries."""
    name, linear_from, in_c, dtype = key
    empty = torch.empty(0, dtype=dtype, device=slots.token_P.device)
    strips, linear = _gaps(name, dtype, times, *slots.split(linear_from), in_c, empty)
    if strips.count() + linear.count() > most:
        return empty
    return torch.cat([*strips.all_strips(), *linear.all_users(), empty.to(torch.int32 if name == "bucketed" else dtype)])


@torch.library.custom_op("fuxi_torchrec::mix_tokens", mutates_args=())
def mix_op(
    values_THd: Tensor,
    times: List[Tensor],
    slots: List[Tensor],
    features: List[Tensor],
    params: List[Tensor],
    kinds: str,
    linear_from: Optional[int],
    in_c: bool,
    time_unit: float,
    tolerance: float,
) -> Tensor:
    """Mixes values, [T, H, C, d].

    Args:
        values_THd: v.
        times: timestamps and next timestamps, int64 [T]; empty tensors where no channel is temporal.
        slots: the fields of `jagged.Slots`, in their order.
        features: for each channel, what `make_features` returned, or an empty tensor.
        params: the channels' parameters, one after the other.
        kinds: the channels' names, separated by spaces.
        linear_from: users of length groups with more rows than this are mixed by linear.py, which must know every
            channel; None: nobody is.
        in_c: the others are mixed by native.py, which must support channels and values.
        time_unit, tolerance: see `time_maps.Times`.
    """
    mixing = _Mixing.of(times, slots, features, params, kinds, linear_from, in_c, time_unit, tolerance)
    T, H, d = values_THd.shape
    y_THCd = values_THd.new_empty(T, H, len(mixing.channels), d)
    strips, linear = mixing.gaps
    with torch.autocast(values_THd.device.type, enabled=False):
        if mixing.long:
            linear_forward(y_THCd, values_THd, mixing.long, mixing.channels, linear)
        if mixing.short.groups and in_c:
            mixing_native.forward_of_users(y_THCd, values_THd, mixing.short_users, mixing.channels, mixing.times)
        elif mixing.short.groups:
            v_PE = values_THd.flatten(1).index_select(0, mixing.short.token_P)
            y_PHCd = y_THCd.new_empty(len(v_PE), *y_THCd.shape[1:])
            blocked_forward(y_PHCd, v_PE, mixing.short, mixing.channels, strips)
            y_THCd = _to_rows(y_THCd, y_PHCd, mixing)
    return y_THCd


def _to_rows(x_T: Tensor, x_P: Tensor, mixing: _Mixing) -> Tensor:
    """x_T with the short users' rows from their slots."""
    short = mixing.short
    if not mixing.long:
        return x_P.index_select(0, short.slot_T)
    # A slot past its user's end stands for the user's last row, and writes what that row's own slot does.
    return x_T.index_copy_(0, short.token_P, x_P.index_select(0, short.slot_T.index_select(0, short.token_P)))


@mix_op.register_fake
def _(
    values_THd: Tensor,
    times: Sequence[Tensor],
    slots: Sequence[Tensor],
    features: Sequence[Tensor],
    params: Sequence[Tensor],
    kinds: str,
    linear_from: Optional[int],
    in_c: bool,
    time_unit: float,
    tolerance: float,
) -> Tensor:
    T, H, d = values_THd.shape
    return values_THd.new_empty(T, H, len(kinds.split()), d)


@torch.library.custom_op("fuxi_torchrec::mix_tokens_backward", mutates_args=())
def mix_backward_op(
    grad_THCd: Tensor,
    values_THd: Tensor,
    times: List[Tensor],
    slots: List[Tensor],
    features: List[Tensor],
    params: List[Tensor],
    kinds: str,
    linear_from: Optional[int],
    in_c: bool,
    time_unit: float,
    tolerance: float,
) -> List[Tensor]:
    """Computes the gradients of values and of every parameter."""
    mixing = _Mixing.of(times, slots, features, params, kinds, linear_from, in_c, time_unit, tolerance)
    T, H, d = values_THd.shape
    grad_v_THd = values_THd.new_zeros(T, H, d)
    grad_params = [torch.zeros_like(p) for p in params]
    strips, linear = mixing.gaps
    with torch.autocast(values_THd.device.type, enabled=False):
        if mixing.long:
            parts = linear_backward(grad_v_THd, grad_THCd, values_THd, mixing.long, mixing.channels, linear)
            grad_params = [total.add_(part) for total, part in zip(grad_params, parts)]
        if mixing.short.groups and in_c:
            rest = grad_THCd.contiguous(), values_THd, mixing.short_users, mixing.channels, mixing.times
            parts = mixing_native.backward_of_users(grad_v_THd, *rest)
            grad_params = [total.add_(part) for total, part in zip(grad_params, parts)]
        elif mixing.short.groups:
            short = mixing.short
            v_PE = values_THd.flatten(1).index_select(0, short.token_P)
            grad_PHCd = grad_THCd.index_select(0, short.token_P).index_fill_(0, short.padding_slots, 0)
            grad_v_PE = torch.zeros_like(v_PE)
            parts = blocked_backward(grad_v_PE, grad_PHCd, v_PE, short, mixing.channels, strips)
            grad_params = [total.add_(part) for total, part in zip(grad_params, parts)]
            grad_v_THd = _to_rows(grad_v_THd, grad_v_PE.view(-1, H, d), mixing)
    return [grad_v_THd, *grad_params]


@mix_backward_op.register_fake
def _(
    grad_THCd: Tensor,
    values_THd: Tensor,
    times: Sequence[Tensor],
    slots: Sequence[Tensor],
    features: Sequence[Tensor],
    params: Sequence[Tensor],
    kinds: str,
    linear_from: Optional[int],
    in_c: bool,
    time_unit: float,
    tolerance: float,
) -> List[Tensor]:
    return [torch.empty(values_THd.shape, dtype=values_THd.dtype, device=values_THd.device), *map(torch.empty_like, params)]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    values_THd, *lists = inputs[:5]
    ctx.settings = inputs[5:]
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(values_THd, *(x for tensors in lists for x in tensors))


def _backward(ctx: Any, grad_THCd: Tensor) -> Tuple[Any, ...]:
    values_THd, *tensors = ctx.saved_tensors
    lists: List[List[Tensor]] = []
    for size in ctx.sizes:
        lists.append(tensors[:size])
        tensors = tensors[size:]
    grad_THd, *grad_params = mix_backward_op(grad_THCd.contiguous(), values_THd, *lists, *ctx.settings)
    nothing: List[Union[None, List[None]]] = [[None] * size for size in ctx.sizes[:3]]
    return (grad_THd, *nothing, grad_params, None, None, None, None, None)


mix_op.register_autograd(_backward, setup_context=_setup_context)
