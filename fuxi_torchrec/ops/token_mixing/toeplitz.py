"""Causal Toeplitz products y[i] = Σ_{j <= i} weight[i - j] v[j] by FFT, O(n log n), and their gradients.

On a CPU in float32 by the C kernel of `ops.native`, all users at once; otherwise by torch.fft, a user and some heads at a
time, so that the transforms stay in the cache and memory is that of a few columns.

Shapes: T tokens, H heads, d columns each, E = H * d; n rows of one user, N weights (as many as the longest user has rows,
or more), e columns of a transform, S its length, F frequencies.
"""

import functools
import math
from typing import Callable, List, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor

from fuxi_torchrec.ops.native import library as native

COLUMNS = 128
"""Columns that torch.fft transforms together."""


def toeplitz_forward(y_THd: Tensor, v_THd: Tensor, users: Sequence[Tuple[int, int]], weight_N: Tensor) -> None:
    """Writes the products of users given as (first row, length); weight[k] is that of lag k. Tensors may be strided.

    Raises:
        ValueError: other shapes, a user's rows beyond the tensors', or fewer weights than the longest user has rows.
    """
    _check(users, weight_N, v_THd, y_THd)
    if _in_c(y_THd, v_THd, weight_N):
        plan = _plan(tuple(users))
        native.call("toeplitz_forward", *_rows(v_THd), *_rows(y_THd), weight_N.contiguous(), len(weight_N), *plan, _E(v_THd))
        return
    for first, n in users:
        _forward(y_THd[first : first + n], v_THd[first : first + n], weight_N[:n])


def toeplitz_backward(
    grad_v_THd: Tensor, grad_THd: Tensor, v_THd: Tensor, users: Sequence[Tuple[int, int]], weight_N: Tensor
) -> Tensor:
    """Adds v's gradient to grad_v and returns the weights', [N]; tensors and errors as in `toeplitz_forward`."""
    _check(users, weight_N, v_THd, grad_THd, grad_v_THd)
    grad_weight_N = torch.zeros_like(weight_N, memory_format=torch.contiguous_format)
    if _in_c(grad_v_THd, grad_THd, v_THd, weight_N):
        rows = (*_rows(v_THd), *_rows(grad_THd), *_rows(grad_v_THd))
        weights = (weight_N.contiguous(), grad_weight_N, len(weight_N))
        native.call("toeplitz_backward", *rows, *weights, *_plan(tuple(users)), _E(v_THd))
        return grad_weight_N
    for first, n in users:
        own = slice(first, first + n)
        grad_weight_N[:n] += _backward(grad_v_THd[own], grad_THd[own], v_THd[own], weight_N[:n])
    return grad_weight_N


def _in_c(*tensors: Tensor) -> bool:
    return native.is_chosen("linear_mixing") and native.usable(*tensors)


def _check(users: Sequence[Tuple[int, int]], weight_N: Tensor, v_THd: Tensor, *others: Tensor) -> None:
    if any(x.shape != v_THd.shape for x in others):
        raise ValueError(f"shapes differ: {[tuple(x.shape) for x in (v_THd, *others)]}")
    for first, n in users:
        if first < 0 or n < 1 or first + n > len(v_THd):
            raise ValueError(f"a user's rows {first} to {first + n} of {len(v_THd)} rows")
    longest = max((n for _, n in users), default=0)
    if weight_N.ndim != 1 or len(weight_N) < longest:
        raise ValueError(f"lag weights of shape {tuple(weight_N.shape)} for a sequence of {longest}")


def transform_length(least: int) -> int:
    """Finds the smallest 2^a, 3 * 2^a or 5 * 2^a that is not below `least`."""
    return min(odd << max(0, math.ceil(math.log2(least / odd))) for odd in (1, 3, 5))


class _Plan(NamedTuple):
    """users_U4: first row, length, S and the place of its table; sizes_2: every S and that place; tables_S4: for each S,
    its roots of unity and twists (toeplitz.c); rows of tables_S4."""

    users_U4: Tensor
    users: int
    sizes_2: Tensor
    sizes: int
    tables_S4: Tensor
    rows: int


@functools.lru_cache(maxsize=8)
def _plan(users: Tuple[Tuple[int, int], ...]) -> _Plan:
    lengths = {n: transform_length(n) for _, n in users}
    sizes, places, rows = sorted(set(lengths.values())), {}, 0
    for size in sizes:
        places[size] = rows
        rows += size
    users_U4 = _on_host([(first, n, lengths[n], places[lengths[n]]) for first, n in users])
    sizes_2 = _on_host(list(places.items()))
    return _Plan(users_U4, len(users), sizes_2, len(sizes), torch.cat([_table(size) for size in sizes]), rows)


def _on_host(rows: Sequence[Union[int, Tuple[int, ...]]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=64)
def _table(size: int) -> Tensor:
    k = torch.arange(size, dtype=torch.float64, device="cpu") * math.pi / size
    return torch.stack([torch.cos(2 * k), -torch.sin(2 * k), torch.cos(k / 2), torch.sin(k / 2)], 1).float()


def _rows(x_THd: Tensor) -> Tuple[Tensor, int, Tensor]:
    """A strided tensor as the kernel takes it: its memory, the distance between rows, the places of a row's columns."""
    return x_THd, x_THd.stride(0), _columns(*x_THd.shape[1:], *x_THd.stride()[1:])


@functools.lru_cache(maxsize=64)
def _columns(heads: int, width: int, head_stride: int, stride: int) -> Tensor:
    return _on_host([head * head_stride + column * stride for head in range(heads) for column in range(width)])


def _E(x_THd: Tensor) -> int:
    return x_THd.shape[1] * x_THd.shape[2]


def _forward(y_nHd: Tensor, v_nHd: Tensor, weight_n: Tensor) -> None:
    n, H, d = v_nHd.shape
    S = transform_length(2 * n)
    weight_F = torch.fft.rfft(weight_n.to(_wide_type(v_nHd)), n=S)
    for heads in _head_pieces(H, d):
        spectrum_eF = _spectrum(v_nHd[:, heads], S)
        spectrum_eF *= weight_F
        _columns_to_rows(torch.fft.irfft(spectrum_eF, n=S), y_nHd[:, heads], Tensor.copy_)


def _backward(grad_v_nHd: Tensor, grad_nHd: Tensor, v_nHd: Tensor, weight_n: Tensor) -> Tensor:
    n, H, d = v_nHd.shape
    S = transform_length(2 * n)
    weight_F = torch.fft.rfft(weight_n.to(_wide_type(v_nHd)), n=S).conj().resolve_conj()
    grad_weight_F = torch.zeros_like(weight_F)
    for heads in _head_pieces(H, d):
        grad_eF = _spectrum(grad_nHd[:, heads], S)
        grad_weight_F += torch.linalg.vecdot(_spectrum(v_nHd[:, heads], S), grad_eF, dim=0)
        grad_eF *= weight_F
        _columns_to_rows(torch.fft.irfft(grad_eF, n=S), grad_v_nHd[:, heads], Tensor.add_)
    return torch.fft.irfft(grad_weight_F, n=S)[:n]


def _wide_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _head_pieces(heads: int, width: int) -> List[slice]:
    step = max(1, COLUMNS // width)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _spectrum(x_nHd: Tensor, length: int) -> Tensor:
    """[e, F]: the columns' transforms, zero-padded to `length`."""
    x_ne = x_nHd.to(_wide_type(x_nHd)).reshape(len(x_nHd), -1)
    # Contiguous to contiguous is what PyTorch transposes fast.
    padded_eS = x_ne.new_zeros(x_ne.shape[1], length)
    padded_eS[:, : len(x_ne)] = x_ne.contiguous().T.contiguous()
    return torch.fft.rfft(padded_eS)


def _columns_to_rows(columns_eS: Tensor, out_nHd: Tensor, how: Callable[[Tensor, Tensor], object]) -> None:
    n, H, d = out_nHd.shape
    how(out_nHd, columns_eS[:, :n].view(H, d, n).permute(2, 0, 1))


def lag_strip(weight_N: Tensor, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Makes the Toeplitz rows first .. first + rows - 1, [R, W]: weight[i - j], zero where j > i."""
    used = weight_N[: first + rows].to(dtype)
    reversed_padded = torch.cat([used.flip(0), used.new_zeros(rows)])
    return reversed_padded.unfold(0, first + rows, 1)[:rows].flip(0)


def sum_diagonals(grad_weight_N: Tensor, grad_RW: Tensor, first: int) -> None:
    """Adds the gradient of `lag_strip`'s weights."""
    R, W = grad_RW.shape
    skewed = grad_RW.new_zeros(R * (W + R - 1))
    skewed.as_strided((R, W), (W + R - 2, 1), R - 1).copy_(grad_RW)
    by_lag = skewed.view(R, W + R - 1).sum(0)[:W].flip(0)
    grad_weight_N[:W] += by_lag
