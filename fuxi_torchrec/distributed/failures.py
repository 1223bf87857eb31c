"""What goes wrong in a run of several processes: an error of one is told once and ends all; signals; lost processes.

An error on one rank would leave the others waiting in a collective. `fail_together` needs no collective to prevent it:
the rank that fails leaves its message in the process group's store, where rank 0 looks twice a second. The store is in
rank 0's process. A rank that is cut off from it, or whose rank 0 hangs, gets no answer from it, not even a timeout: the
kernel would go on for a quarter of an hour. So whoever asks the store about a failure asks for a bounded time.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Callable, Iterator, List, Optional

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fuxi_torchrec.distributed.private_api import own_store
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import LostProcess, UserError, one_line
from fuxi_torchrec.files import JsonObject

FAILED, HEARD, NOTICED, HOST = "fuxi/failed", "fuxi/heard", "fuxi/noticed", "fuxi/host"
PATIENCE = 5.0  # seconds: more than rank 0 needs to look, far less than a scheduler gives after a signal
SILENCE = 1.5 * PATIENCE  # seconds for all that is asked of the store after an error; then rank 0 counts as unreachable
SHOWN = 8  # lost ranks that a message names
LOST = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe")


class Interrupted(Exception):
    """Raised once a run that was stopped by a signal has saved. `code` is the exit code: 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.code = 128 + number


@contextmanager
def signals() -> Iterator[List[int]]:
    """Collects SIGINT and SIGTERM, so that the current step can end and be saved; a second Ctrl-C breaks off."""
    received: List[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def fail_together(world: World, on_failure: Callable[[str], None] = lambda reason: None) -> Iterator[None]:
    """Ends all ranks of a process group at the error of any, and has one rank print it; around everything they do.

    A UserError of another rank is printed by rank 0 as "rank k: …"; a rank that died or hangs becomes a LostProcess.

    on_failure: called on rank 0 with the reason where its main thread, which waits for the rank that failed, cannot be
        ended by an exception, just before the process ends.
    """
    if world.size == 1:
        yield
        return
    store = own_store()
    store.set_timeout(timedelta(seconds=PATIENCE))
    store.set(f"{HOST}/{world.rank}", socket.gethostname())
    watch = _Watch(store, on_failure) if world.is_main else None
    try:
        yield
    except Exception as error:
        if watch:
            watch.stop()
        failure = _failure_in_time(error, store, world)
        raise failure from (None if isinstance(failure, UserError) or failure is error else error)
    finally:
        if watch:
            watch.stop()


class _Watch(threading.Thread):
    """Rank 0 listening for an error of another rank, whatever its main thread waits for."""

    def __init__(self, store: dist.Store, on_failure: Callable[[str], None]):
        super().__init__(daemon=True, name="watch")
        self.on_failure = on_failure
        self.store, self.ended, self.telling = store, threading.Event(), threading.Lock()
        self.start()

    def stop(self) -> None:
        with self.telling:
            self.ended.set()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            try:
                found = self.store.check([FAILED])
            except RuntimeError:
                return
            # The same mistake may be rank 0's own, which its main thread tells better.
            if found and not self.ended.wait(1.0):
                self._report()

    def _report(self) -> None:
        with self.telling:
            if self.ended.is_set():
                return
            failed = json.loads(self.store.get(FAILED))
            reason = f"rank {failed['rank']}: {failed['message']}"
            print(f"error: {reason}", file=sys.stderr, flush=True)
            with suppress(Exception):  # a full disk: the process is to end all the same
                self.on_failure(reason)
                get_error_handler().record_exception(UserError(reason))  # torchrun's, as `record` does for exceptions
            self.store.set(HEARD, "")
            time.sleep(0.5)  # or the rank that waits to be heard finds the store gone, and c10d prints its stack
            os._exit(failed["code"])  # the main thread may be waiting for the rank that failed, and never return


def _failure_in_time(error: Exception, store: dist.Store, world: World) -> BaseException:
    """What this rank is to raise for its error, whether the store answers or not."""
    found: List[BaseException] = []
    # A thread, because nothing else ends a read from a host that is silent; the process ends without waiting for it.
    asking = threading.Thread(target=lambda: found.append(_failure(error, store, world)), daemon=True, name="failure")
    asking.start()
    asking.join(SILENCE)
    return found[0] if found else _unreachable(error, world)


def _unreachable(error: Exception, world: World) -> BaseException:
    """The error where rank 0 is silent: nobody else may tell it, so one rank of each host does."""
    if not isinstance(error, UserError) and not is_lost(error):
        return error  # a defect keeps its traceback
    if is_lost(error):
        error = _lost_ranks(f"rank 0 at {os.environ.get('MASTER_ADDR')}", error, world)
        local = int(os.environ.get("LOCAL_RANK") or 0)
        error.reported = local != (1 if local == world.rank else 0)  # rank 0's own host has its next rank tell it
    return error


def _failure(error: Exception, store: dist.Store, world: World) -> BaseException:
    """What this rank is to raise for its error."""
    try:
        if is_lost(error):
            return _other_rank(store, world) or _lost(error, store, world)
        if not world.is_main:
            message, code = str(error), 2
            if not isinstance(error, UserError):  # a defect: its traceback before rank 0 ends, and torchrun this rank
                traceback.print_exception(error)
                message, code = f"{type(error).__name__}: {error}", 1
            lines = " ".join(message.split())
            store.compare_set(FAILED, "", json.dumps({"rank": world.rank, "message": lines, "code": code}))
            reported = _wait_for(store, HEARD)
            if not isinstance(error, UserError):
                return SystemExit(1)
            error.reported = reported
        else:
            store.set(HEARD, "")  # the others wait for this before they tell the same mistake again
    except (dist.DistError, RuntimeError, ValueError):  # the store is gone with rank 0, which has told what it knew
        error = LostProcess("rank 0 is gone") if is_lost(error) else error
        if isinstance(error, (UserError, LostProcess)):
            error.reported = not world.is_main
    return error


def is_lost(error: BaseException) -> bool:
    """Tells whether a collective failed because of another process."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(word in text for word in LOST))


def _other_rank(store: dist.Store, world: World) -> Optional[UserError]:
    """The error that another rank has left, if it left one."""
    if not store.check([FAILED]):
        return None
    failed = json.loads(store.get(FAILED))
    store.set(HEARD, "")
    failure = UserError(f"rank {failed['rank']}: {failed['message']}")
    failure.reported = not world.is_main
    return failure


def _lost(error: Exception, store: dist.Store, world: World) -> Exception:
    """Names the ranks that do not say within two seconds that they noticed as well."""
    store.set(f"{NOTICED}/{world.rank}", "")
    others = set(range(world.size)) - {world.rank}
    end = time.monotonic() + 2.0
    while time.monotonic() < end and others:
        others = {rank for rank in others if not store.check([f"{NOTICED}/{rank}"])}
        failure = _other_rank(store, world)
        if failure:
            return failure
        time.sleep(0.1)
    noticed = set(range(world.size)) - others
    ranks = ", ".join(f"{rank} on {_host(rank, store)}" for rank in sorted(others)[:SHOWN]) or "?"
    if len(others) > SHOWN:
        ranks += f", … ({len(others)} in all)"
    lost = _lost_ranks(f"rank {ranks}", error, world)
    lost.reported = world.rank != min(noticed)
    return lost


def _lost_ranks(who: str, error: Exception, world: World) -> LostProcess:
    return LostProcess(
        f"{who} died, hangs or cannot be reached, seen by rank {world.rank} ({_first_sentence(error)}); look at its log, its "
        "host and the network between"
    )


def _host(rank: int, store: dist.Store) -> str:
    key = f"{HOST}/{rank}"
    return store.get(key).decode() if store.check([key]) else "an unknown host"


def _wait_for(store: dist.Store, key: str) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if store.check([key]):
            return True
        time.sleep(0.1)
    return False


def check_same_start(world: World, config: JsonObject, output: str, content_checksum: str) -> None:
    """Raises UserError where this rank's config, run folder or data set differs from rank 0's, naming the key.

    data.path may differ, as long as the content is the same.
    """
    if world.size == 1:
        return
    mine = {**_flat(config), "--output": os.path.abspath(output), "the data set's content": content_checksum}
    mine.pop("data.path")
    first = world.from_main(mine)
    for key in sorted(set(mine) | set(first)):
        if mine.get(key) != first.get(key):
            raise UserError(f"{key}: {mine.get(key)} here and {first.get(key)} on rank 0; start all ranks alike")


def _flat(config: JsonObject) -> JsonObject:
    return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}


def _first_sentence(error: Exception) -> str:
    text = re.sub(r"^\[\S+:\d+\] ", "", one_line(error, most=1000))  # gloo's source file
    return text.split(". ")[0][:200]
