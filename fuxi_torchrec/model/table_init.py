"""Initial rows of the item table, the same under any sharding."""

import numpy as np
import torch
from torch import Tensor

INIT_ROWS = 4096


@torch.no_grad()
def init_rows(part: Tensor, seed: int, width: int, first_row: int = 0, first_column: int = 0) -> Tensor:
    """Fills rows [first_row, …) and columns [first_column, …) of a table `width` wide: normal, σ = 0.02, truncated at
    2 σ (docs/models.md, "Input"). Drawn on the CPU, so that a GPU starts from the same values."""
    rows, columns = part.shape
    last_row = first_row + rows
    for block in range(first_row // INIT_ROWS, -(-last_row // INIT_ROWS)):
        begin = block * INIT_ROWS
        start, stop = max(begin, first_row), min(begin + INIT_ROWS, last_row)
        drawn = _truncated_normal(np.random.default_rng([seed, block, 2]), INIT_ROWS * width).reshape(INIT_ROWS, width)
        values = drawn[start - begin : stop - begin, first_column : first_column + columns]
        part[start - first_row : stop - first_row].copy_(torch.from_numpy(values))
    return part


def _truncated_normal(random: np.random.Generator, count: int) -> np.ndarray:
    """float32 draws; those beyond 2 σ are drawn again. A fifth of nn.init.trunc_normal_'s time."""
    drawn = random.standard_normal(count, dtype=np.float32)
    beyond = np.flatnonzero(np.abs(drawn) > 2)
    while len(beyond):
        drawn[beyond] = random.standard_normal(len(beyond), dtype=np.float32)
        beyond = beyond[np.abs(drawn[beyond]) > 2]
    return drawn * np.float32(0.02)
