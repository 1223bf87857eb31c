"""How much memory a piece of work takes at its peak, what is said where there is too little, and what the C library keeps."""

import ctypes
import gc
import sys
from contextlib import contextmanager
from typing import Callable, Iterable, Iterator, Optional

import torch

from fuxi_torchrec.errors import UserError

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_MALLOC_TRIM = getattr(_C_LIBRARY, "malloc_trim", None)
# mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (mallopt(3)), and what training sets them to, in bytes.
_KEPT = {-1: 2**31 - 1, -3: 2**28}


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors for the next ones, instead of giving it back to the system, which hands it
    out again page by page, filled with zeros: a training step on a CPU allocates the same sizes as the one before. Does
    nothing with another C library."""
    mallopt = getattr(_C_LIBRARY, "mallopt", None)
    if mallopt is not None:
        for parameter, size in _KEPT.items():
            mallopt(parameter, size)


class PeakMemory:
    """Peak memory of a piece of work: bytes that this process holds on a device above what it held when this object
    was made. On a CPU it is resident memory, which Linux alone tells."""

    def __init__(self, device: torch.device):
        self.device = device
        _release()
        self.before = self._held()

    def restart(self) -> None:
        """Forgets the peak so far."""
        _release()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before is not None:
            with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
                file.write("5")  # forgets the peak so far (proc(5))

    def peak(self) -> Optional[int]:
        """Returns the peak since `restart` in bytes; None where the system does not tell."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(_status("VmHWM") - self.before, 0)

    def _held(self) -> Optional[int]:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            with open("/proc/self/clear_refs", "w", encoding="utf-8"):
                return _status("VmRSS")
        except OSError:
            return None


def available(device: torch.device) -> Optional[int]:
    """Returns the bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return _kilobytes(file, "MemAvailable")
    except OSError:
        return None


@contextmanager
def out_of_memory_as_user_error(
    what: str, advice: str, snapshot: Callable[[], Optional[str]] = lambda: None
) -> Iterator[None]:
    """Raises UserError for an allocation that fails inside: `what`: out of memory; `advice`; and the snapshot's path, where
    one was written."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, as a CPU's is
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        path = snapshot()
        held = "" if path is None else f"; what held it: {path} (https://pytorch.org/memory_viz opens it)"
        raise UserError(f"{what}: out of memory; {advice}{held}") from None


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return _kilobytes(file, field)


def _kilobytes(lines: Iterable[str], field: str) -> int:
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _release() -> None:
    """Gives back what the allocator keeps for later."""
    gc.collect()
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)
