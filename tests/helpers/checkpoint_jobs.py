"""What the processes of test_sharding.py do with checkpoints: tables whose every value tells its row and column."""

import dataclasses
import zlib
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from fuxi_torchrec.checkpoint.manager import Checkpoints, create_optimizer_state
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.sharding.model_parallel import build_distributed, local_parts
from fuxi_torchrec.training.optimizer import build_optimizer


@contextmanager
def small_pieces():
    """Blocks and chunks so small that a table of a few thousand rows has many, and everything counts as large."""
    names = ("storage.BLOCK", "reader.BLOCK", "storage.CHUNK", "reader.CHUNK")
    with mock.patch("fuxi_torchrec.checkpoint.reader.LARGE", 1):
        patches = [mock.patch(f"fuxi_torchrec.checkpoint.{name}", 4096 if "BLOCK" in name else 1000) for name in names]
        for patch in patches:
            patch.start()
        yield
        for patch in patches:
            patch.stop()


def made(world, config, num_items, folder):
    identity = dataclasses.replace(SequenceDataset(config.data.path).identity, num_items=num_items)
    model, table = build_distributed(config, identity, world)
    optimizer = build_optimizer(model, config.optimizer, table.rate_ratio)
    create_optimizer_state(model, optimizer)
    return model, optimizer, Checkpoints(folder, config, num_items, world)


def states(optimizer):
    """This rank's parts of the table's optimizer's state: (name, first row, values)."""
    return [
        (name, shard.metadata.shard_offsets[0], shard.tensor)
        for state in optimizer.state_dict()["state"].values()
        for name, value in state.items()
        if hasattr(value, "local_shards")
        for shard in value.local_shards()
    ]


def save(world, config, num_items, folder, steps=1):
    """Checkpoints 1 … steps; checkpoint s holds s + row + column / 64 in the table and s + row in its optimizer."""
    with small_pieces():
        model, optimizer, checkpoints = made(world, config, num_items, folder)
        for step in range(1, steps + 1):
            for row, column, part in local_parts(model):
                rows, columns = (torch.arange(first, first + n) for first, n in zip((row, column), part.shape))
                part.copy_(step + rows[:, None] + columns / 64)
            for _, row, values in states(optimizer):
                ascending = step + torch.arange(row, row + len(values), dtype=values.dtype)
                values.copy_(ascending.reshape(-1, *[1] * (values.dim() - 1)).expand(values.shape))
            checkpoints.save(model, optimizer, {"step": step, "best_value": None}, is_best=False)


def load(world, config, num_items, folder, with_optimizer):
    """(what was said of damaged ones, the step loaded, table's parts, optimizer's parts, bytes read)."""
    said, read = [], 0

    def crc32(view, before):
        nonlocal read
        read += len(view)
        return zlib.crc32(view, before)

    with small_pieces(), mock.patch("fuxi_torchrec.checkpoint.reader.zlib", SimpleNamespace(crc32=crc32)):
        model, optimizer, checkpoints = made(world, config, num_items, folder)
        if with_optimizer:
            state = checkpoints.load_newest(model, optimizer, said.append)
        else:
            state = checkpoints.load("last", model)
    return said, state["step"], local_parts(model), states(optimizer) if with_optimizer else [], read


def memory_of_loading(world, config, num_items, folder):
    """Bytes that loading adds at its peak to a process that holds model and optimizer, and bytes of both."""
    model, optimizer, checkpoints = made(world, config, num_items, folder)
    checkpoints.save(model, optimizer, {"step": 1, "best_value": None}, is_best=False)
    checkpoints.load("last", model, optimizer)  # what is imported or cached at the first time
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = _status("VmRSS")
    checkpoints.load("last", model, optimizer)
    return _status("VmHWM") - before, sum(part.nbytes for _, _, part in local_parts(model))


def _status(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
