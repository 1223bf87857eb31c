"""Processes of this machine that a killed sweep left behind. Linux: found by what their environment says."""

import os
import signal
import sys
import time
from typing import Dict, Iterable, List

# In the environment of every local run of a sweep, and of all that it starts: the run's folder.
MARK = "FUXI_SWEEP_RUN"
PATIENCE = 120.0  # seconds until SIGKILL: more than torchrun gives its workers to save


def orphans(folders: Iterable[str]) -> Dict[int, str]:
    """Finds this user's live processes that work in one of these folders, as {process id: run folder}."""
    wanted = {f"{MARK}={folder}".encode(): folder for folder in folders}
    found = {}
    for name in os.listdir("/proc") if wanted and os.path.isdir("/proc") else []:
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                entries = set(file.read().split(b"\0"))
        except (OSError, ValueError):  # no process, somebody else's, or gone by now
            continue
        found.update({int(name): wanted[entry] for entry in entries & wanted.keys() if int(name) != os.getpid()})
    return found


def stop_orphans(folders: Iterable[str]) -> None:
    """Ends the processes that work in one of these folders, so that no two ever work in one run folder. They save
    first: SIGTERM is a run's sign to."""
    folders = list(folders)
    signalled: List[int] = []
    end = time.monotonic() + PATIENCE
    while left := orphans(folders):
        if not signalled:
            print(f"stopping {len(left)} processes that were left behind", file=sys.stderr, flush=True)
        late = time.monotonic() > end
        for process in left:
            if late or process not in signalled:
                signalled.append(process)
                _signal(process, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.2)


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass
