"""Standard output and error as a shell may hand them over: closed, without some letters, or with a reader who leaves."""

import os
import select
import sys
from typing import Callable

READER_GONE = 141  # as if ended by SIGPIPE: 128 + 13


def run_on_streams(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code, whatever the standard streams are.

    Closed streams swallow what is written, letters that an encoding lacks become question marks, and a reader who went
    away (`| head -1`) ends the command without a word, with READER_GONE.
    """
    _open_closed()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # standard error replaces by itself
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():  # another pipe broke, or a socket: a defect
            raise
        _discard()
        return READER_GONE


def _open_closed() -> None:
    if sys.stdout is not None and sys.stderr is not None:
        return
    # Until 0 to 2 are taken: a file of the run would get such a number, and a library's messages with it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")


def _reader_is_gone() -> bool:
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard() -> None:
    """What is left in buffers, and what Python writes at its end, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
