"""The temporal channel's maps A[i,j] = f(t_{i+1} - t_j): functional forms (FuXi-β) and buckets (FuXi-α, HSTU).

A map is a pure function of a *feature* of the time gap, made once per batch and shared by all blocks, and of a few
parameters of the block. Time differences are int64 ticks until they become float seconds.
"""

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

Channel = Tuple[str, Sequence[Tensor]]
"""A token-mixing channel: its map's name and parameters, as `token_mixing` describes them."""
NUM_BUCKETS = 128
"""Largest bucket of the bucketed map; its table has one entry more (FuXi-α section 3.3, as in HSTU's code)."""










def _pow(log1p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * torch.exp(-b * log1p)


def _exp(seconds: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * torch.exp(-torch.exp(b) * seconds.clamp(min=0))


def _log(seconds: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * torch.log(1 + b * seconds.clamp(min=0)) + c


def _linear(seconds: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * seconds + b


def _sin(seconds: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return c * torch.sin(a * seconds + b) + d


def _mixed(seconds: Tensor, *p: Tensor) -> Tensor:
    pow_a, pow_b, exp_a, exp_b, log_a, log_b, log_c, lin_a, lin_b, sin_a, sin_b, sin_c, sin_d = p
    total = _pow(seconds.clamp(min=0).log1p(), pow_a, pow_b) + _exp(seconds, exp_a, exp_b)
    total = total + _log(seconds, log_a, log_b, log_c) + _linear(seconds, lin_a, lin_b)
    return (total + _sin(seconds, sin_a, sin_b, sin_c, sin_d)) / 5


def _nn(
    seconds: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
) -> Tensor:
    # The product is rounded before the sum, as in the research code: phases are large, and a fused product moves them.
    hidden = torch.sin(seconds[..., None] * weight_1[:, 0] + bias_1)
    hidden = F.silu(F.linear(hidden, weight_2, bias_2))
    return F.linear(hidden, weight_3, bias_3)[..., 0]


def _bucketed(bucket: Tensor, weight: Tensor) -> Tensor:
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
    """A map of time: f(feature, *params), its feature, and the closed form of its gradients.

    `backward(feature, unit, grad, *params)` gives the parameters' gradients of sum(grad * f) and overwrites grad. With
    `unit`, f = params[0] * unit(feature, *params), and the factor is applied to the mixed output, which is smaller than
    the map.
    """

    feature: str
    evaluate: Callable[..., Tensor]
    backward: Callable[..., List[Tensor]]
    unit: Optional[Callable[..., Tensor]] = None

    def factored(self, feature: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Makes a fresh tensor u with f = factor(params) * u."""
        return (self.unit or self.evaluate)(feature, *params)

    def factor(self, params: Sequence[Tensor]) -> Optional[Tensor]:
        """Returns the factor that was left out of `factored`."""
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
