"""Causal Toeplitz products y[i] = Σ_{j <= i} weight[i - j] v[j] by FFT: O(n log n), and their gradients.

Columns are worked off some heads at a time, so that the transforms stay in the cache and memory is that of a few columns.

Shapes: n rows of one user, H heads, d columns each, e columns of a transform, L its length, F = L / 2 + 1 frequencies.
"""

from typing import List

import torch
from torch import Tensor

COLUMNS = 128
"""Columns that are transformed together."""


def transform_length(rows: int) -> int:
    """The smallest even 2^a 3^b 5^c that holds a causal product of `rows` rows without wrapping round."""
    least, best = max(2, 2 * rows - 1), 1 << max(1, (2 * rows - 1).bit_length())
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            length = threes * 2
            while length < least:
                length *= 2
            best = min(best, length)
            threes *= 3
        fives *= 5
    return best


def toeplitz_forward(y_nHd: Tensor, v_nHd: Tensor, weight_n: Tensor) -> None:
    """Writes the product into y; weight_n[k] is that of lag k. Every tensor may be strided."""
    n, H, d = v_nHd.shape
    L = transform_length(n)
    weight_F = torch.fft.rfft(weight_n.to(_wide_type(v_nHd)), n=L)
    for heads in _head_pieces(H, d):
        spectrum_eF = _spectrum(v_nHd[:, heads], L)
        spectrum_eF *= weight_F
        _write_columns(y_nHd[:, heads], torch.fft.irfft(spectrum_eF, n=L))


def toeplitz_backward(grad_v_nHd: Tensor, grad_nHd: Tensor, v_nHd: Tensor, weight_n: Tensor) -> Tensor:
    """Adds v's gradient to grad_v and returns the weights' [n]."""
    n, H, d = v_nHd.shape
    L = transform_length(n)
    weight_F = torch.fft.rfft(weight_n.to(_wide_type(v_nHd)), n=L).conj().resolve_conj()
    grad_weight_F = torch.zeros_like(weight_F)
    for heads in _head_pieces(H, d):
        grad_eF = _spectrum(grad_nHd[:, heads], L)
        grad_weight_F += torch.linalg.vecdot(_spectrum(v_nHd[:, heads], L), grad_eF, dim=0)
        grad_eF *= weight_F
        _add_columns(grad_v_nHd[:, heads], torch.fft.irfft(grad_eF, n=L))
    return torch.fft.irfft(grad_weight_F, n=L)[:n]


def _wide_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _head_pieces(heads: int, width: int) -> List[slice]:
    step = max(1, COLUMNS // width)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _spectrum(x_nHd: Tensor, length: int) -> Tensor:
    """[e, F]: the columns' transforms, zero-padded to `length`."""
    x_ne = x_nHd.to(_wide_type(x_nHd)).reshape(len(x_nHd), -1)
    # Contiguous to contiguous is what PyTorch transposes fast.
    padded_eL = x_ne.new_zeros(x_ne.shape[1], length)
    padded_eL[:, : len(x_ne)] = x_ne.contiguous().T.contiguous()
    return torch.fft.rfft(padded_eL)


def _write_columns(out_nHd: Tensor, columns_eL: Tensor) -> None:
    n, H, d = out_nHd.shape
    out_nHd.copy_(columns_eL[:, :n].view(H, d, n).permute(2, 0, 1))


def _add_columns(out_nHd: Tensor, columns_eL: Tensor) -> None:
    n, H, d = out_nHd.shape
    out_nHd += columns_eL[:, :n].view(H, d, n).permute(2, 0, 1)
