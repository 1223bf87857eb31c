"""Reading a checkpoint: every byte once, checked on its way into the tensor that it belongs to.

DCP's own reader makes a second copy of every saved tensor, and checks nothing. Here a rank reads the blocks that hold
what it needs, straight into the memory where they go (a piece at a time for a GPU or another layout), and compares each
block's checksum. Beside the tensors themselves that takes a few MB. What is wrong with a file is found when its block has
been read, so what was loaded counts only once all ranks have read all of theirs.
"""

import io
import zlib
from collections import deque
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from fuxi_torchrec.checkpoint.metadata import read_metadata
from fuxi_torchrec.checkpoint.storage import BLOCK, CHUNK, Files, Path
from fuxi_torchrec.distributed.private_api import FakeTensorMode, narrow_tensor_by_index, offset_in_checkpoint
from fuxi_torchrec.files import JsonObject

METADATA = ".metadata"
# Saved items below this are read whole and unpacked by torch.load.
LARGE = 1 << 20


class Damaged(ValueError):
    """Raised where a file of a checkpoint is not what was written."""


class _Memory:
    """Bytes that are filled from front to back."""

    def __init__(self, memory: Any):
        self.view, self.at = memoryview(memory), 0

    def room(self) -> memoryview:
        return self.view[self.at :]

    def filled(self, count: int) -> None:
        self.at += count


class _Rows:
    """Rows of a stored tensor that go to a target with another layout, type or device, some CHUNK bytes at a time.

    Args:
        shape, dtype: the stored tensor's.
        request: which part of it is read; all columns of its rows pass through.
        target: that part's place.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, request: ReadItem, target: Tensor):
        width = max(_bytes((1, *shape[1:]), dtype), 1)
        self.buffer = torch.empty((max(CHUNK // width, 1), *shape[1:]), dtype=dtype)
        self.view, self.width, self.request, self.target = _view(self.buffer), width, request, target
        self.held = self.row = 0

    def room(self) -> memoryview:
        return self.view[self.held :]

    def filled(self, count: int) -> None:
        self.held += count
        rows = self.held // self.width
        if self.held == len(self.view) or self.row + rows == len(self.target):
            offsets, lengths = (0, *self.request.storage_offsets[1:]), (rows, *self.request.lengths[1:])
            self.target[self.row : self.row + rows] = narrow_tensor_by_index(self.buffer, offsets, lengths)
            self.held, self.row = 0, self.row + rows


class _Wanted(NamedTuple):
    """Bytes [begin, end) of a file, and where they go."""

    begin: int
    end: int
    sink: Any


class Reader(FileSystemReader):
    """DCP's reader over iopath.

    Args:
        path: the checkpoint's folder.
        files: what its marker says of them: name -> size and checksums.

    Raises Damaged while it reads, which dcp.load makes a CheckpointException of on every rank.
    """

    def __init__(self, path: str, files: Dict[str, JsonObject]):
        super().__init__(path)
        # DCP asks no more of it than FileSystemBase has.
        self.fs = Files()  # type: ignore[assignment]
        self.path, self.files = path, files
        self._problem: Optional[Exception] = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads what was saved. What is wrong with it is raised by `set_up_storage_reader`, which DCP calls next: raised
        here, DCP would print a traceback and look for it elsewhere."""
        try:
            return read_metadata(self._whole(METADATA))
        except (OSError, ValueError) as error:
            self._problem = error if isinstance(error, (OSError, Damaged)) else Damaged(f"{METADATA}: {error}")
            return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        """Raises what `read_metadata` has found wrong."""
        if self._problem is not None:
            raise self._problem
        super().set_up_storage_reader(metadata, *args, **kwargs)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Finds what is missing, cut short or no tensor before any rank has read a value: DCP waits for all plans."""
        for request in plan.items:
            if request.type == LoadItemType.BYTE_IO:  # DCP would unpickle it
                raise Damaged(f"{METADATA}: {request.dest_index.fqn} is no tensor")
        for name in self._by_file(plan):
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                self._check_size(stream, name)
        return plan

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Reads the plan's items into the tensors that they belong to, checking each block on the way."""
        for name, requests in self._by_file(plan).items():
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                self._read_items(stream, name, requests, planner)
        done: Future = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Accepts every path: iopath knows which it can read."""
        return True

    def _whole(self, name: str) -> memoryview:
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
            memory = _Memory(bytearray(self._check_size(stream, name)))
            self._read(stream, name, [_Wanted(0, len(memory.view), memory)], [])
        return memory.view

    def _by_file(self, plan: LoadPlan) -> Dict[str, List[ReadItem]]:
        by_file: Dict[str, List[ReadItem]] = {}
        for request in plan.items:
            by_file.setdefault(self.storage_data[request.storage_index].relative_path, []).append(request)
        return by_file

    def _read_items(self, stream: Any, name: str, requests: List[ReadItem], planner: LoadPlanner) -> None:
        wanted: List[_Wanted] = []
        around: List[Tuple[int, int]] = []
        unpacked = []
        whole: Dict[Any, _Memory] = {}  # by place, since several requests may ask for one item
        for request in requests:
            info = self.storage_data[request.storage_index]
            begin, end = info.offset, info.offset + info.length
            large = self._large(stream, request, planner) if info.length >= LARGE else None
            if large is not None:
                own_rows, first_value, last_value = large
                wanted.append(own_rows)
                # What tells where the values are must be right as well; other ranks' rows are theirs to check.
                around += [(begin, first_value), (last_value, end)]
                continue
            if begin not in whole:
                whole[begin] = _Memory(bytearray(info.length))
                wanted.append(_Wanted(begin, end, whole[begin]))
            unpacked.append((request, whole[begin]))
        for part in _without_overlaps(wanted):
            self._read(stream, name, part, around)
        for request, memory in unpacked:
            _unpack(request, memory, planner)

    def _large(self, stream: Any, request: ReadItem, planner: LoadPlanner) -> Any:
        """(where the bytes of a large tensor's wanted rows are in the file and where they go, where all of its values begin
        and end); None for what isn't a tensor of rows laid end to end."""
        info = self.storage_data[request.storage_index]
        with FakeTensorMode():  # reads no values, and says where they are
            stored = torch.load(self._slice_file(stream, info), map_location="cpu", weights_only=True)
        if stored.dim() == 0 or not stored.is_contiguous():
            return None
        row = _bytes((1, *stored.shape[1:]), stored.dtype)
        first_value = info.offset + offset_in_checkpoint(stored)
        last_value = first_value + stored.untyped_storage().nbytes()
        start = first_value + stored.storage_offset() * stored.itemsize + request.storage_offsets[0] * row
        target = planner.resolve_tensor(request).detach()
        is_same = target.is_cpu and target.is_contiguous() and target.dtype == stored.dtype
        if is_same and tuple(request.lengths[1:]) == tuple(stored.shape[1:]):
            sink: Any = _Memory(_view(target))
        else:
            sink = _Rows(stored.shape, stored.dtype, request, target)
        return _Wanted(start, start + request.lengths[0] * row, sink), first_value, last_value

    def _read(self, stream: Any, name: str, wanted: List[_Wanted], around: List[Tuple[int, int]]) -> None:
        """Fills the sinks of `wanted` (sorted, not overlapping), and checks every block that these or `around` touch."""
        size = self._check_size(stream, name)
        said = self._said_of(name)["crc32"]
        # Format 2 had one checksum a file.
        block, checksums = (max(size, 1), [said]) if isinstance(said, int) else (BLOCK, [int(x, 16) for x in said.split()])
        touched = [(piece.begin, piece.end) for piece in wanted] + around
        numbers = {n for begin, end in touched if begin < end for n in range(begin // block, (end - 1) // block + 1)}
        waiting, scratch = deque(wanted), memoryview(bytearray(CHUNK))
        for number in sorted(numbers):
            position, end, crc = number * block, min((number + 1) * block, size), 0
            stream.seek(position)
            while position < end:
                while waiting and waiting[0].end <= position:
                    waiting.popleft()
                room, sink, stop = scratch, None, end
                if waiting and waiting[0].begin <= position:
                    room, sink, stop = waiting[0].sink.room(), waiting[0].sink, min(end, waiting[0].end)
                elif waiting:
                    stop = min(end, waiting[0].begin)
                room = room[: min(stop - position, CHUNK)]
                got = stream.readinto(room)
                if not got:
                    raise Damaged(f"{name} ends at {position} of {size} bytes")
                crc = zlib.crc32(room[:got], crc)
                position += got
                if sink is not None:
                    sink.filled(got)
            if crc != checksums[number]:
                raise Damaged(f"{name} has another checksum than when it was written")

    def _check_size(self, stream: Any, name: str) -> int:
        size, expected = stream.seek(0, io.SEEK_END), self._said_of(name)["bytes"]
        if size != expected:
            raise Damaged(f"{name} has {size} of {expected} bytes")
        return size

    def _said_of(self, name: str) -> JsonObject:
        if name not in self.files:
            raise Damaged(f"{name} is not in the list of files")
        return self.files[name]


def _unpack(request: ReadItem, memory: _Memory, planner: LoadPlanner) -> None:
    """An item that was read whole goes where it belongs."""
    tensor = torch.load(io.BytesIO(memory.view), map_location="cpu", weights_only=True)
    target = planner.resolve_tensor(request).detach()
    target.copy_(narrow_tensor_by_index(tensor, request.storage_offsets, request.lengths))
    planner.commit_tensor(request, target)


def _without_overlaps(wanted: List[_Wanted]) -> List[List[_Wanted]]:
    """The same in as few lists as it takes: a rank with several column parts asks for some rows more than once."""
    parts: List[List[_Wanted]] = []
    for piece in sorted(wanted, key=lambda piece: piece.begin):
        free = next((part for part in parts if part[-1].end <= piece.begin), None)
        if free is None:
            parts.append([piece])
        else:
            free.append(piece)
    return parts


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
