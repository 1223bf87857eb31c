"""Files that are complete or absent: written beside their place, then moved there. No torch."""

import os
import secrets
from contextlib import contextmanager, suppress
from typing import Any, Dict, Iterator

JsonObject = Dict[str, Any]
"""An object of a JSON or YAML file, as it was read or will be written: its keys decide what the values are."""


@contextmanager
def file_aside(path: str) -> Iterator[str]:
    """Makes an empty file beside `path`, which is renamed onto `path` at the end, or removed if anything went wrong.

    Its name is random and it is made exclusively: no other process, in another container or under a link that lies
    there, gets to write it. Raises OSError, naming `path`.
    """
    aside = f"{path}.tmp-{secrets.token_hex(8)}"
    try:
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        error.filename = path
        raise
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with suppress(FileNotFoundError):
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
    """Writes a whole file or nothing. Raises OSError, naming `path`."""
    with file_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)
