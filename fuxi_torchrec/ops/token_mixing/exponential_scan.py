"""The temporal channel of one user in O(n): exact inside chunks, sums of exponentials between them.

For row i of chunk m and an event j of an earlier chunk, t_{i+1} - t_j = (t_{i+1} - τ_m) + (τ_m - t_j), τ_m the time of
the chunk's first event. All that chunk m needs of its past is therefore K states S_m = Σ_j e^(-λ_k (τ_m - t_j)) v_j,
and S_{m+1} = hop_m S_m + Σ_{j in chunk m} e^(-λ_k (τ_{m+1} - t_j)) v_j. Every exponent is a difference between
neighbouring chunks and not positive: nothing overflows, and what underflows is nothing.

Shapes: n rows of one user, padded to M chunks of L = CHUNK rows; E columns, K exponentials; X = M - 1 chunks that have
a successor, or a predecessor.
"""

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuxi_torchrec.ops.token_mixing.exponential_sums import ExponentialSum

CHUNK = 128
"""Rows of a chunk."""


def feature_shapes(rows: int, K: int) -> List[Tuple[int, ...]]:
    """Returns the shapes of what `gap_seconds` and `power_features` return for a user of `rows` events."""
    M = -(-rows // CHUNK)
    return [(M, CHUNK, CHUNK), (M - 1, CHUNK, K), (M - 1, CHUNK, K), (M - 1, K)]


def feature_size(rows: int, K: int) -> int:
    """Counts the elements of a user's features."""
    return sum(math.prod(shape) for shape in feature_shapes(rows, K))


def feature_views(flat: Tensor, rows: int, K: int) -> List[Tensor]:
    """Cuts a user's features out of one flat tensor of `feature_size` elements."""
    shapes = feature_shapes(rows, K)
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(shape) for shape in shapes]), shapes)]


def gap_seconds(times_n: Tensor, next_n: Tensor, time_unit: float, dtype: torch.dtype) -> List[Tensor]:
    """Time gaps in seconds, at least 0: near_MLL inside the chunks, from each event to each row's next time; read_XL1
    from a chunk's first time to its rows' next times; write_XL1 from an event to the next chunk's first time; hop_X1
    between chunks' first times. times and next are int64 ticks."""
    past_ML, next_ML = _chunked_times(times_n), _chunked_times(next_n)
    first_M = past_ML[:, 0]
    ticks = (
        next_ML[:, :, None] - past_ML[:, None, :],
        (next_ML[1:] - first_M[1:, None])[..., None],
        (first_M[1:, None] - past_ML[:-1])[..., None],
        first_M.diff()[:, None],
    )
    return [gap.clamp_(min=0).to(dtype).mul_(time_unit) for gap in ticks]


def _chunked_times(times_n: Tensor) -> Tensor:
    missing = -len(times_n) % CHUNK
    return torch.cat([times_n, times_n[-1:].expand(missing)]).view(-1, CHUNK)


def power_features(gaps: Sequence[Tensor], power: ExponentialSum) -> List[Tensor]:
    """What (1 + x)^(-b) reads of the gaps, whatever b: log1p of near gaps, exponentials of the others."""
    near_MLL, *far = gaps
    rates_K = power.rates_K(near_MLL.device).to(near_MLL.dtype)
    return [near_MLL.log1p_(), *(_decay(gap * rates_K) for gap in far)]


def _decay(exponent: Tensor) -> Tensor:
    """e^(-exponent), overwriting; zero where the product of two of them would be denormal. (Denormal numbers are slow, and
    so is an exponential that underflows: 8x on a CPU.)"""
    smallest = torch.finfo(exponent.dtype).tiny ** 0.5
    # (torch's stubs leave threshold_ out.)
    return F.threshold_(  # type: ignore[attr-defined]
        exponent.clamp_(max=1 - math.log(smallest)).neg_().exp_(), smallest, 0.0)


@dataclass
class Factors:
    """The factors of a map: output = near v + read (weights * S). near_MLL is zero above the diagonals."""

    near_MLL: Tensor
    read_XLK: Tensor
    write_XLK: Tensor
    hop_XK: Tensor
    weights_K: Optional[Tensor] = None


def power_factors(features: Sequence[Tensor], b: Tensor, weights_K: Tensor) -> Factors:
    """Makes the factors of (1 + x)^(-b), from `power_features`."""
    log_MLL, read_XLK, write_XLK, hop_XK = features
    return Factors(torch.mul(log_MLL, -b).exp_().tril_(), read_XLK, write_XLK, hop_XK, weights_K)


def exponential_factors(gaps: Sequence[Tensor], rate: Tensor) -> Factors:
    """Makes the factors of e^(-rate x), from `gap_seconds`: one exponential."""
    near_MLL, *far = (_decay(gap * rate) for gap in gaps)
    return Factors(near_MLL.tril_(), *far)


def chunked(x_nE: Tensor) -> Tensor:
    """Cuts [n, E] into [M, L, E], zero-padded; a view where nothing is missing."""
    missing = -len(x_nE) % CHUNK
    return (F.pad(x_nE, (0, 0, 0, missing)) if missing else x_nE).unflatten(0, (-1, CHUNK))


def scan_forward(v_MLE: Tensor, factors: Factors) -> Tensor:
    """Computes the mixed rows, [M, L, E] in v's type."""
    dtype = v_MLE.dtype
    y_MLE = torch.bmm(factors.near_MLL.to(dtype), v_MLE)
    if len(v_MLE) > 1:
        states_XKE = _states(v_MLE, factors).to(dtype)
        y_MLE[1:].baddbmm_(_weighted(factors.read_XLK, factors.weights_K).to(dtype), states_XKE)
    return y_MLE


def _states(v_MLE: Tensor, factors: Factors) -> Tensor:
    """S of every chunk but the first, [X, K, E] in the factors' type."""
    states_XKE = torch.bmm(factors.write_XLK.to(v_MLE.dtype).mT, v_MLE[:-1]).to(factors.hop_XK.dtype)
    hop_XK1 = factors.hop_XK[..., None]
    for m in range(1, len(states_XKE)):
        states_XKE[m].addcmul_(hop_XK1[m], states_XKE[m - 1])
    return states_XKE


def _weighted(factor_K: Tensor, weights_K: Optional[Tensor]) -> Tensor:
    return factor_K if weights_K is None else factor_K * weights_K


@dataclass
class ScanGradients:
    """Of the sum of grad * output, for amplitude 1. near_MLL: times the map, element by element; weights_K: by the
    exponentials' weights; states_XKE: S; grad_states_XKE: by S of the same chunks."""

    near_MLL: Tensor
    weights_K: Tensor
    states_XKE: Tensor
    grad_states_XKE: Tensor


def scan_backward(
    grad_v_MLE: Tensor, grad_MLE: Tensor, v_MLE: Tensor, factors: Factors, amplitude: Tensor
) -> ScanGradients:
    """Adds amplitude * v's gradient to grad_v; spoils the near map."""
    dtype = v_MLE.dtype
    near_MLL = torch.bmm(grad_MLE, v_MLE.mT).to(factors.near_MLL.dtype).mul_(factors.near_MLL)
    scaled_MLL = factors.near_MLL.mul_(amplitude).to(dtype)
    grad_v_MLE.baddbmm_(scaled_MLL.mT, grad_MLE)
    states_XKE = _states(v_MLE, factors)
    grad_states_XKE = torch.bmm(factors.read_XLK.to(dtype).mT, grad_MLE[1:]).to(states_XKE.dtype)
    grad_weights_K = torch.linalg.vecdot(grad_states_XKE, states_XKE).sum(0)
    if factors.weights_K is not None:
        grad_states_XKE *= factors.weights_K[:, None]
    hop_XK1 = factors.hop_XK[..., None]
    for m in reversed(range(len(states_XKE) - 1)):
        grad_states_XKE[m].addcmul_(hop_XK1[m + 1], grad_states_XKE[m + 1])
    scaled_XLK = (factors.write_XLK * amplitude).to(dtype)
    grad_v_MLE[:-1].baddbmm_(scaled_XLK, grad_states_XKE.to(dtype))
    return ScanGradients(near_MLL, grad_weights_K, states_XKE, grad_states_XKE)
