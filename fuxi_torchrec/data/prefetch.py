"""Batches made ahead of the step that takes them."""

import queue
import threading
from typing import Iterable, Iterator, Optional, TypeVar

from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.data.batch import SequenceBatch

T = TypeVar("T")


def prefetch_depth(config: DataConfig, device_type: str) -> int:
    """Returns how many batches are made ahead: config.prefetch, or what suits the device. On a CPU a background
    thread makes every parallel operation wait for the core it occupies."""
    return config.prefetch if config.prefetch is not None else 0 if device_type == "cpu" else 2


def pinned(batches: Iterable[SequenceBatch], device_type: str) -> Iterable[SequenceBatch]:
    """Moves batches to page-locked memory where a GPU takes them: only from there does a copy not make the host wait."""
    return (batch.pin_memory() for batch in batches) if device_type == "cuda" else batches


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Makes the next `depth` items in a background thread; exceptions arrive where the item would have."""
    if depth <= 0:
        yield from items
        return
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(value: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        outcome: Optional[BaseException] = None
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            outcome = error
        put((end, outcome))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
