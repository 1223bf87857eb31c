"""The folder a data set is written into: complete or absent, whatever goes wrong on the way."""

import contextlib
import errno
import os
import shutil
import tempfile
from typing import BinaryIO, Iterator, List, Optional

from fuxi_torchrec.data.format import IDENTITY_FILE, TRAIN_FOLDER
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import join, path_manager


class OutputFolder:
    """Context manager around the writing of a data set into `output`.

    A local folder is written as `output.tmp-<pid>` and renamed by `commit`. An address with a scheme (a bucket has no
    rename) is written in place, where `dataset.json`, written last, marks it complete. Leaving the context without
    `commit`, by an error or Ctrl-C, removes what was written.

    `work` is a local folder for temporary files, beside the output where that is local.

    Raises UserError where `output` exists and `overwrite` is not set, where it is not a data set (never deleted), where
    its parent cannot be written, and where the disk is full.
    """

    def __init__(self, output: str, overwrite: bool = False):
        self.output = output.rstrip("/") or "/"
        self.overwrite = overwrite
        self.is_local = "://" not in output
        self._written: List[str] = []
        self._created_parent: Optional[str] = None
        self._committed = False

    def __enter__(self) -> "OutputFolder":
        if self.is_local:
            self._refuse_existing()
        else:
            with self._reaching():
                self._refuse_existing()
            self.folder = self.output
            self.work = tempfile.mkdtemp(prefix="fuxi-prepare-")
            return self
        self.folder = f"{self.output}.tmp-{os.getpid()}"
        self.work = f"{self.folder}/work"
        self._created_parent = _first_missing(os.path.dirname(os.path.abspath(self.output)))
        try:
            shutil.rmtree(self.folder, ignore_errors=True)  # a killed process of the same id
            os.makedirs(self.work)
        except OSError as error:
            self._remove()
            raise UserError(f"{self.output}: cannot write there ({error.strerror}); choose another --output") from None
        except BaseException:
            self._remove()
            raise
        return self

    def open(self, name: str) -> BinaryIO:
        """Opens DIR/`name` for writing; folders in the name are made."""
        path = join(self.folder, name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return path_manager().open(path, "wb")
        self._written.append(path)
        with self._reaching():
            return path_manager().open(path, "wb")

    def commit(self) -> None:
        """Puts the complete data set in place. Call it after `dataset.json` was written and closed."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self.is_local:
            self._rename()
        self._committed = True

    def __exit__(self, kind, error, traceback) -> bool:
        if self.is_local or not self._committed:
            self._remove()
        if error is not None:
            reraise_full_disk(error, self.output)
        return False

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """At an address, iopath's handlers raise whatever their clients do, and assertions for what they cannot do."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"{self.output}: cannot be written ({reason}); choose another --output") from None

    def _refuse_existing(self) -> None:
        manager = path_manager()
        is_data_set = manager.isfile(join(self.output, IDENTITY_FILE))
        if self.is_local:
            exists = os.path.lexists(self.output)
            if exists and os.path.isdir(self.output) and not os.listdir(self.output):
                return  # an empty folder is replaced: nothing is lost
            if exists and not is_data_set:
                raise UserError(f"{self.output}: exists and is not a data set, so it stays; choose another --output")
        if is_data_set and not self.overwrite:
            raise UserError(f"{self.output}: a data set is there already; pass --overwrite or choose another --output")
        if not self.is_local:
            self._clear_address(is_data_set)

    def _clear_address(self, is_data_set: bool) -> None:
        """Removes what stands at an address: first the mark of completeness, then parts the new data set may lack."""
        manager = path_manager()
        if is_data_set:
            manager.rm(join(self.output, IDENTITY_FILE))
        train = join(self.output, TRAIN_FOLDER)
        for name in manager.ls(train) if manager.isdir(train) else []:
            manager.rm(join(train, os.path.basename(name)))

    def _rename(self) -> None:
        old = f"{self.output}.old-{os.getpid()}"
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
        if replaced:
            shutil.rmtree(old, ignore_errors=True)

    def _remove(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self.is_local:
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self._committed:
                _remove_empty(self._created_parent, os.path.dirname(os.path.abspath(self.output)))
            return
        for path in self._written:
            try:
                path_manager().rm(path)
            except Exception:  # the address may be what went wrong; the first error is the one to see
                pass


def reraise_full_disk(error: BaseException, place: str) -> None:
    """Raises a UserError naming `place` if `error` says that a disk, a quota or DuckDB's share of it is full."""
    code = getattr(error, "errno", None)
    text = str(error)
    full = isinstance(error, OSError) and code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or "No space left on device" in text or "max_temp_directory_size" in text
    if full and not isinstance(error, UserError):
        raise UserError(f"{place}: the disk is full; free space there or choose another --output") from None


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
