"""The private names of torch and TorchRec that the library uses: all stand here, each with a test, so that an upgrade of
one of them breaks in one place.

Where a class of theirs is extended, the methods that are overridden stay with the subclass: training/train_pipeline.py,
checkpoint/storage.py.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

__all__ = [
    "FakeTensorMode",
    "ShardedTensor",
    "apply_optimizer_in_backward",
    "best_plan",
    "is_profiling",
    "is_trained_in_backward",
    "narrow_tensor_by_index",
    "offset_in_checkpoint",
    "own_store",
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
