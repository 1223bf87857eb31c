"""Files of a checkpoint, by iopath: what DCP writes is counted and checksummed on its way, by the rank that writes it.

A bucket has no rename, so nothing is written aside: a folder is a checkpoint once its marker, written last, is there.
"""

import json
import os
import pickle
import shutil
import time
import zlib
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional

from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
)

from fuxi_torchrec.paths import join, path_manager

MARKER = "complete.json"
CHUNK = 1 << 22
PATIENCE = 10.0


class _Counted:
    """A binary stream that keeps the size and the CRC-32 of what went through it."""

    def __init__(self, stream: Any):
        self.stream, self.size, self.crc = stream, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.stream.write(view)
        self.size += view.nbytes
        self.crc = zlib.crc32(view, self.crc)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:  # flush, fileno, close, …
        return getattr(self.stream, name)


class _Files(FileSystemBase):
    """What torch.distributed.checkpoint asks of a file system."""

    def __init__(self) -> None:
        self.written: Dict[str, Dict[str, int]] = {}  # file name -> bytes, crc32

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path_manager().open(str(path), mode) as stream:
            if "w" not in mode:
                yield stream
                return
            counted = _Counted(stream)
            yield counted
        self.written[os.path.basename(str(path))] = {"bytes": counted.size, "crc32": counted.crc}

    def concat_path(self, path: Any, suffix: str) -> str:
        return join(str(path), suffix)

    def init_path(self, path: Any) -> str:
        return str(path)

    def rename(self, path: Any, new_path: Any) -> None:
        raise NotImplementedError("a bucket has no rename")

    def mkdir(self, path: Any) -> None:
        path_manager().mkdirs(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return path_manager().exists(str(path))

    def rm_file(self, path: Any) -> None:
        path_manager().rm(str(path))


class Writer(FileSystemWriter):
    """DCP's writer over iopath. `written` holds the sizes and checksums of this rank's files."""

    def __init__(self, path: str):
        super().__init__(path)
        self.fs = _Files()
        self.path = path

    @property
    def written(self) -> Dict[str, Dict[str, int]]:
        return self.fs.written

    def finish(self, metadata: Any, results: List[List[Any]]) -> None:
        # DCP's own writes aside and renames; here the marker says what is complete.
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        with self.fs.create_stream(self._get_metadata_path(), "wb") as stream:
            pickle.dump(metadata, stream)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(FileSystemReader):
    """DCP's reader over iopath."""

    def __init__(self, path: str):
        super().__init__(path)
        self.fs = _Files()
        self.path = path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def folders(parent: str) -> List[str]:
    """Names of the checkpoint folders, complete or not, the newest first."""
    manager = path_manager()
    if not manager.isdir(parent):
        return []
    return sorted((name for name in manager.ls(parent) if name.startswith("step-")), reverse=True)


def read_marker(folder: str) -> Optional[Dict[str, Any]]:
    """What the marker holds; None where there is none. Raises ValueError for one that is not readable."""
    path = join(folder, MARKER)
    if not path_manager().exists(path):
        return None
    with path_manager().open(path, "r") as file:
        marker = json.load(file)
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        raise ValueError("no list of files")
    return marker


def write_text(path: str, text: str) -> Dict[str, int]:
    """Writes a small file to the disk itself; returns its size and checksum."""
    data = text.encode()
    with path_manager().open(path, "wb") as file:
        file.write(data)
        file.flush()
        if hasattr(file, "fileno"):
            os.fsync(file.fileno())
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def unseen(folder: str, files: Iterable[str]) -> Optional[str]:
    """A file that is not to be found, PATIENCE seconds after it was written: a network's folder may lag a little."""
    end = time.monotonic() + PATIENCE
    for name in files:
        while not path_manager().exists(join(folder, name)):
            if time.monotonic() > end:
                return name
            time.sleep(0.1)
    return None


def damage(folder: str, files: Dict[str, Dict[str, int]]) -> Optional[str]:
    """What is wrong with the files, in a few words; None where sizes and checksums are the marker's."""
    for name, expected in files.items():
        try:
            size, crc = _size_and_crc(join(folder, name))
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if size != expected["bytes"]:
            return f"{name} has {size} of {expected['bytes']} bytes"
        if crc != expected["crc32"]:
            return f"{name} has another checksum than when it was written"
    return None


def remove(folder: str) -> None:
    """Removes a checkpoint, its marker first: whatever is left of it then counts as incomplete."""
    manager = path_manager()
    if manager.exists(join(folder, MARKER)):
        manager.rm(join(folder, MARKER))
    if "://" not in folder:
        shutil.rmtree(folder, ignore_errors=True)
    elif manager.isdir(folder):
        for name in manager.ls(folder):
            manager.rm(join(folder, name))


def _size_and_crc(path: str) -> Any:
    size = crc = 0
    with path_manager().open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return size, crc
