"""One part in a process of its own: writes what it does to a record, a JSON line at a time, so that whatever ends the
process leaves what was done before.

A line's "event" is plan (the part's cases, the machine), begin, end (with the row) or fail (with the traceback), each with
its "case".
"""

import gc
import importlib
import json
import os
import platform
import sys
import time
import traceback
from contextlib import ExitStack
from typing import Any, Dict

import torch

from benchmarks.gpu.cases import Case, Place, free
from benchmarks.gpu.record import read_events
from benchmarks.gpu.sizes import FULL, QUICK
from fuxi_torchrec.errors import one_line

BROKEN = 3
"""Exit code: the device is in an error that only a new process gets rid of."""


def work(module: str, device: str, quick: bool, record: str, seconds: float, folder: str) -> int:
    """Runs the cases of a part that the record has not, as long as there is time; returns the exit code. module: has the
    part's `cases`."""
    until = time.monotonic() + seconds
    begun = {event["case"] for event in read_events(record) if event["event"] == "begin"}
    with ExitStack() as stack, open(record, "a", encoding="utf-8", buffering=1) as file:

        def write(event: str, **known: Any) -> None:
            file.write(json.dumps({"event": event, **known}) + "\n")

        file.write("\n")  # the last line of a process that was killed may be half

        place = Place(torch.device(device), QUICK if quick else FULL, stack, folder)
        write("machine", machine=machine(place))
        cases = importlib.import_module(module).cases(place)
        write("plan", cases=[case.name for case in cases])
        for case in cases:
            if case.name in begun:
                continue
            if time.monotonic() >= until:
                return 0
            write("begin", case=case.name)
            try:
                write("end", case=case.name, row=case.run())
            except Exception as error:  # whatever it is, the next case runs
                _write_failure(write, case, error)
            free(place)
            if not _is_usable(place):
                return BROKEN
    return 0


def _write_failure(write: Any, case: Case, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    write("fail", case=case.name, error=f"{type(error).__name__}: {one_line(error)}", traceback=text)
    traceback.clear_frames(error.__traceback__)  # they hold the case's tensors
    gc.collect()


def _is_usable(place: Place) -> bool:
    """After an illegal access of memory every call fails."""
    try:
        if place.is_gpu:
            torch.zeros(1, device=place.device).add_(1).item()
        return True
    except RuntimeError:
        return False


def machine(place: Place) -> Dict[str, Any]:
    """Tells what the numbers are taken on."""
    known = {"device": "cpu", "torch": torch.__version__, "python": platform.python_version(), "threads": None}
    try:
        import triton

        known["triton"] = triton.__version__
    except ImportError:
        known["triton"] = None
    known["interpreted"] = os.environ.get("TRITON_INTERPRET") == "1"
    if not place.is_gpu:
        return known | {"name": f"CPU, {platform.machine()}", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(place.device)
    return known | {
        "device": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    module_, device_, quick_, record_, seconds_, folder_ = sys.argv[1:]
    sys.exit(work(module_, device_, quick_ == "quick", record_, float(seconds_), folder_))
