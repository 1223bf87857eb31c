"""torch's memory snapshot: what holds a GPU's memory, with the stack of every allocation, when an allocation fails."""

import os
from typing import Optional

from fuxi_torchrec.distributed import private_api
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.files import file_aside

FOLDER = "memory"
ENTRIES = 100_000
"""Allocations and frees that are kept, the newest. Each takes a few kilobytes of host memory."""


class MemorySnapshot:
    """The allocations of this process's GPU, recorded from `begin` on, and written when one fails.

    Args:
        wanted: False: nothing is recorded.
        run_folder: takes memory/rank_K.pickle.

    Attributes:
        path: the file, once it is written.
    """

    def __init__(self, wanted: bool, run_folder: str):
        self.wanted, self.folder = wanted, os.path.join(run_folder, FOLDER)
        self.path: Optional[str] = None
        self._rank = 0

    def begin(self, world: World) -> None:
        """Starts recording, where there is a GPU."""
        if self.wanted and world.device.type == "cuda":
            self._rank = world.rank
            private_api.record_memory_history(ENTRIES)
            private_api.on_out_of_memory(self._write)

    def _write(self, device: int, asked: int, total: int, free: int) -> None:
        """Called by the allocator before it raises: what is held then is still there."""
        path = os.path.join(self.folder, f"rank_{self._rank}.pickle")
        try:
            os.makedirs(self.folder, exist_ok=True)
            with file_aside(path) as aside:
                private_api.dump_memory_snapshot(aside)
        except OSError:  # a full disk; the error of the memory follows, and is what matters
            return
        self.path = path
