"""What the parts share: where they run, a case, and how a case is timed."""

import gc
import statistics
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List

import torch

from benchmarks.gpu.sizes import Sizes

Row = Dict[str, Any]
"""What a case found: keys that the part's COLUMNS show, and others for the JSON; seconds, bytes, FLOPs."""
Step = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where and how large a part runs. stack: closed when the part ends."""

    device: torch.device
    sizes: Sizes
    stack: ExitStack = field(default_factory=ExitStack)
    folder: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Case:
    """A piece of a part that may fail alone. name: unique within the part."""

    name: str
    run: Callable[[], Row]


def interleaved_seconds(steps: Dict[str, Step], place: Place) -> Dict[str, float]:
    """Times steps in turns after a warm-up, each turn by CUDA events (by the clock on a CPU); returns medians."""
    for _ in range(2):  # the first one tunes kernels, or compiles
        took = 0.0
        for step in steps.values():
            wait(place)
            start = time.perf_counter()
            step()
            wait(place)
            took += time.perf_counter() - start
    least, most = place.sizes.turns
    turns = max(least, min(most, int(place.sizes.seconds / max(took, 1e-9))))
    marks: Dict[str, List[Any]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            before = _mark(place)
            step()
            marks[name].append((before, _mark(place)))
    wait(place)
    return {name: statistics.median(_between(*pair) for pair in pairs) for name, pairs in marks.items()}


def _mark(place: Place) -> Any:
    if not place.is_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def wait(place: Place) -> None:
    """Waits until the device has done all it was told."""
    if place.is_gpu:
        torch.cuda.synchronize(place.device)


def free(place: Place) -> None:
    """Gives memory back between cases."""
    gc.collect()
    if place.is_gpu:
        torch.cuda.empty_cache()


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Lets float32 products of PyTorch's use TF32 ("high") or not ("highest"), as its default is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def times_of(tokens: int, device: torch.device) -> torch.Tensor:
    """Makes int64 seconds, ascending, one more than tokens."""
    return (978_300_000 + torch.randint(0, 5000, (tokens + 1,)).cumsum(0)).to(device)
