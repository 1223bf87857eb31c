"""How a run ended, for programs: outcome.json in its folder. A run that was killed leaves none."""

import json
import os
from contextlib import contextmanager, suppress
from typing import Iterator, Optional

from fuxi_torchrec.errors import LostProcess, UserError, one_line
from fuxi_torchrec.files import JsonObject, write_aside
from fuxi_torchrec.run.folder import RunFolder

OUTCOME_FILE = "outcome.json"


def read_outcome(path: str) -> Optional[JsonObject]:
    """Reads the outcome of the run at `path`: {"status": "finished" | "failed" | "interrupted", "reason": one line,
    …}, and of a finished one what it was made of (Trainer.counted). None where no run is there, or where it is
    running or was killed."""
    try:
        with open(os.path.join(path, OUTCOME_FILE), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


class OutcomeRecord:
    """A run's outcome, written on the rank that was told the run's folder; elsewhere it does nothing."""

    def __init__(self) -> None:
        self.path: Optional[str] = None

    def begin(self, run: RunFolder) -> None:
        """Makes the run's outcome this process's to write from here on; an earlier one is forgotten."""
        self.path = os.path.join(run.path, OUTCOME_FILE)
        with suppress(FileNotFoundError):
            os.remove(self.path)

    def fail(self, reason: str) -> None:
        """Records a failure."""
        self.end("failed", reason)

    def end(self, status: str, reason: str = "", **facts: object) -> None:
        """Writes the outcome, with further facts of the run."""
        if self.path is not None:
            write_aside(self.path, json.dumps({"status": status, "reason": reason, **facts}, indent=2) + "\n")


@contextmanager
def recorded_outcome() -> Iterator[OutcomeRecord]:
    """Records whatever escapes as the reason of a failure, and raises it again."""
    record = OutcomeRecord()
    try:
        yield record
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # the error itself is what matters
            record.end(status, _one_line(error))
        raise


def _one_line(error: BaseException) -> str:
    text, name = one_line(error, most=2000), type(error).__name__
    return text if isinstance(error, (UserError, LostProcess)) or text == name else f"{name}: {text}"
