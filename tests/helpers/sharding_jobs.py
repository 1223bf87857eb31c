"""What the processes of test_sharding.py do."""

import dataclasses
import resource

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.data.batch import collate
from fuxi_torchrec.data.dataset import SequenceDataset, concatenate
from fuxi_torchrec.data.item_counts import count_training_events
from fuxi_torchrec.data.negative_sampler import NegativeSampler, PerTokenNegatives, Sampled, training_frequency
from fuxi_torchrec.data.splits import windows
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation import full_ranking
from fuxi_torchrec.evaluation.evaluate import encoded_queries, evaluate
from fuxi_torchrec.evaluation.popularity import popularity
from fuxi_torchrec.ops.ranking import Seen
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.sharding.model_parallel import build_distributed, local_parts
from fuxi_torchrec.training.build import build_trainer

GLOBAL_BATCH = 30  # users; four ranks get 8, 8, 7 and 7


def tiny(folder, sharding, optimizer=None, **trainer):
    config = Config()
    config.data.path = folder
    config.data.batch_size = 16
    config.data.max_sequence_length = 20
    config.model.embedding_dim = config.model.value_dim = config.model.qk_dim = 8
    config.model.dropout = config.model.input_dropout = 0.0
    config.loss.num_negatives = 10
    config.optimizer.learning_rate = 1e-2
    config.table.sharding, config.table.optimizer = sharding, optimizer
    for key, value in {"device": "cpu", **trainer}.items():
        setattr(config.trainer, key, value)
    check(config)
    return config


class DrawnPerUser:
    """Negatives as a function of step and user: the same global batch however it is cut."""

    def __init__(self, num_items, count):
        self.num_items, self.count = num_items, count

    def sample(self, positive_ids_T, step):
        drawn = [
            np.random.default_rng([step, int(user)]).integers(0, self.num_items, (n, self.count), dtype=np.int32)
            for user, n in zip(self.users, self.lengths)
        ]
        drawn_TK = np.concatenate([np.zeros((0, self.count), np.int32), *drawn])
        negatives = PerTokenNegatives(torch.from_numpy(drawn_TK), torch.from_numpy(positive_ids_T))
        return Sampled(torch.arange(self.num_items), negatives)


class CutPool(NegativeSampler):
    """The run's own sampler, its pool put together from PIECES draws that are the same at any world size."""

    PIECES = 12

    def __init__(self, config, dataset, world):
        frequency_V = training_frequency(config.loss, config.data, dataset, world)
        super().__init__(config.loss, dataset.identity.num_items, 3, 0, frequency_V)
        assert config.loss.num_negatives == self.PIECES // world.size
        self.pieces = range(world.rank, self.PIECES, world.size)

    def draw_pool(self, generator, step):
        own = super().draw_pool(generator, step)
        if self.config.negatives == "in_batch":
            return own
        pool = [self.distribution.draw(np.random.default_rng([step, piece]), 1, np.int64) for piece in self.pieces]
        return np.concatenate(pool)


def loss_curve(world, config, output, steps, order=0):
    """Losses of `steps` steps on the same global batches at any world size; `order` permutes the users inside them."""
    dataset = SequenceDataset(config.data.path)
    run = RunFolder.create(output, config, dataset.identity, False) if world.is_main else RunFolder(output)
    trainer = build_trainer(config, dataset, run, world)
    rows = concatenate([dataset.read(group) for group in dataset.row_groups])
    users = windows(rows, config.data, "train")
    sampler = DrawnPerUser(dataset.identity.num_items, config.loss.num_negatives)
    if config.loss.negatives != "per_token":
        sampler = CutPool(config, dataset, world)
    losses = []
    for step in range(1, steps + 1):
        chosen = np.random.default_rng([step]).permutation(len(users.user_ids_U))[:GLOBAL_BATCH]
        if order:
            chosen = np.random.default_rng([step, order]).permutation(chosen)
        mine = users.take(chosen[world.rank :: world.size])
        sampler.users, sampler.lengths = mine.user_ids_U, mine.stop_U - mine.start_U - 1
        cursor = dataclasses.replace(trainer.state.cursor, step=step)
        batch = trainer.pipeline.take(iter([collate(rows, mine, sampler, step, cursor)]))
        trainer.step(batch)
        losses.append(trainer.record.loss)
    trainer.progression.close()
    return losses


def ranks_and_top(world, config, num_items, num_queries):
    """Ranks of the same targets and top items of the same queries against the same table, however cut. Rank 0 of several
    asks nothing."""
    identity = dataclasses.replace(SequenceDataset(config.data.path).identity, num_items=num_items)
    model, _ = build_distributed(config, identity, world)
    generator = torch.Generator().manual_seed(5)
    query_QD = l2_normalize(torch.randn(num_queries, config.model.embedding_dim, generator=generator))
    target_Q = torch.randint(0, num_items, (num_queries,), generator=generator)
    seen = Seen(*torch.stack([torch.arange(num_queries), target_Q.roll(1)]).repeat(1, 2))
    cuts = np.linspace(0, num_queries, world.size)[[0, *range(world.size)]].astype(int) if world.size > 1 else [0, num_queries]
    start, stop = int(cuts[world.rank]), int(cuts[world.rank + 1])
    with torch.inference_mode():
        ranking = full_ranking.rank_targets(
            model, world, query_QD[start:stop], target_Q[start:stop], seen.of_block(start, stop), 0.05, 1e-6
        )
        top = full_ranking.top_items(model, world, query_QD[:7], seen.of_block(0, 7), 20, 1e-6)
    return ranking.rank_Q, ranking.log_prob_Q, top, sum(part.numel() for _, _, part in local_parts(model))


def metrics(world, config, batch_size):
    """End-to-end evaluation of the freshly initialised model."""
    config.evaluation.batch_size = batch_size
    dataset = SequenceDataset(config.data.path)
    torch.manual_seed(0)
    model, _ = build_distributed(config, dataset.identity, world)
    return evaluate(model, dataset, config, "test", world)


def ranks_of_users(world, config, batch_size, num_items):
    """user id -> rank of the test target, end to end, by the freshly initialised model with so many items."""
    config.evaluation.batch_size = batch_size
    dataset = SequenceDataset(config.data.path)
    torch.manual_seed(0)
    model, _ = build_distributed(config, dataclasses.replace(dataset.identity, num_items=num_items), world)
    ranks = {}
    for queries in encoded_queries(model, dataset, config, "test", world):
        asked = queries.query_BD, queries.target_B, queries.seen
        ranking = full_ranking.rank_targets(model, world, *asked, config.loss.temperature, config.loss.l2_eps)
        ranks.update(zip(queries.user_ids_B.tolist(), ranking.rank_Q.tolist()))
    return ranks


def ranking_memory(world, config, num_items, num_queries):
    """Bytes by which ranking raises this rank's peak memory."""
    identity = dataclasses.replace(SequenceDataset(config.data.path).identity, num_items=num_items)
    model, _ = build_distributed(config, identity, world)
    query_QD = l2_normalize(torch.randn(num_queries, config.model.embedding_dim))
    asked = query_QD, torch.zeros(num_queries, dtype=torch.int64), Seen(*torch.zeros(2, 0, dtype=torch.int64))
    before = peak_memory()
    with torch.inference_mode():
        full_ranking.rank_targets(model, world, *asked, 0.05, 1e-6)
    return peak_memory() - before


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def poisoned_metrics(world, config):
    """The message of an evaluation of a table with one row that isn't finite."""
    dataset = SequenceDataset(config.data.path)
    model, _ = build_distributed(config, dataset.identity, world)
    for _, _, part in local_parts(model)[:1] if world.rank == world.size - 1 else []:
        part[0, 0] = float("nan")
    try:
        evaluate(model, dataset, config, "test", world)
    except UserError as error:
        return str(error)


def trained(world, config, output, resume=False):
    """A whole run: its logged losses and its final metrics."""
    dataset = SequenceDataset(config.data.path)
    run = RunFolder.create(output, config, dataset.identity, resume) if world.is_main else RunFolder(output)
    dist.barrier()
    results = build_trainer(config, dataset, run, world, resume).fit()
    return [line["loss"] for line in run.metrics() if "loss" in line], results


def counted(world, config, split):
    """The training events of each item, and the popularity row."""
    dataset = SequenceDataset(config.data.path)
    counts_V = count_training_events(dataset, config.data, world, whole_histories=True)
    return counts_V.tolist(), popularity(dataset, config, split, world)


def first_move(world, config, output):
    """How far the first step moves any cell of the table."""
    dataset = SequenceDataset(config.data.path)
    run = RunFolder.create(output, config, dataset.identity, False) if world.is_main else RunFolder(output)
    trainer = build_trainer(config, dataset, run, world)
    before = [part.clone() for _, _, part in local_parts(trainer.model)]
    trainer.step(trainer.pipeline.take(trainer.stream.epoch(trainer.state.cursor)))
    trainer.progression.close()
    return max(float((part - old).abs().max()) for (_, _, part), old in zip(local_parts(trainer.model), before))


def exchanged_ahead(world, config, output):
    """How many lookups of the next batch are on their way once a batch's forward pass is done."""
    dataset = SequenceDataset(config.data.path)
    run = RunFolder.create(output, config, dataset.identity, False) if world.is_main else RunFolder(output)
    trainer = build_trainer(config, dataset, run, world)
    batches = trainer.with_empty_batches(trainer.stream.epoch(trainer.state.cursor))
    trainer.pipeline.forward(trainer.pipeline.take(batches))
    ahead = len(trainer.pipeline.contexts[1].input_dist_tensors_requests)
    trainer.pipeline.drop()
    trainer.progression.close()
    return ahead


def held_and_saved(world, config, output):
    """The bytes of the table and of its optimizer's state that this rank holds after a step, and the checkpoint's name."""
    dataset = SequenceDataset(config.data.path)
    run = RunFolder.create(output, config, dataset.identity, False) if world.is_main else RunFolder(output)
    trainer = build_trainer(config, dataset, run, world)
    trainer.step(trainer.pipeline.take(trainer.stream.epoch(trainer.state.cursor)))
    trainer.save(is_best=False)
    trainer.progression.close()
    state = trainer.optimizer.state_dict()["state"].get("embeddings.embeddings.item.weight", {})
    state_bytes = sum(part.nbytes for value in state.values() for part in held(value) if part.dim())  # not the step count
    return sum(part.nbytes for _, _, part in local_parts(trainer.model)), state_bytes, trainer.state.cursor.step


def held(value):
    """This rank's tensors of one entry of an optimizer's state."""
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
