"""What the processes of test_sharding.py do where a run changes its sharding or its world between two stretches."""

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from fuxi_torchrec.checkpoint.manager import Checkpoints
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.evaluate import evaluate
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.sharding.model_parallel import build_distributed
from fuxi_torchrec.training.build import build_trainer


def stretch(world, config, output, resume):
    """A run from where it stands to config.trainer.max_steps. Returns what this rank holds and the metrics at its begin
    and at its end, and the (epoch, user) it trained on."""
    dataset = SequenceDataset(config.data.path)
    run = RunFolder.create(output, config, dataset.identity, resume) if world.is_main else RunFolder(output)
    dist.barrier()
    trainer = build_trainer(config, dataset, run, world, resume)
    seen, step = [], trainer.step

    def counted(batch):
        seen.extend((batch.cursor.epoch, user) for user in batch.user_ids_B.tolist())
        return step(batch)

    def state():
        return parts_held(trainer), evaluate(trainer.model, dataset, config, "test", world)

    trainer.step, begin = counted, state()
    while not trainer.state.is_finished:
        trainer._epoch()
    trainer.progression.close()
    return begin, state(), seen


def refused(world, config, output):
    """The message of a resume that is refused."""
    dataset = SequenceDataset(config.data.path)
    try:
        build_trainer(config, dataset, RunFolder(output), world, resume=True)
    except UserError as error:
        return str(error)


def loaded(world, config, output):
    """What this rank holds of a run's last checkpoint, loaded without its optimizer."""
    dataset = SequenceDataset(config.data.path)
    model, _ = build_distributed(config, dataset.identity, world)
    Checkpoints(RunFolder(output).checkpoints, config, dataset.identity.num_items, world).load("last", model)
    return {name: parts_of(value) for name, value in model.state_dict().items()}


def parts_held(trainer):
    """This rank's part of every tensor of model and optimizer: name -> [(offsets, values)]."""
    tensors = dict(trainer.model.state_dict())
    for parameter, state in trainer.optimizer.state_dict()["state"].items():
        tensors.update({f"{parameter}: {name}": value for name, value in state.items()})
    return {name: parts_of(value) for name, value in tensors.items()}


def parts_of(value):
    if isinstance(value, ShardedTensor):
        return [(shard.metadata.shard_offsets, shard.tensor.detach().clone()) for shard in value.local_shards()]
    return [([0] * value.dim(), value.detach().clone())]


def whole(ranks):
    """name -> tensor, put together from what all ranks hold."""
    parts = {}
    for held in ranks:
        for name, more in held.items():
            parts.setdefault(name, []).extend(more)
    return {name: _joined(some) for name, some in parts.items()}


def _joined(parts):
    ends = [[start + length for start, length in zip(offsets, part.shape)] for offsets, part in parts]
    values = torch.full([max(end) for end in zip(*ends)], float("nan"))
    for (offsets, part), end in zip(parts, ends):
        values[tuple(map(slice, offsets, end))] = part
    return values
