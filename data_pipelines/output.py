"""The folder a data set is written into: complete or absent, whatever goes wrong on the way."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import weakref
from types import TracebackType
from typing import Any, BinaryIO, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple, Type, Union

from data_pipelines.interrupts import uninterrupted
from fuxi_torchrec.data.checksums import describe_files
from fuxi_torchrec.data.format import IDENTITY_FILE, TRAIN_FOLDER
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import is_address, join, names_in, path_manager
from fuxi_torchrec.run.lock import Lock

REMOVAL_ATTEMPTS = 3  # of a file at an address, whose trouble may pass


class OutputFolder:
    """Context manager around the writing of a data set into `output`.

    A local folder is written in a temporary one beside it, of a random name, and renamed by `commit`. An address with a
    scheme (a bucket has no rename) is written in place, where `dataset.json`, written last, marks it complete. Leaving
    the context without `commit`, by an error or a signal, removes what was written. Enter it before any work is done: an
    output that cannot be is refused there, and what is overwritten stays until the new data set needs its place. A lock
    beside it (at an address: in it) is held all the while; what a killed process left is removed by the next.

    folder: where the data set is written. work: a local folder for temporary files, beside the output where that is
    local.

    Raises UserError where `output` exists and `overwrite` is not set, where it is not a data set (never deleted), where
    it is a symbolic link or a mount point (nothing can be renamed onto it), where its parent cannot be written, and where
    the disk is full; FolderInUse where another process writes there for minutes.
    """

    def __init__(self, output: str, overwrite: bool = False):
        self.output = output.rstrip("/") or output[:1]
        self.overwrite = overwrite
        self.is_local = not is_address(output)
        self._names: List[str] = []
        self._committed = False
        self._undo = contextlib.ExitStack()
        # Not by __exit__ alone: a signal may come before its first line.
        self._clean_up = weakref.finalize(self, self._undo.close)

    def __enter__(self) -> "OutputFolder":
        try:
            if self.is_local:
                self._enter_folder(*os.path.split(os.path.abspath(self.output)))
            else:
                self._enter_address()
        except BaseException:
            with uninterrupted():
                self._clean_up()
            raise
        return self

    def open(self, name: str) -> "Union[BinaryIO, GuardedStream]":
        """Opens DIR/`name` for writing; folders in the name are made."""
        path = join(self.folder, name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._names.append(name)
            return path_manager().open(path, "wb")
        with self._reaching():
            if not self._names:
                self._clear_address()
            self._names.append(name)
            return GuardedStream(path_manager().open(path, "wb"), self._reaching)

    def described(self) -> Tuple[Dict[str, JsonObject], str]:
        """Reads back what was written; returns dataset.json's `files` and `content_checksum`."""
        with self._reaching() if not self.is_local else contextlib.nullcontext():
            return describe_files(self.folder, sorted(self._names))  # items.parquet, train/part-…, users.parquet

    def commit(self) -> None:
        """Puts the complete data set in place. Call it after `dataset.json` was written and closed."""
        with uninterrupted():
            self._lock.confirm()
            if self.is_local:
                self._rename()
            self._committed = True

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        with uninterrupted():
            if not self.is_local and not self._committed:
                self._remove_from_address()
            self._clean_up()
        if error is not None:
            reraise_full_disk(error, self.output)

    def _enter_folder(self, parent: str, name: str) -> None:
        self._refuse_place()
        self._refuse_data_set()
        self._undo.callback(_remove_empty, _first_missing(parent), parent)
        try:
            os.makedirs(parent, exist_ok=True)
            self._own(join(parent, f".{name}.lock"))
            _remove_leftovers(self.output, parent, name)
            self._refuse_place()  # once more: another prepare may have been waited for
            self._refuse_data_set()
            self._make_temporary(parent, name)
        except OSError as error:
            reason = f"cannot write there ({error.strerror})"
            raise UserError(f"{self.output}: {reason}; choose another --output") from None
        self.folder = join(self.work, "data")

    def _enter_address(self) -> None:
        with self._reaching():
            self._refuse_data_set()
            self._own(join(self.output, "lock"))
            self._refuse_data_set()
            self._make_temporary(tempfile.gettempdir(), "fuxi-prepare")
        self.folder = self.output

    def _own(self, folder: str) -> None:
        """Keeps others from writing to the same output until this one is left."""
        self._lock = Lock(folder, self.output)
        self._undo.callback(_release, self._lock)
        self._lock.acquire()

    def _make_temporary(self, parent: str, name: str) -> None:
        """Makes `work`, which is the owner's alone; what is renamed out of it has the usual permissions."""
        with uninterrupted():
            temporary = tempfile.TemporaryDirectory("", f".{name}.tmp-", parent, ignore_cleanup_errors=True)
            self._undo.callback(temporary.cleanup)
        self.work = temporary.name

    def _refuse_place(self) -> None:
        """Raises UserError for a local output onto which no folder can be renamed in the end."""
        path = self.output
        if os.path.basename(path) in ("", ".", ".."):
            raise UserError(f"--output {path}: name the folder to make, as in {join(path or '.', 'my-data')}")
        if os.path.islink(path):
            target = os.path.realpath(path)
            raise UserError(f"{path}: a symbolic link, which is never replaced; name the folder itself, --output {target}")
        if os.path.ismount(path):
            raise UserError(f"{path}: a mount point, which cannot be replaced; name a folder in it, --output {path}/data")
        if os.path.isdir(path) and not os.listdir(path):
            return  # an empty folder is replaced: nothing is lost
        if os.path.lexists(path) and not os.path.isfile(join(path, IDENTITY_FILE)):
            raise UserError(f"{path}: exists and is not a data set, so it stays; choose another --output")

    def _refuse_data_set(self) -> None:
        if not self.overwrite and path_manager().isfile(join(self.output, IDENTITY_FILE)):
            raise UserError(f"{self.output}: a data set is there already; pass --overwrite or choose another --output")

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """At an address, iopath's handlers raise whatever their clients do, and assertions for what they cannot do."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error)
            raise UserError(f"{self.output}: cannot be written ({reason}); try again or choose another --output") from None

    def _clear_address(self) -> None:
        """Removes what stands at an address: first the mark of completeness, then parts the new data set may lack."""
        manager = path_manager()
        if manager.isfile(join(self.output, IDENTITY_FILE)):
            manager.rm(join(self.output, IDENTITY_FILE))
        train = join(self.output, TRAIN_FOLDER)
        for name in names_in(train):
            manager.rm(join(train, name))

    def _rename(self) -> None:
        old = join(self.work, "old")
        replaced = os.path.isdir(self.output) and bool(os.listdir(self.output))
        try:
            if replaced:
                os.rename(self.output, old)
            try:
                os.rename(self.folder, self.output)
            except BaseException:
                if replaced:
                    os.rename(old, self.output)
                raise
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.output}: cannot be put in place ({reason}); choose another --output") from None

    def _remove_from_address(self) -> None:
        for name in reversed(self._names):  # dataset.json, where it was begun, first
            for _ in range(REMOVAL_ATTEMPTS):
                # The address may be what went wrong; the first error is the one to see.
                with contextlib.suppress(Exception):
                    path_manager().rm(join(self.folder, name))
                    break


class GuardedStream:
    """A binary stream to an address whose errors, which come while it is written and closed too, are UserErrors."""

    def __init__(self, stream: BinaryIO, guard: Callable[[], ContextManager[None]]):
        self._stream, self._guard = stream, guard

    def write(self, data: Union[bytes, memoryview]) -> int:
        """Writes bytes; returns their number. Raises UserError."""
        with self._guard():
            return self._stream.write(data)

    def close(self) -> None:
        """Closes the stream, which may still write. Raises UserError."""
        with self._guard():
            self._stream.close()

    def __enter__(self) -> "GuardedStream":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:  # flush, tell, closed, writable, …
        return getattr(self._stream, name)


def reraise_full_disk(error: BaseException, place: str) -> None:
    """Raises a UserError naming `place` if `error` says that a disk, a quota or DuckDB's share of it is full."""
    code = getattr(error, "errno", None)
    text = str(error)
    full = isinstance(error, OSError) and code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or "No space left on device" in text or "max_temp_directory_size" in text
    if full and not isinstance(error, UserError):
        raise UserError(f"{place}: the disk is full; free space there or choose another --output") from None


def _release(lock: Lock) -> None:
    with contextlib.suppress(Exception):  # an address may be what went wrong; the lock is abandoned then
        lock.release()


def _remove_leftovers(output: str, parent: str, name: str) -> None:
    """Removes the temporary folders of processes that were killed: whoever holds the lock knows that none is in use.

    One that was killed between the two renames of `OutputFolder.commit` had put the old data set aside; it comes back.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.tmp-[a-z0-9_]{{8}}")
    for leftover in [join(parent, found) for found in os.listdir(parent) if pattern.fullmatch(found)]:
        if os.path.isdir(join(leftover, "old")) and not os.path.lexists(output):
            os.rename(join(leftover, "old"), output)
        shutil.rmtree(leftover, ignore_errors=True)  # follows no link


def _first_missing(folder: str) -> Optional[str]:
    """The topmost folder that does not exist yet on the way to `folder`."""
    missing = None
    while not os.path.lexists(folder):
        missing, folder = folder, os.path.dirname(folder)
    return missing


def _remove_empty(top: Optional[str], folder: str) -> None:
    """Removes the folders from `folder` up to `top`, which this process made, as long as they are empty."""
    while top is not None and folder.startswith(top):
        try:
            os.rmdir(folder)
        except OSError:
            return
        folder = os.path.dirname(folder)
