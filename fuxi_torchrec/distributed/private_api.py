"""The private names of torch and TorchRec that the library uses: all stand here, each with a test, so that an upgrade of
one of them breaks in one place.

Where a class of theirs is extended, the methods that are overridden stay with the subclass: training/train_pipeline.py,
checkpoint/storage.py.
"""

from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _dump_fr_trace  # type: ignore[attr-defined]  # torch's stubs lack it
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MemoryFormatEncoding
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

__all__ = [
    "FakeTensorMode",
    "MemoryFormatEncoding",
    "ShardedTensor",
    "apply_optimizer_in_backward",
    "best_plan",
    "dump_memory_snapshot",
    "flight_recorder_trace",
    "is_profiling",
    "is_trained_in_backward",
    "narrow_tensor_by_index",
    "offset_in_checkpoint",
    "on_out_of_memory",
    "own_store",
    "record_memory_history",
]


def own_store() -> dist.Store:
    """Returns a new connection to the store that the default process group was made with: the group's may be waiting."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # torch's stubs lack it


def offset_in_checkpoint(fake: Tensor) -> int:
    """Tells where in its file the bytes of a tensor's storage begin, once torch.load has read it in FakeTensorMode."""
    offset = fake.untyped_storage()._checkpoint_offset
    assert offset is not None, "the tensor was not read in FakeTensorMode"
    return offset


def is_trained_in_backward(parameter: Tensor) -> bool:
    """Tells whether a fused optimizer updates the parameter during backward."""
    return hasattr(parameter, "_in_backward_optimizers")


def is_profiling() -> bool:
    """Tells whether a profiler of torch records at the moment."""
    return torch.autograd._profiler_enabled()


def best_plan(planner: Any) -> list:
    """Returns the sharding options that an EmbeddingShardingPlanner has chosen; empty for a model without tables."""
    return planner._best_plan or []


def flight_recorder_trace() -> bytes:
    """Returns the last collectives of this rank's gloo groups, and the state of each, as a pickle of plain values."""
    return _dump_fr_trace()


def record_memory_history(entries: int) -> None:
    """Keeps the newest `entries` allocations and frees on this process's GPU, with their stacks."""
    torch.cuda.memory._record_memory_history(max_entries=entries)


def on_out_of_memory(observer: Callable[[int, int, int, int], None]) -> None:
    """Has a GPU's allocator call observer(device, bytes asked for, bytes there are, bytes free) before it raises."""
    torch._C._cuda_attach_out_of_memory_observer(observer)  # type: ignore[attr-defined]  # CUDA builds have it


def dump_memory_snapshot(path: str) -> None:
    """Writes what holds the GPU's memory, and the history that is kept, as a pickle of plain values."""
    torch.cuda.memory._dump_snapshot(path)
