"""The temporal channel's maps A[i,j] = f(t_{i+1} - t_j): functional forms (FuXi-β) and buckets (FuXi-α, HSTU).

A map is a pure function of a *feature* of the time gap, made once per batch and shared by all blocks, and of a few
parameters of the block. Time differences are int64 ticks until they become float seconds.
"""

import functools
import math
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuxi_torchrec.ops import jagged
from fuxi_torchrec.ops.exponential_sums import DEFAULT_TOLERANCE
from fuxi_torchrec.ops.jagged import JaggedLayout, LengthGroup, Slots

Channel = Tuple[str, Sequence[Tensor]]
"""A token-mixing channel: its map's name and parameters, as `token_mixing` describes them."""
NUM_BUCKETS = 128
"""Largest bucket of the bucketed map; its table has one entry more (FuXi-α section 3.3, as in HSTU's code)."""
CACHED_ENTRIES = 2**24
"""Feature entries kept per batch; a batch with more of them (long sequences) makes them again when they are needed."""


def gap_feature(ticks: Tensor, time_unit: float, feature: str, dtype: torch.dtype) -> Tensor:
    """int64 time differences to what the maps read: "seconds", "log1p" = ln(1 + max(seconds, 0)), or "bucket"."""
    seconds = ticks.to(dtype)
    if time_unit != 1.0:
        seconds.mul_(time_unit)
    if feature == "seconds":
        return seconds
    if feature == "log1p":
        return seconds.clamp_(min=0).log1p_()
    assert feature == "bucket"
    return (seconds.abs_().clamp_(min=1).log_() / 0.301).to(torch.int32).clamp_(0, NUM_BUCKETS)


class Times(NamedTuple):
    """The times of a batch: int64 [T] ticks of the events and of what follows each, seconds per tick; and the largest
    relative error of a map that is approximated (`exponential_sums`)."""

    timestamps_T: Tensor
    next_timestamps_T: Tensor
    time_unit: float = 1.0
    tolerance: float = DEFAULT_TOLERANCE


class StripGaps:
    """One feature of t_{i+1} - t_j for the strips of some length groups: rows i, columns j of every user of a group.

    cached: what `all_strips` returned; None: a strip is made whenever it is asked for.
    """

    def __init__(
        self, slots: Slots, times: Times, feature: str, dtype: torch.dtype, cached: Optional[Tensor] = None
    ) -> None:
        self.slots, self.times, self.feature, self.dtype = slots, times, feature, dtype
        self._cached: Dict[Tuple[int, int], Tensor] = {}
        if cached is not None:
            start = 0
            for key, shape in self._shapes():
                size = math.prod(shape)
                self._cached[key] = cached[start : start + size].view(shape)
                start += size

    def _shapes(self) -> Iterator[Tuple[Tuple[int, int], Tuple[int, int, int]]]:
        for first, groups in self.slots.strips():
            for group in groups:
                last = min(first + jagged.STRIP_ROWS, group.length)
                yield (group.start, first), (group.users, last - first, last)

    def count(self) -> int:
        """Entries of all strips."""
        return sum(math.prod(shape) for _, shape in self._shapes())

    def all_strips(self) -> List[Tensor]:
        """Every strip's entries, flat."""
        return [self.strip(group, first).flatten() for first, groups in self.slots.strips() for group in groups]

    def strip(self, group: LengthGroup, first: int) -> Tensor:
        """[G, rows, columns] for the strip's rows, first <= i < last, and the columns 0 <= j < last; not to be changed."""
        if (group.start, first) in self._cached:
            return self._cached[group.start, first]
        last = min(first + jagged.STRIP_ROWS, group.length)
        past_GN, next_GN = (
            times_P[group.start : group.stop].view(group.length, group.users).T.contiguous() for times_P in self._times_P
        )
        ticks = next_GN[:, first:last, None] - past_GN[:, None, :last]
        return gap_feature(ticks, self.times.time_unit, self.feature, self.dtype)

    @functools.cached_property
    def _times_P(self) -> List[Tensor]:
        return [times_T[self.slots.token_P] for times_T in self.times[:2]]


class TimeGaps:
    """The times of a batch, and what is made of them once for all blocks.

    timestamps_T, next_timestamps_T: int64 [T] ticks; time_unit: seconds per tick; tolerance: see `Times`. features: what
    `token_mixing.prepare` made of them, by channel.
    """

    def __init__(
        self,
        timestamps_T: Tensor,
        next_timestamps_T: Tensor,
        layout: JaggedLayout,
        time_unit: float = 1.0,
        tolerance: float = DEFAULT_TOLERANCE,
    ) -> None:
        assert timestamps_T.dtype == next_timestamps_T.dtype == torch.int64
        self.times = Times(timestamps_T, next_timestamps_T, time_unit, tolerance)
        self.layout = layout
        self.features: Dict[tuple, Tensor] = {}

    @property
    def timestamps_T(self) -> Tensor:
        return self.times.timestamps_T

    @property
    def next_timestamps_T(self) -> Tensor:
        return self.times.next_timestamps_T

    @property
    def time_unit(self) -> float:
        return self.times.time_unit

    def strips(self, name: str, dtype: torch.dtype) -> StripGaps:
        """Of the temporal channel `name`, for all users; from what `token_mixing.prepare` made, if it did."""
        cached = self.features.get((name, None, dtype))
        cached = None if cached is None or not cached.numel() else cached
        return StripGaps(self.layout.slots, self.times, TIME_MAPS[name].feature, dtype, cached)

    @functools.cached_property
    def are_sorted(self) -> bool:
        """Whether time never runs backwards within a user; not looked at, and taken for granted, off the CPU."""
        if self.timestamps_T.device.type != "cpu" or self.layout.num_tokens == 0:
            return True
        same_user = self.layout.user_T[1:] == self.layout.user_T[:-1]
        forward = bool((self.timestamps_T <= self.next_timestamps_T).all())
        return forward and bool((self.timestamps_T.diff().ge(0) | ~same_user).all())


def _pow(log1p, a, b):
    return a * torch.exp(-b * log1p)


def _exp(seconds, a, b):
    return a * torch.exp(-torch.exp(b) * seconds.clamp(min=0))


def _log(seconds, a, b, c):
    return a * torch.log(1 + b * seconds.clamp(min=0)) + c


def _linear(seconds, a, b):
    return a * seconds + b


def _sin(seconds, a, b, c, d):
    return c * torch.sin(a * seconds + b) + d


def _mixed(seconds, *p):
    pow_a, pow_b, exp_a, exp_b, log_a, log_b, log_c, lin_a, lin_b, sin_a, sin_b, sin_c, sin_d = p
    total = _pow(seconds.clamp(min=0).log1p(), pow_a, pow_b) + _exp(seconds, exp_a, exp_b)
    total = total + _log(seconds, log_a, log_b, log_c) + _linear(seconds, lin_a, lin_b)
    return (total + _sin(seconds, sin_a, sin_b, sin_c, sin_d)) / 5


def _nn(seconds, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3):
    # The product is rounded before the sum, as in the research code: phases are large, and a fused product moves them.
    hidden = torch.sin(seconds[..., None] * weight_1[:, 0] + bias_1)
    hidden = F.silu(F.linear(hidden, weight_2, bias_2))
    return F.linear(hidden, weight_3, bias_3)[..., 0]


def _bucketed(bucket, weight):
    return weight.index_select(0, bucket.flatten()).view(bucket.shape)


def _pow_unit(log1p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.mul(log1p, -b).exp_()


def _pow_backward(log1p: Tensor, unit: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> List[Tensor]:
    weighted = grad.mul_(unit)
    return [weighted.sum(), -a * _dot(weighted, log1p)]


def _exp_unit(seconds: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Exponentials that underflow are slow on a CPU; the smallest normal number is as good as zero.
    lowest = math.log(torch.finfo(seconds.dtype).tiny)
    return seconds.clamp(min=0).mul_(-torch.exp(b)).clamp_(min=lowest).exp_()


def _exp_backward(seconds: Tensor, unit: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> List[Tensor]:
    weighted = grad.mul_(unit)
    return [weighted.sum(), -a * torch.exp(b) * _dot(weighted, seconds.clamp(min=0))]


def _log_backward(seconds: Tensor, unit: Tensor, grad: Tensor, a: Tensor, b: Tensor, c: Tensor) -> List[Tensor]:
    seconds = seconds.clamp(min=0)
    inside = 1 + b * seconds
    return [_dot(grad, torch.log(inside)), a * _dot(grad, seconds / inside), grad.sum()]


def _linear_backward(seconds: Tensor, unit: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> List[Tensor]:
    return [_dot(grad, seconds), grad.sum()]


def _sin_backward(seconds: Tensor, unit: Tensor, grad: Tensor, *p: Tensor) -> List[Tensor]:
    a, b, c, _ = p
    phase = a * seconds + b
    by_phase = grad * torch.cos(phase)
    return [c * _dot(by_phase, seconds), c * by_phase.sum(), _dot(grad, torch.sin(phase)), grad.sum()]


def _mixed_backward(seconds: Tensor, unit: Tensor, grad: Tensor, *p: Tensor) -> List[Tensor]:
    grad = grad.div_(5)
    log1p = seconds.clamp(min=0).log1p()
    parts = _pow_backward(log1p, _pow_unit(log1p, *p[:2]), grad.clone(), *p[:2])
    parts += _exp_backward(seconds, _exp_unit(seconds, *p[2:4]), grad.clone(), *p[2:4])
    parts += _log_backward(seconds, unit, grad, *p[4:7]) + _linear_backward(seconds, unit, grad, *p[7:9])
    return parts + _sin_backward(seconds, unit, grad, *p[9:])


def _nn_backward(seconds: Tensor, unit: Tensor, grad: Tensor, *p: Tensor) -> List[Tensor]:
    weight_1, bias_1, weight_2, bias_2, weight_3, _ = p
    x, grad = seconds.reshape(-1, 1), grad.reshape(-1, 1)
    phase = x * weight_1[:, 0] + bias_1
    first = torch.sin(phase)
    inner = F.linear(first, weight_2, bias_2)
    gate = torch.sigmoid(inner)
    by_inner = (grad * weight_3) * (gate + inner * gate * (1 - gate))
    by_phase = (by_inner @ weight_2) * torch.cos(phase)
    by_1, by_2, by_3 = by_phase.T @ x, by_inner.T @ first, grad.T @ (inner * gate)
    return [by_1, by_phase.sum(0), by_2, by_inner.sum(0), by_3, grad.sum(0)]


def _bucketed_backward(bucket: Tensor, unit: Tensor, grad: Tensor, weight: Tensor) -> List[Tensor]:
    return [torch.zeros_like(weight).index_add_(0, bucket.flatten(), grad.flatten())]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1))


@dataclass(frozen=True)
class TimeMap:
    """f(feature, *params), its feature, and the closed form of its gradients.

    `backward(feature, unit, grad, *params)` gives the parameters' gradients of sum(grad * f) and overwrites grad. With
    `unit`, f = params[0] * unit(feature, *params), and the factor is applied to the mixed output, which is smaller than
    the map.
    """

    feature: str
    evaluate: Callable[..., Tensor]
    backward: Callable[..., List[Tensor]]
    unit: Optional[Callable[..., Tensor]] = None

    def factored(self, feature: Tensor, params: Sequence[Tensor]) -> Tensor:
        """A fresh tensor u with f = factor(params) * u."""
        return (self.unit or self.evaluate)(feature, *params)

    def factor(self, params: Sequence[Tensor]) -> Optional[Tensor]:
        return None if self.unit is None else params[0]


TIME_MAPS: Dict[str, TimeMap] = {
    "pow": TimeMap("log1p", _pow, _pow_backward, _pow_unit),
    "exp": TimeMap("seconds", _exp, _exp_backward, _exp_unit),
    "log": TimeMap("seconds", _log, _log_backward),
    "linear": TimeMap("seconds", _linear, _linear_backward),
    "sin": TimeMap("seconds", _sin, _sin_backward),
    "mixed": TimeMap("seconds", _mixed, _mixed_backward),
    "nn": TimeMap("seconds", _nn, _nn_backward),
    "bucketed": TimeMap("bucket", _bucketed, _bucketed_backward),
}
"""Parameters in order: pow a b; exp a b; log a b c; linear a b; sin a b c d; mixed those of pow, exp, log, linear and
sin; nn weight and bias of its three layers; bucketed a table of NUM_BUCKETS + 1. (zero is no map: FuXi skips it.)"""
