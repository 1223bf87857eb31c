"""The temporal channel's maps A[i,j] = f(t_{i+1} - t_j): functional forms (FuXi-β) and buckets (FuXi-α, HSTU).

A map is a pure function of a *feature* of the time gap, made once per batch and shared by all blocks, and of a few
parameters of the block. Time differences are int64 ticks until they become float seconds.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout, LengthGroup

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


class TimeGaps:
    """Features of t_{i+1} - t_j for the strips of a batch: rows i, columns j of every user of a length group.

    timestamps_T, next_timestamps_T: int64 [T] ticks; time_unit: seconds per tick.
    """

    def __init__(
        self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout, time_unit: float = 1.0
    ) -> None:
        assert timestamps_T.dtype == next_timestamps_T.dtype == torch.int64
        self.timestamps_T, self.next_timestamps_T = timestamps_T, next_timestamps_T
        self.layout, self.time_unit = layout, time_unit
        self._times_P: Optional[Tuple[Tensor, Tensor]] = None
        self._cache: Dict[tuple, Tensor] = {}

    @cached_property
    def _keep(self) -> bool:
        return sum(g.users * g.length**2 for g in self.layout.groups) // 2 <= CACHED_ENTRIES

    def strip(self, group: LengthGroup, rows: Tuple[int, int], feature: str, dtype: torch.dtype) -> Tensor:
        """[G, rows, columns] for the rows first <= i < last and the columns 0 <= j < last of the group's users."""
        key = (group.start, rows, feature, dtype)
        if key in self._cache:
            return self._cache[key]
        if self._times_P is None:
            token_P = self.layout.token_P
            self._times_P = self.timestamps_T[token_P], self.next_timestamps_T[token_P]
        first, last = rows
        past_GN, next_GN = (
            t[group.start : group.stop].view(group.length, group.users).T.contiguous() for t in self._times_P
        )
        ticks = next_GN[:, first:last, None] - past_GN[:, None, :last]
        strip = gap_feature(ticks, self.time_unit, feature, dtype)
        if self._keep:
            self._cache[key] = strip
        return strip


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
    return [weighted.sum(), -a * torch.dot(weighted.view(-1), log1p.reshape(-1))]


def _bucketed_backward(bucket: Tensor, unit: Tensor, grad: Tensor, weight: Tensor) -> List[Tensor]:
    return [torch.zeros_like(weight).index_add_(0, bucket.flatten(), grad.flatten())]


@dataclass(frozen=True)
class TimeMap:
    """f(feature, *params), its feature, and closed forms where autograd would be slow.

    With `unit`, f = params[0] * unit(feature, *params), and the factor is applied to the mixed output, which is smaller
    than the map. `backward(feature, unit, grad, *params)` gives the parameters' gradients of sum(grad * f).
    """

    feature: str
    evaluate: Callable[..., Tensor]
    unit: Optional[Callable[..., Tensor]] = None
    backward: Optional[Callable[..., List[Tensor]]] = None

    def factored(self, feature: Tensor, params: Sequence[Tensor]) -> Tensor:
        """A fresh tensor u with f = factor(params) * u."""
        return (self.unit or self.evaluate)(feature, *params)

    def factor(self, params: Sequence[Tensor]) -> Optional[Tensor]:
        return None if self.unit is None else params[0]

    def gradients(self, feature: Tensor, unit: Tensor, grad: Tensor, params: Sequence[Tensor]) -> List[Tensor]:
        """The parameters' gradients of sum(grad * f(feature)); unit is `factored`'s; overwrites grad."""
        if self.backward is not None:
            return self.backward(feature, unit, grad, *params)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in params]
            return list(torch.autograd.grad(self.evaluate(feature, *leaves), leaves, grad))


TIME_MAPS: Dict[str, TimeMap] = {
    "pow": TimeMap("log1p", _pow, _pow_unit, _pow_backward),
    "exp": TimeMap("seconds", _exp),
    "log": TimeMap("seconds", _log),
    "linear": TimeMap("seconds", _linear),
    "sin": TimeMap("seconds", _sin),
    "mixed": TimeMap("seconds", _mixed),
    "nn": TimeMap("seconds", _nn),
    "bucketed": TimeMap("bucket", _bucketed, backward=_bucketed_backward),
}
"""Parameters in order: pow a b; exp a b; log a b c; linear a b; sin a b c d; mixed those of pow, exp, log, linear and
sin; nn weight and bias of its three layers; bucketed a table of NUM_BUCKETS + 1. (zero is no map: FuXi skips it.)"""
