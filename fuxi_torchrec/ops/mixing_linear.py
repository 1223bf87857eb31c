"""Token mixing in O(n log n): Toeplitz products by FFT, temporal maps by scans over chunks; one user at a time.

Users up to LINEAR_FROM rows are left to `mixing_blocked`, which is faster there. Of the temporal maps, `pow` is a sum of
exponentials (to a tolerance) and `exp` is one; others have no linear form here.

Shapes: T tokens, H heads, d value size per head, E = H * d, C channels, n rows of one user, K exponentials.
"""

from typing import List, Sequence

import torch
from torch import Tensor

from fuxi_torchrec.ops.exponential_scan import (
    Factors,
    ScanGradients,
    chunked,
    exponential_factors,
    power_factors,
    scan_backward,
    scan_forward,
)
from fuxi_torchrec.ops.exponential_sums import power_law_sum
from fuxi_torchrec.ops.time_maps import Channel
from fuxi_torchrec.ops.toeplitz import toeplitz_backward, toeplitz_forward

LINEAR_FORMS = ("positional", "zero", "pow", "exp")
"""Channels that this implementation computes."""
LARGEST_EXPONENT = 80.0
"""b of `exp` is taken to be at most this: e^b stays a number, and a gap of zero stays one."""


def linear_forward(y_nHCd: Tensor, v_nHd: Tensor, channels: Sequence[Channel], features, tolerance: float) -> None:
    """Writes one user's mixed rows. features: per channel, what `gap_features` made of the user's times."""
    n, H, d = v_nHd.shape
    for c, (name, params) in enumerate(channels):
        y_nHd = y_nHCd[:, :, c]
        if name == "zero":
            y_nHd.zero_()
        elif name == "positional":
            toeplitz_forward(y_nHd, v_nHd, params[0][:n])
        else:
            factors = _factors(name, params, features[c], tolerance)
            mixed_MLE = scan_forward(chunked(v_nHd.flatten(1)), factors)
            torch.mul(mixed_MLE.flatten(0, 1)[:n].view(n, H, d), params[0], out=y_nHd)


def linear_backward(
    grad_v_nHd: Tensor, grad_nHCd: Tensor, v_nHd: Tensor, channels: Sequence[Channel], features, tolerance: float
) -> List[Tensor]:
    """Adds one user's gradient to grad_v (contiguous) and returns the parameters'."""
    n = len(v_nHd)
    grad_params: List[Tensor] = []
    for c, (name, params) in enumerate(channels):
        grad_nHd = grad_nHCd[:, :, c]
        if name == "positional":
            grad_weight_N = torch.zeros_like(params[0])
            grad_weight_N[:n] = toeplitz_backward(grad_v_nHd, grad_nHd, v_nHd, params[0][:n])
            grad_params.append(grad_weight_N)
        elif name != "zero":
            grad_params += _temporal_backward(grad_v_nHd, grad_nHd, v_nHd, name, params, features[c], tolerance)
    return grad_params


def _factors(name: str, params: Sequence[Tensor], features: Sequence[Tensor], tolerance: float) -> Factors:
    if name == "exp":
        return exponential_factors(features, _rate(params[1]))
    weights_K, _ = power_law_sum(tolerance).weights_K(params[1])
    return power_factors(features, params[1], weights_K.to(params[1].dtype))


def _rate(b: Tensor) -> Tensor:
    return b.clamp(max=LARGEST_EXPONENT).exp()


def _temporal_backward(grad_v_nHd, grad_nHd, v_nHd, name, params, features, tolerance) -> List[Tensor]:
    n = len(v_nHd)
    a, b = params
    factors = _factors(name, params, features, tolerance)
    v_MLE, grad_MLE = chunked(v_nHd.flatten(1)), chunked(grad_nHd.flatten(1))
    grad_v_nE = grad_v_nHd.flatten(1)
    padded_MLE = chunked(grad_v_nE)  # grad_v itself where no row is missing
    grads = scan_backward(padded_MLE, grad_MLE, v_MLE, factors, a)
    if n < padded_MLE.shape[:2].numel():
        grad_v_nE.copy_(padded_MLE.flatten(0, 1)[:n])
    return (_exp_gradients if name == "exp" else _pow_gradients)(grads, grad_MLE, v_MLE, factors, features, a, b, tolerance)


def _pow_gradients(grads: ScanGradients, grad_MLE, v_MLE, factors: Factors, features, a, b, tolerance) -> List[Tensor]:
    weights_K, slopes_K = (x.to(b.dtype) for x in power_law_sum(tolerance).weights_K(b))
    by_a = grads.near_MLL.sum() + weights_K @ grads.weights_K
    by_b = slopes_K @ grads.weights_K - torch.dot(grads.near_MLL.view(-1), features[0].reshape(-1))
    return [by_a.view_as(a), (a * by_b).view_as(b)]


def _exp_gradients(grads: ScanGradients, grad_MLE, v_MLE, factors: Factors, features, a, b, tolerance) -> List[Tensor]:
    near_MLL, read_XL1, write_XL1, hop_X1 = features
    states, by_states = grads.states_XKE, grads.grad_states_XKE
    by_rate = torch.dot(grads.near_MLL.view(-1), near_MLL.reshape(-1))
    by_rate += ((grad_MLE[1:].to(states.dtype) @ states.mT) * factors.read_XLK * read_XL1).sum()
    by_rate += ((v_MLE[:-1].to(states.dtype) @ by_states.mT) * factors.write_XLK * write_XL1).sum()
    by_rate += (torch.linalg.vecdot(by_states[1:], states[:-1]) * factors.hop_XK[1:] * hop_X1[1:]).sum()
    by_b = torch.where(b < LARGEST_EXPONENT, -a * _rate(b) * by_rate, 0)
    return [(grads.near_MLL.sum() + grads.weights_K.sum()).view_as(a), by_b.view_as(b)]
