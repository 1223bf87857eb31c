"""Ctrl-C, SIGTERM and a closed terminal end `prepare` in order: by one line, with nothing half-written left behind."""

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Iterator, List, Optional

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """End of the interrupted work. code: 128 + n after signal n, else 0."""

    code = 0


@contextlib.contextmanager
def ended_by_signals() -> Iterator[Stop]:
    """Ends the block's work by KeyboardInterrupt at the first of SIGNALS, and says so on standard error.

    Later signals are ignored, so that they don't cut the cleaning up short; whatever the interrupted work raises is the
    signal's doing. Signals that the process was started to ignore (nohup) stay ignored.
    """
    stop = Stop()

    def first(number: int, frame: Optional[FrameType]) -> None:
        stop.code = 128 + number
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, first)
    try:
        yield stop
    except BaseException:
        if not stop.code:
            raise
        print(f"stopped by {signal.Signals(stop.code - 128).name}; nothing half-written is left", file=sys.stderr)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps signals that Python handles waiting until the block is done; for steps that must not be cut in two."""
    came: List[int] = []
    handled = [each for each in SIGNALS if callable(signal.getsignal(each))]
    if threading.current_thread() is not threading.main_thread():
        handled = []  # Python's handlers run in the main thread alone
    before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in handled}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)
