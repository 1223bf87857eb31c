"""The random bits of the C kernels' dropout (vector.h) by PyTorch's operators: a function of seed, row and column alone."""

import numpy as np
import torch
from torch import Tensor

from fuxi_torchrec.ops.row_wise.native import Mask

_SIGN = 2**31


def kept_elements(mask: Mask, first_row: int, rows: int, width: int) -> Tensor:
    """Computes which elements of some rows a mask keeps, bool [rows, width]."""
    low_R1, high_R1 = _row_words(mask.seed, first_row, rows)
    h = torch.arange(width, dtype=torch.int32).mul_(_signed(0x9E3779B9)) + low_R1
    h.bitwise_xor_(_shifted(h, 16)).mul_(_signed(0x21F0AAAD))
    h.bitwise_xor_(_shifted(h, 15)).bitwise_xor_(high_R1).mul_(_signed(0x735A2D97))
    h.bitwise_xor_(_shifted(h, 15))
    # Unsigned numbers compare as signed ones do whose highest bit is the other one.
    return h.bitwise_xor_(-_SIGN).ge(mask.threshold - _SIGN)


def _row_words(seed: int, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """splitmix64 of the seed and each row: its low and its high 32 bits, int32 [rows, 1]."""
    z = np.arange(first_row + 1, first_row + 1 + rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    low, high = ((z >> np.uint64(shift)).astype(np.uint32).view(np.int32)[:, None] for shift in (0, 32))
    return torch.from_numpy(low), torch.from_numpy(high)


def _shifted(h: Tensor, count: int) -> Tensor:
    """h >> count of unsigned numbers."""
    return (h >> count).bitwise_and_((1 << (32 - count)) - 1)


def _signed(word: int) -> int:
    return word - 2**32 if word >= _SIGN else word
