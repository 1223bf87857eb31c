"""One owner at a time of what is written: a run folder, a folder of checkpoints, an output of `prepare`. No torch.

A lock is a folder of numbered files. The highest number is the owner's; its file holds who that is and a heartbeat. To
take a lock over is to make the next number, which the file system lets one process do:

    RUN/lock/1    owner and heartbeat of the first; the folder goes when the lock is released

Guaranteed where a file can be made exclusively (O_EXCL: local disks, NFS from version 3 on, Lustre, GPFS, CIFS): of all
that want a free or an abandoned lock exactly one gets it. A lock is abandoned when its owner's process is dead on this
machine, when the same launch starts again on another, or when the heartbeat's *value* has not changed for MISSED periods
that the waiter itself has counted: no two machines' clocks are compared, and no time stamp of a file is looked at.

Not guaranteed, as with any heartbeat: an owner that stood still for longer (a paused machine) may go on for a moment
after it was replaced. It looks before it writes what matters (`confirm`) and once a period, and ends the process when it
finds another owner. A bucket has no exclusive create: there the next number is written, and is taken for one's own if it
still holds one's token SETTLE seconds later; two that start within the same moment may both go on until the next look.
"""

import json
import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Callable, List, Optional, Tuple

from fuxi_torchrec.errors import FolderInUse
from fuxi_torchrec.paths import is_address, join, make_folder, names_in, path_manager
from fuxi_torchrec.run.owner import Owner, this_process

PERIOD = 10.0  # seconds between heartbeats
MISSED = 3  # periods without a new heartbeat after which an owner counts as gone
GRACE = 120.0  # seconds that a job may take to save and end after it was told to: schedulers are given as many
PATIENCE = GRACE + MISSED * PERIOD + 30.0  # seconds to wait for an owner: one that was cancelled is gone by then
POLL = 1.0
SETTLE = 2.0


def end_process(message: str) -> None:
    """Ends the process at once, whatever its threads are doing: nothing that it still writes is its own."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(FolderInUse.code)


class Lock:
    """A lock that this process waits for, holds and gives back; a context manager.

    Args:
        folder: where the lock's files are; made and removed by it.
        what: what is locked, as messages name it.
        on_lost: called with one line, from any thread, when another process has taken over.
    """

    def __init__(self, folder: str, what: str, on_lost: Callable[[str], None] = end_process):
        self.folder, self.what, self.on_lost = folder, what, on_lost
        self.owner, self.token = this_process(), secrets.token_hex(16)
        self.number, self.beats = 0, 0
        self._seen = 0.0  # when the lock was last found to be this process's
        self._looking = threading.Lock()
        self._released = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, and waits PATIENCE seconds for its owner's end. Raises FolderInUse, and OSError where nothing can
        be written."""
        waited, unchanged, before = 0.0, 0.0, None
        while True:
            number, text = self._newest()
            holder = _owner_in(text)
            unchanged = unchanged if text == before else 0.0
            if number == 0 or self._is_gone(holder) or unchanged >= MISSED * PERIOD:
                if self._take(number + 1):
                    break
                continue
            name = holder or "another process"
            if waited >= PATIENCE:
                raise FolderInUse(f"{self.what}: still in use by {name} after {PATIENCE:.0f} s; stop it, or try later")
            if not waited:
                print(f"{self.what}: in use by {name}; waiting for it to end", file=sys.stderr, flush=True)
            # Counted by looks, not by a clock: one that was paused with the owner has not seen it miss anything.
            time.sleep(POLL)
            waited, unchanged, before = waited + POLL, unchanged + POLL, text
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def confirm(self) -> None:
        """Ends this process (`on_lost`) if another one has taken over. Costs nothing while heartbeats are in time."""
        if _clock() - self._seen > PERIOD * 1.5:
            self._look()

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        self._released.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        with suppress(OSError):
            if self._is_mine():
                path_manager().rm(self._file(self.number))
            if not is_address(self.folder):
                os.rmdir(self.folder)

    def _is_gone(self, holder: Optional[Owner]) -> bool:
        return holder is not None and (holder.is_dead(self.owner) or holder.is_restarted_as(self.owner))

    def _take(self, number: int) -> bool:
        """Makes the file `number`, which one process can; whether it was this one."""
        make_folder(self.folder)
        if not self._make(self._file(number)):
            return False
        self.number = number
        if not self._is_mine():  # others have taken and given back the lock since this process looked
            path_manager().rm(self._file(number))
            return False
        self._seen = _clock()
        for older in [older for older in self._numbers() if older < number]:
            with suppress(OSError):
                path_manager().rm(self._file(older))
        return True

    def _make(self, path: str) -> bool:
        if is_address(path):
            if path_manager().exists(path):
                return False
            self._write(path, "w")
            time.sleep(SETTLE)
            return self.token in _read(path)
        try:
            self._write(path, "x")
        except (FileExistsError, FileNotFoundError):  # another was faster; or removed the folder
            return False
        except OSError:  # a full disk, after the file was made
            with suppress(OSError):
                os.remove(path)
            raise
        return True

    def _write(self, path: str, mode: str) -> None:
        record = {"token": self.token, **asdict(self.owner)}
        # Always as long as before, so that it can be written over what is there.
        with path_manager().open(path, mode) as file:
            file.write(f"{json.dumps(record)}\n{self.beats:012d}\n")

    def _beat(self) -> None:
        while not self._released.wait(PERIOD):
            self._look()

    def _look(self) -> None:
        """Renews the heartbeat, or finds that the lock is lost."""
        with self._looking:
            try:
                if self._is_mine():
                    self.beats += 1
                    self._write(self._file(self.number), "w" if is_address(self.folder) else "r+")
                    self._seen = _clock()
                    return
            except FileNotFoundError:
                pass  # removed by who took over
            except (OSError, ValueError):
                return  # a file system that fails for a while; another process tells by the heartbeat
            if not self._released.is_set():
                self.on_lost(f"{self.what}: taken over by {_owner_in(self._newest()[1]) or 'another process'}; nothing more "
                             "is written here")  # fmt: skip

    def _is_mine(self) -> bool:
        number, text = self._newest()
        return number == self.number and self.token in text

    def _newest(self) -> Tuple[int, str]:
        """The owner's number and what its file holds; (0, "") where the lock is free."""
        while numbers := self._numbers():
            with suppress(FileNotFoundError):
                return max(numbers), _read(self._file(max(numbers)))
        return 0, ""

    def _numbers(self) -> List[int]:
        return [int(name) for name in names_in(self.folder) if name.isdigit()]

    def _file(self, number: int) -> str:
        return join(self.folder, str(number))


def _owner_in(text: str) -> Optional[Owner]:
    """The owner in a lock's file; None where it is being written."""
    try:
        values = json.loads(text.splitlines()[0])
        return Owner(**{name: value for name, value in values.items() if name != "token"})
    except (ValueError, TypeError, AttributeError, IndexError):
        return None


def _read(path: str) -> str:
    with path_manager().open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")


def _clock() -> float:
    """Seconds; goes on while the machine is suspended, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
