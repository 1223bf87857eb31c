"""A run's scalars as TensorBoard reads them."""

import os
import socket
import time
from contextlib import suppress
from typing import Any, BinaryIO, Callable, Dict, Optional

PREFIX = "events.out.tfevents."


class ScalarWriter:
    """Writes scalars to a new TensorBoard event file, in the caller's thread.

    SummaryWriter's own thread prints a traceback where the disk is full. Curves are a convenience beside metrics.jsonl:
    what goes wrong here is reported once, in a line, and then nothing more is written.

    Args:
        folder: where the event files of the run are.
        first_step: steps done before; what an earlier file says of later ones is hidden.
        report: is given the line.
    """

    def __init__(self, folder: str, first_step: int, report: Callable[[str], None]):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder, self.report = folder, report
        self.file: Optional[BinaryIO] = None
        try:
            os.makedirs(folder, exist_ok=True)
            began = max(int(time.time()), _newest(folder) + 1)
            name = f"{PREFIX}{began}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
            self.file = open(os.path.join(folder, name), "xb")
        except OSError as error:
            return self._give_up(error)
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        if first_step:
            self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, values: Dict[str, float], step: int) -> None:
        """Writes a step's scalars by their tags."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        """Closes the event file."""
        if self.file is not None:
            with suppress(OSError):  # of what could not be written, reported before
                self.file.close()
            self.file = None

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self.file is None:
            return
        try:
            self.records.write(Event(wall_time=time.time(), **event).SerializeToString())
            self.records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self.report(f"{self.folder}: no curves from here on ({error.strerror}); metrics.jsonl has the numbers")


def _newest(folder: str) -> int:
    """When the newest file began, by its name. TensorBoard reads files in the order of their names, and never goes back:
    what a host whose clock is behind writes after a restart would be read before, or not at all."""
    parts = [name.split(".") for name in os.listdir(folder) if name.startswith(PREFIX)]
    return max([int(part[3]) for part in parts if len(part) > 3 and part[3].isdigit()], default=0)
