"""Token mixing in O(n log n), one user at a time: Toeplitz products by FFT, temporal maps by scans over chunks.

Of the temporal maps, `pow` is a sum of exponentials (to a tolerance) and `exp` is one (exactly); others have no linear
form here.

Shapes: H heads, d value size per head, C channels, n rows of one user, padded to M chunks of L rows; X = M - 1.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.ops.token_mixing.exponential_scan import (
    Factors,
    ScanGradients,
    chunked,
    exponential_factors,
    feature_size,
    feature_views,
    gap_seconds,
    power_factors,
    power_features,
    scan_backward,
    scan_forward,
)
from fuxi_torchrec.ops.token_mixing.exponential_sums import power_law_sum
from fuxi_torchrec.ops.token_mixing.time_gaps import Times
from fuxi_torchrec.ops.token_mixing.time_maps import Channel
from fuxi_torchrec.ops.token_mixing.toeplitz import toeplitz_backward, toeplitz_forward

LARGEST_EXPONENT = 80.0
"""b of `exp` is taken to be at most this, so that e^b stays a number."""


class LinearGaps:
    """The features of users' times that the temporal channel `name` reads; users are given as (first row, length).

    cached: what `all_users` returned; None: a user's features are made whenever they are asked for.
    """

    def __init__(
        self,
        name: str,
        users: Sequence[Tuple[int, int]],
        times: Times,
        dtype: torch.dtype,
        cached: Optional[Tensor] = None,
    ) -> None:
        self.name, self.users, self.times, self.dtype = name, users, times, dtype
        self.power = power_law_sum(times.tolerance)
        self._terms = 1 if name == "exp" else self.power.terms
        self._cached = None if cached is None else cached.split(self._sizes())

    def _sizes(self) -> List[int]:
        return [feature_size(length, self._terms) for _, length in self.users]

    def count(self) -> int:
        """Counts the entries of all users."""
        return sum(self._sizes())

    def all_users(self) -> List[Tensor]:
        """Makes every user's features, flat."""
        return [x.flatten() for user in range(len(self.users)) for x in self.of_user(user)]

    def of_user(self, user: int) -> List[Tensor]:
        """Returns a user's features, `gap_seconds` for `exp`, `power_features` for `pow`; not to be changed."""
        first, length = self.users[user]
        if self._cached is not None:
            return feature_views(self._cached[user], length, self._terms)
        times_n, next_n = (times_T[first : first + length] for times_T in self.times[:2])
        seconds = gap_seconds(times_n, next_n, self.times.time_unit, self.dtype)
        return seconds if self.name == "exp" else power_features(seconds, self.power)


def linear_forward(
    y_THCd: Tensor,
    v_THd: Tensor,
    users: Sequence[Tuple[int, int]],
    channels: Sequence[Channel],
    gaps: Dict[int, LinearGaps],
) -> None:
    """Writes the mixed rows of users given as (first row, length); gaps: of the temporal channels, by their number."""
    H, d = v_THd.shape[1:]
    for c, (name, params) in enumerate(channels):
        if name == "positional":
            toeplitz_forward(y_THCd[:, :, c], v_THd, users, params[0])
            continue
        for user, (first, n) in enumerate(users):
            y_nHd, v_nHd = y_THCd[first : first + n, :, c], v_THd[first : first + n]
            if name == "zero":
                y_nHd.zero_()
            else:
                factors = _factors(gaps[c], gaps[c].of_user(user), params[1])
                mixed_MLE = scan_forward(chunked(v_nHd.flatten(1)), factors)
                torch.mul(mixed_MLE.flatten(0, 1)[:n].view(n, H, d), params[0], out=y_nHd)


def linear_backward(
    grad_v_THd: Tensor,
    grad_THCd: Tensor,
    v_THd: Tensor,
    users: Sequence[Tuple[int, int]],
    channels: Sequence[Channel],
    gaps: Dict[int, LinearGaps],
) -> List[Tensor]:
    """Adds these users' gradient to grad_v (contiguous) and returns the parameters'."""
    grad_params: List[Tensor] = []
    for c, (name, params) in enumerate(channels):
        if name == "positional":
            grad_params.append(toeplitz_backward(grad_v_THd, grad_THCd[:, :, c], v_THd, users, params[0]))
            continue
        totals = [torch.zeros_like(p) for p in params]
        for user, (first, n) in enumerate(users):
            rows = slice(first, first + n)
            where = (grad_v_THd[rows], grad_THCd[rows, :, c], v_THd[rows])
            if name != "zero":
                for total, part in zip(totals, _temporal_backward(*where, gaps[c], user, params)):
                    total += part.view_as(total)
        grad_params += totals
    return grad_params


def _factors(gaps: LinearGaps, features: Sequence[Tensor], b: Tensor) -> Factors:
    if gaps.name == "exp":
        return exponential_factors(features, _rate(b))
    weights_K, _ = gaps.power.weights_K(b)
    return power_factors(features, b, weights_K.to(b.dtype))


def _rate(b: Tensor) -> Tensor:
    return b.clamp(max=LARGEST_EXPONENT).exp()


def _temporal_backward(
    grad_v_nHd: Tensor, grad_nHd: Tensor, v_nHd: Tensor, gaps: LinearGaps, user: int, params: Sequence[Tensor]
) -> List[Tensor]:
    n, (a, b) = len(v_nHd), params
    features = gaps.of_user(user)
    factors = _factors(gaps, features, b)
    v_MLE, grad_MLE = chunked(v_nHd.flatten(1)), chunked(grad_nHd.flatten(1))
    grad_v_nE = grad_v_nHd.flatten(1)
    grad_v_MLE = chunked(grad_v_nE)  # grad_v itself where no row is missing
    grads = scan_backward(grad_v_MLE, grad_MLE, v_MLE, factors, a)
    if grad_v_MLE.shape[:2].numel() > n:
        grad_v_nE.copy_(grad_v_MLE.flatten(0, 1)[:n])
    if gaps.name == "exp":
        return _exp_gradients(grads, grad_MLE, v_MLE, factors, features, a, b)
    weights_K, slopes_K = (x.to(b.dtype) for x in gaps.power.weights_K(b))
    by_b = slopes_K @ grads.weights_K - torch.dot(grads.near_MLL.view(-1), features[0].reshape(-1))
    return [grads.near_MLL.sum() + weights_K @ grads.weights_K, a * by_b]


def _exp_gradients(
    grads: ScanGradients,
    grad_MLE: Tensor,
    v_MLE: Tensor,
    factors: Factors,
    features: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
) -> List[Tensor]:
    near_MLL, read_XL1, write_XL1, hop_X1 = features
    states, by_states = grads.states_XKE, grads.grad_states_XKE
    by_rate = torch.dot(grads.near_MLL.view(-1), near_MLL.reshape(-1))
    by_rate += ((grad_MLE[1:].to(states.dtype) @ states.mT) * factors.read_XLK * read_XL1).sum()
    by_rate += ((v_MLE[:-1].to(states.dtype) @ by_states.mT) * factors.write_XLK * write_XL1).sum()
    by_rate += (torch.linalg.vecdot(by_states[1:], states[:-1]) * factors.hop_XK[1:] * hop_X1[1:]).sum()
    by_b = torch.where(b < LARGEST_EXPONENT, -a * _rate(b) * by_rate, 0)
    return [grads.near_MLL.sum() + grads.weights_K.sum(), by_b]
