"""Files that are complete or absent: written beside their place, then moved there."""

import os
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def file_aside(path: str) -> Iterator[str]:
    """A temporary path beside `path`, renamed onto it at the end, or removed if anything went wrong."""
    aside = f"{path}.tmp-{os.getpid()}"
    try:
        yield aside
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Makes errors of writing to an open file tell which file it is: the system tells it of opening alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def write_aside(path: str, text: str) -> None:
    """Writes a whole file or nothing."""
    with file_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)
