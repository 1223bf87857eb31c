"""A source of raw files: a zip, a folder, or the address of a zip; with its checksum."""

import contextlib
import hashlib
import io
import logging
import os
import re
import sys
import zipfile
import zlib
from typing import BinaryIO, Iterator, List, Optional

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import path_manager


class Archive:
    """The files of a zip archive or of a folder, by base name; a context manager.

    Raises UserError for a source that is missing, cannot be fetched, is not a zip archive or is truncated, and for a
    wrong checksum (md5 or sha256, as 32 or 64 hex digits, with or without "md5:" or "sha256:" before them).
    """

    def __init__(self, source: str, checksum: Optional[str] = None):
        self.source = source
        self._zip: Optional[zipfile.ZipFile] = None
        self._path = _fetch(source)
        self._is_folder = os.path.isdir(self._path)
        if self._is_folder:
            if checksum is not None:
                raise UserError(f"{source}: --checksum is that of an archive, and this is a folder; leave it out")
            self._names = _files_in(self._path)
            return
        if checksum is not None:
            verify_checksum(self._path, checksum)
        try:
            self._zip = zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, EOFError) as error:
            raise UserError(
                f"{self._path}: not a zip archive, or a truncated one ({error}); fetch it again"
            ) from None
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from None
        self._names = [name for name in self._zip.namelist() if not name.endswith("/")]

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *failure: object) -> None:
        if self._zip is not None:
            self._zip.close()

    @property
    def name(self) -> str:
        """Name of the data set: the archive's one top folder ("ml-1m"), or its own name."""
        tops = {name.split("/")[0] for name in self._names if "/" in name}
        if self._zip is not None and len(tops) == 1:
            return tops.pop()
        return re.sub(r"\.zip$", "", os.path.basename(os.path.abspath(self._path)))

    def find(self, base_name: str) -> Optional[str]:
        """Finds the file of this base name that lies least deep, or None."""
        found = [name for name in self._names if name.split("/")[-1] == base_name and "__MACOSX" not in name]
        return min(found, key=lambda name: (name.count("/"), name), default=None)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Opens one of the files; damage met while reading (checked by the zip's own CRC) is a UserError."""
        try:
            with self._open(name) as file:
                yield file
        except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
            if self._zip is None or isinstance(error, UserError):
                raise
            raise UserError(f"{self._path}: {name} in it is damaged or truncated ({error}); fetch it again") from None

    def checksum(self) -> str:
        """Computes "sha256:…" of the archive, or of a folder's files (name and content of each, in name order)."""
        digest = hashlib.sha256()
        for name in sorted(self._names) if self._is_folder else [None]:
            if name is not None:
                digest.update(name.encode() + b"\0")
            with open(os.path.join(self._path, name) if name else self._path, "rb") as file:
                _update(digest, file)
        return f"sha256:{digest.hexdigest()}"

    def keep_only(self, names: List[str]) -> None:
        """Narrows a folder to the files in use, so that others beside them don't enter its checksum."""
        self._names = [name for name in self._names if name in names]

    def _open(self, name: str) -> BinaryIO:
        if self._zip is None:
            return open(os.path.join(self._path, name), "rb")
        # A member of an archive reads as a raw stream does.
        return io.BufferedReader(self._zip.open(name), 1 << 20)  # type: ignore[type-var]


def verify_checksum(path: str, expected: str) -> None:
    """Compares a file's md5 or sha256 (by length) with `expected`. Raises UserError unless they are equal."""
    text = expected.strip().lower()
    digits = re.sub(r"^(md5|sha256):", "", text)
    algorithm = {32: "md5", 64: "sha256"}.get(len(digits))
    if algorithm is None or not re.fullmatch(r"[0-9a-f]+", digits) or (":" in text and algorithm not in text):
        raise UserError(f"--checksum {expected}: neither an md5 (32 hex digits) nor a sha256 (64)")
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        _update(digest, file)
    if digest.hexdigest() != digits:
        raise UserError(
            f"{path}: wrong checksum: expected {algorithm} {digits}, found {digest.hexdigest()}; fetch it again"
        )


def local_copy(address: str) -> str:
    """Returns a local path for a path or address; downloads are cached by iopath. Raises UserError where it cannot be
    had."""
    # The bar of a download is for a terminal; iopath's own log line would stand beside our one-line error.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    logging.getLogger("iopath.common.download").setLevel(logging.CRITICAL)
    try:
        with quiet:
            path = path_manager().get_local_path(address)
    except Exception as error:  # iopath's handlers raise whatever their clients do: URLError, ClientError, …
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{address}: cannot be fetched ({reason}); check the address and the network") from None
    if not os.path.exists(path):
        raise UserError(f"{address}: no such file or folder")
    return path


def _fetch(source: str) -> str:
    path = local_copy(source)
    if "://" in source and not os.path.isdir(path) and not zipfile.is_zipfile(path):
        os.remove(path)  # else the broken download would be taken from the cache the next time
        raise UserError(f"{source}: what came is not a zip archive, or a truncated one; check the address, try again")
    return path


def _files_in(folder: str) -> List[str]:
    """Files in a folder and in its sub-folders, as relative names: an unpacked archive has its top folder."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    for entry in os.scandir(folder):
        if entry.is_dir():
            names += [f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path) if inner.is_file()]
    return names


def _update(digest: "hashlib._Hash", file: BinaryIO) -> None:
    while block := file.read(1 << 20):
        digest.update(block)
