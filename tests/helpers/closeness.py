"""Asserts that results which are sums are as close as `fuxi_torchrec.ops.closeness` derives."""

import torch

from fuxi_torchrec.ops.closeness import UNDERFLOW, mixing_sizes, rounding

__all__ = ["assert_sums_close", "mixing_sizes", "rounding"]


def assert_sums_close(actual, expected, sizes, tolerance: float) -> None:
    """Compares tensors, each to `tolerance` times the largest of its `sizes`, the sums of absolute values."""
    assert len(actual) == len(expected) == len(sizes)
    for a, e, size in zip(actual, expected, sizes):
        assert a.shape == e.shape == size.shape
        assert torch.isfinite(a).all()
        assert e.numel() == 0 or (a - e).abs().max() <= tolerance * size.max() + UNDERFLOW
