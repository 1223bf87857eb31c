"""Files of a checkpoint, by iopath: what DCP writes is counted and checksummed on its way, by the rank that writes it.
reader.py reads them.

A bucket has no rename, so nothing is written aside: a folder is a checkpoint once its marker, written last, is there.
"""

import json
import os
import pickle
import shutil
import time
import zlib
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Union

import torch
import yaml
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import is_address, join, make_folder, names_in, path_manager
from fuxi_torchrec.run.folder import CONFIG_FILE

Path = Union[str, "os.PathLike[str]"]
MARKER = "complete.json"
PATIENCE = 10.0
BLOCK = 1 << 26  # bytes of a file that have a checksum of their own: the least that is read
CHUNK = 1 << 20  # bytes that are checksummed and copied together, while a core's cache holds them


class _Counted:
    """A binary stream that keeps the size of what went through it, and the CRC-32 of every BLOCK of it."""

    def __init__(self, stream: Any):
        self.stream, self.size = stream, 0
        self.checksums: List[int] = []
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < view.nbytes:
            if self.size % BLOCK == 0:
                self.checksums.append(0)
            part = view[at : at + min(CHUNK, BLOCK - self.size % BLOCK)]
            self.checksums[-1] = zlib.crc32(part, self.checksums[-1])
            try:
                self.stream.write(part)
            except OSError as error:
                self.error = error
                raise
            at += part.nbytes
            self.size += part.nbytes
        return view.nbytes

    @property
    def written(self) -> JsonObject:
        return {"bytes": self.size, "crc32": " ".join(f"{crc:08x}" for crc in self.checksums)}

    def tell(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:  # flush, fileno, close, …
        return getattr(self.stream, name)


class Files(FileSystemBase):
    """A file system over iopath, as torch.distributed.checkpoint asks for one."""

    def __init__(self) -> None:
        self.written: Dict[str, JsonObject] = {}  # file name -> bytes, crc32 of every BLOCK in hexadecimal

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        """Opens a file; one that is written is counted and checksummed on its way."""
        with path_manager().open(str(path), mode) as stream:
            if "w" not in mode:
                yield stream
                return
            counted = _Counted(stream)
            try:
                yield counted
            except RuntimeError as error:
                # torch.save tells of a full disk in its zip writer's words: "unexpected pos".
                raise counted.error or error from None
        self.written[os.path.basename(str(path))] = counted.written

    def concat_path(self, path: Path, suffix: str) -> str:
        """Joins a name to a folder."""
        return join(str(path), suffix)

    def init_path(self, path: Path) -> str:
        """Returns the path as it is."""
        return str(path)

    def rename(self, path: Path, new_path: Path) -> None:
        """Moves a file."""
        raise NotImplementedError("a bucket has no rename")

    def mkdir(self, path: Path) -> None:
        """Makes a folder and those above it."""
        make_folder(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Accepts every path: iopath knows which it can write."""
        return True

    def exists(self, path: Path) -> bool:
        """Tells whether there is such a file or folder."""
        return path_manager().exists(str(path))

    def rm_file(self, path: Path) -> None:
        """Removes a file."""
        path_manager().rm(str(path))


class Writer(FileSystemWriter):
    """DCP's writer over iopath. `written` holds the sizes and checksums of this rank's files."""

    def __init__(self, path: str):
        super().__init__(path)
        self.files = Files()
        # DCP asks no more of it than FileSystemBase has.
        self.fs = self.files  # type: ignore[assignment]
        self.path = path

    @property
    def written(self) -> Dict[str, JsonObject]:
        """Sizes and checksums of this rank's files, by name."""
        return self.files.written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[List[WriteResult]]":
        """Writes this rank's items of the plan."""
        # torch.save's zip has a checksum too, of the whole tensor before any of it is written: a pass over memory that
        # nothing reads again, since torch.load compares none.
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            return super().write_data(plan, planner)
        finally:
            torch.serialization.set_crc32_options(before)

    def finish(self, metadata: Metadata, results: List[List[WriteResult]]) -> None:
        """Writes the metadata file."""
        # DCP's own writes aside and renames; here the marker says what is complete.
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        with self.fs.create_stream(self._get_metadata_path(), "wb") as stream:
            pickle.dump(metadata, stream)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Accepts every path: iopath knows which it can write."""
        return True


def folders(parent: str) -> List[str]:
    """Lists the names of the checkpoint folders, complete or not, the newest first."""
    return sorted((name for name in names_in(parent) if name.startswith("step-")), reverse=True)


def read_marker(folder: str) -> Optional[JsonObject]:
    """Reads the marker of a checkpoint; None where there is none. Raises ValueError for one that is not readable."""
    path = join(folder, MARKER)
    if not path_manager().exists(path):
        return None
    with path_manager().open(path, "rb") as file:
        marker = json.load(file)
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        raise ValueError("no list of files")
    return marker


def read_config(folder: str) -> JsonObject:
    """Reads the plain values, {section: {key: value}}, of the config that a checkpoint was made under."""
    with path_manager().open(join(folder, CONFIG_FILE), "rb") as file:
        return yaml.safe_load(file)


def write_text(path: str, text: str) -> JsonObject:
    """Writes a small file to the disk itself; returns its size and checksum."""
    with path_manager().open(path, "wb") as file:
        counted = _Counted(file)
        counted.write(text.encode())
        file.flush()
        if hasattr(file, "fileno"):
            os.fsync(file.fileno())
    return counted.written


def unseen(folder: str, files: Iterable[str]) -> Optional[str]:
    """Looks for a file that is not to be found, PATIENCE seconds after it was written (a network's folder may lag a
    little); None where all are there."""
    end = time.monotonic() + PATIENCE
    for name in files:
        while not path_manager().exists(join(folder, name)):
            if time.monotonic() > end:
                return name
            time.sleep(0.1)
    return None


def remove(folder: str) -> None:
    """Removes a checkpoint, its marker first: whatever is left of it then counts as incomplete."""
    manager = path_manager()
    if manager.exists(join(folder, MARKER)):
        manager.rm(join(folder, MARKER))
    if not is_address(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in names_in(folder):
        manager.rm(join(folder, name))
