"""All parts, one after the other, each in processes of its own and within its share of the time.

A kernel that hangs, a compiler that crashes and an illegal access of memory, after which a process can use its GPU no more,
cost the case that they happen in.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from benchmarks.gpu.record import Event, read_events
from fuxi_torchrec.errors import one_line

PARTS: Dict[str, float] = {"ceilings": 1.0, "agreement": 5.0, "towers": 4.0, "steps": 3.0, "references": 4.0}
"""Part -> its share of the time that is left to it and those after it; what it does not use goes to those."""
LAST_SECONDS = 12.0
"""What is kept for ending the last process and writing the results."""
LOG_TAIL = 4000


@dataclass
class Part:
    """What came of a part. rows: by case, in order. failed: {"case", "error", "traceback"}. not_run: cases that there was
    no time for, or that were stopped when it ran out. reason: why the part as a whole did not run, or not to its end."""

    name: str
    seconds: float = 0.0
    rows: List[Dict[str, Any]] = field(default_factory=list)
    failed: List[Dict[str, str]] = field(default_factory=list)
    not_run: List[str] = field(default_factory=list)
    reason: str = ""

    def to_json(self) -> Dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)


def is_installed(name: str) -> bool:
    """Tells whether a package can be found; it is not imported."""
    return importlib.util.find_spec(name) is not None


def missing_for(part: str) -> str:
    """Tells which package a part lacks here; nothing where it lacks none."""
    needed = ("torchrec", "fbgemm_gpu", "pyarrow") if part == "steps" else ()
    return ", ".join(name for name in needed if not is_installed(name))


Machine = Dict[str, Any]
"""What `worker.machine` tells."""


def run_parts(
    names: Sequence[str], device: str, quick: bool, seconds: float, folder: str
) -> Iterator[Tuple[Part, Machine]]:
    """Runs the named parts within `seconds`; yields what came of each, and the machine. folder: takes traces."""
    until = time.monotonic() + seconds - LAST_SECONDS
    waiting = [name for name in names if not missing_for(name)]
    for name in names:
        if name not in waiting:
            yield Part(name, reason=f"not run: {missing_for(name)} is not installed here"), {}
            continue
        share = PARTS[name] / sum(PARTS[other] for other in waiting)
        waiting.remove(name)
        yield run_part(name, f"benchmarks.gpu.{name}", device, quick, max(0.0, until - time.monotonic()) * share, folder)


def run_part(
    name: str, module: str, device: str, quick: bool, seconds: float, folder: str
) -> Tuple[Part, Machine]:
    """Runs one part for at most so many seconds, in as many processes as it takes. module: has its `cases`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuxi_torchrec-gpu-") as scratch:
        record, log = os.path.join(scratch, "record.jsonl"), os.path.join(scratch, "log.txt")
        deaths: Dict[str, str] = {}
        stopped = None
        while (left := start + seconds - time.monotonic()) > 0:
            before = len(read_events(record))
            code = _child([module, device, "quick" if quick else "full", record, str(left), folder], device, left, log)
            events = read_events(record)
            case = _unfinished(events, deaths)
            if code is None:
                stopped = case
            elif case is not None:
                deaths[case] = f"its process ended with code {code}"
            if code in (0, None) or not any(event["event"] == "begin" for event in events[before:]):
                break
        part = _part(name, read_events(record), deaths, _tail(log))
        part.not_run = [f"{case} (stopped)" if case == stopped else case for case in part.not_run]
        machine = next((event["machine"] for event in read_events(record) if event["event"] == "machine"), {})
    part.seconds = time.monotonic() - start
    return part, machine


def _child(arguments: List[str], device: str, seconds: float, log: str) -> Optional[int]:
    """Runs the worker; returns its exit code, None where its time ran out."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    command = [sys.executable, "-m", "benchmarks.gpu.worker", *arguments]
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that compile for it
            except ProcessLookupError:
                pass
            child.wait()


def _unfinished(events: List[Event], known: Dict[str, str]) -> Optional[str]:
    ended = {event["case"] for event in events if event["event"] in ("end", "fail")}
    begun = [event["case"] for event in events if event["event"] == "begin"]
    return next((case for case in begun if case not in ended and case not in known), None)


def _part(name: str, events: List[Event], deaths: Dict[str, str], log: str) -> Part:
    part = Part(name)
    plan = next((event["cases"] for event in events if event["event"] == "plan"), None)
    if plan is None:
        part.reason = "not run: there was no time to begin"
        if log.strip():
            part.reason = f"failed at its start: {one_line(log.strip().splitlines()[-1])}"
            part.failed.append({"case": "start", "error": part.reason, "traceback": log})
        return part
    ended = {event["case"]: event for event in events if event["event"] in ("end", "fail")}
    for case in plan:
        event = ended.get(case)
        if event is None and case in deaths:
            part.failed.append({"case": case, "error": deaths[case], "traceback": log})
        elif event is None:
            part.not_run.append(case)
        elif event["event"] == "fail":
            part.failed.append({key: event[key] for key in ("case", "error", "traceback")})
        else:
            part.rows.append({"case": case, **event["row"]})
    return part


def _tail(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()[-LOG_TAIL:]
    except FileNotFoundError:
        return ""
