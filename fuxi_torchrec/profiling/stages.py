"""The stages of a training step: ranges in a profiler's trace, and rows of the benchmark's table. One place names them."""

import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from typing import ContextManager, DefaultDict, Dict, Iterator, Optional

import torch

from fuxi_torchrec.distributed.private_api import is_profiling

STAGES = ("loader", "lookup and exchange", "encoder forward", "loss", "backward", "optimizer")
"""In the order of a step. A stage may come in several pieces; none lies inside another."""


class StageClock:
    """Seconds of each stage, added up in `seconds`. On CUDA it waits for the device at either end of a stage, so that
    each pays for its own kernels: for benchmarks, not for training."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: DefaultDict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the time of the enclosed code to the stage's seconds."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def take(self) -> Dict[str, float]:
        """Returns the seconds since the last call, by stage."""
        taken, self.seconds = {name: self.seconds[name] for name in STAGES}, defaultdict(float)
        return taken

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


_clock: Optional[StageClock] = None


def stage(name: str) -> ContextManager:
    """Marks the enclosed code as this stage of a step; costs nothing where nobody measures."""
    assert name in STAGES, name
    if _clock is not None:
        return _clock.timing(name)
    return torch.profiler.record_function(name) if is_profiling() else nullcontext()


@contextmanager
def clocked(clock: StageClock) -> Iterator[StageClock]:
    """Times every stage of this process by the clock, for as long as the context lasts."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield clock
    finally:
        _clock = before
