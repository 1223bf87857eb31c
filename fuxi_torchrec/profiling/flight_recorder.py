"""torch's flight recorder: the last collectives of every rank, in files of the run folder once a rank was lost."""

import os
from contextlib import contextmanager
from typing import Iterator

from fuxi_torchrec.distributed.private_api import flight_recorder_trace
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import LostProcess
from fuxi_torchrec.files import file_aside

FOLDER = "flight_recorder"
GLOO, NCCL = "gloo_rank_", "nccl_rank_"
"""What the files' names begin with; the rank's number follows. The two record apart from each other."""


class FlightRecorder:
    """The recorder of this process, to be made before its process groups: they read the environment then.

    Args:
        wanted: False: nothing is set, and nothing is written.
        run_folder: takes flight_recorder/.
    """

    def __init__(self, wanted: bool, run_folder: str):
        self.wanted, self.folder = wanted, os.path.join(run_folder, FOLDER)
        self._begun = False
        if wanted:  # what the user has set stays
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives; 0, of older versions, records none
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.path.join(os.path.abspath(self.folder), NCCL))

    def begin(self, world: World) -> None:
        """Allows files in the run folder, which is this run's from here on. NCCL's thread, which writes its own at a
        timeout, makes no folder."""
        self._begun = self.wanted and world.size > 1
        if self._begun:
            os.makedirs(self.folder, exist_ok=True)

    @contextmanager
    def written_when_lost(self, world: World) -> Iterator[None]:
        """Writes what gloo's recorder holds when a LostProcess passes, and names the file in the error."""
        try:
            yield
        except LostProcess as error:
            if not self._begun:
                raise
            lost = LostProcess(f"{error}; {self._write(world.rank)}")
            lost.reported = error.reported
            raise lost from error.__cause__

    def _write(self, rank: int) -> str:
        path = os.path.join(self.folder, f"{GLOO}{rank}")
        try:
            with file_aside(path) as aside, open(aside, "wb") as file:
                file.write(flight_recorder_trace())
        except OSError as failure:
            return f"{path}: not written ({failure.strerror})"
        return f"its last collectives: {path}"
