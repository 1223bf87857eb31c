"""What the Triton kernels share: whether they can run here, and which tile sizes are tried. No GPU has timed any yet.

Triton itself is imported by the kernels' modules alone, and those only when a kernel is asked for: CPU builds of torch
bring none. With TRITON_INTERPRET=1 set before the first import the kernels run on a CPU, slowly, for tests.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Callable, Dict, Protocol, Sequence, Tuple

import torch
from torch import Tensor

Tiles = Tuple[Dict[str, int], int, int]
"""Tile sizes by their names in the kernel, warps, pipeline stages."""


class Launcher(Protocol):
    """A kernel: kernel[grid] launches it on its arguments."""

    def __getitem__(self, grid: object) -> Callable[..., object]: ...


IS_INSTALLED = find_spec("triton") is not None


@lru_cache(maxsize=1)
def is_interpreting() -> bool:
    """Tells whether kernels run in Triton's interpreter, on a CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check_can_run(x: Tensor, what: str) -> None:
    """Checks that a Triton kernel can run on x. For the operators' bodies: torch.compile cannot trace it. Raises
    RuntimeError, with what to do."""
    if not IS_INSTALLED:
        raise RuntimeError(
            f"{what}: the triton package is not installed; CUDA builds of torch bring it, elsewhere choose another "
            f"implementation"
        )
    if x.device.type != "cuda" and not is_interpreting():
        raise RuntimeError(
            f"{what}: Triton kernels need CUDA tensors, these are on {x.device.type}; choose another implementation (or "
            f"set TRITON_INTERPRET=1 before triton is imported, to test)"
        )


def power_of_two(n: int, least: int = 16) -> int:
    """Returns the smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def tuned(kernel: Launcher, tiles: Sequence[Tiles], key: Sequence[str]) -> Launcher:
    """Fills in a kernel's tile sizes: the fastest of those given, tried at the first call for each value of the
    arguments in `key`. Launched as kernel[grid](...)."""
    import triton

    configs = [triton.Config(dict(sizes), num_warps=warps, num_stages=stages) for sizes, warps, stages in tiles]
    return triton.autotune(configs, key=list(key))(kernel)


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """Makes a context in which launches go to x's GPU; it does nothing for a CPU."""
    return torch.cuda.device_of(x)
