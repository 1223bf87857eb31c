"""Negatives of all ranks, on two real processes: loss and gradients are those of one process on the batches' union."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fuxi_torchrec.config import Config, LossConfig
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.data.batch import collate
from fuxi_torchrec.data.dataset import UserRows
from fuxi_torchrec.data.negative_sampler import NegativeSampler
from fuxi_torchrec.data.splits import Windows
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.model.recommender import build_model
from fuxi_torchrec.sharding.memory_estimate import candidate_traffic_bytes

pytestmark = pytest.mark.thorough

V, STEP = 40, 7
FREQUENCY_V = np.random.default_rng(0).zipf(1.5, V).clip(max=100)
LENGTHS = [5, 3, 9, 4, 6, 2, 7]
CASES = {
    "shared": LossConfig(negatives="shared", num_negatives=10),
    "shared, logQ": LossConfig(negatives="shared", num_negatives=10, sampling_alpha=0.7, log_q=True),
    "in_batch": LossConfig(negatives="in_batch"),
    "in_batch, logQ, history": LossConfig(negatives="in_batch", log_q=True, mask_history=True),
    "mixed": LossConfig(negatives="mixed", num_negatives=6, mask_history=True),
    "mixed, logQ": LossConfig(
        negatives="mixed", num_negatives=6, sampling_alpha=0.5, uniform_negatives=3, log_q=True
    ),
}
# Users of the first rank; the second has the others. With all of them there, the second keeps step without data.
SPLITS = (4, len(LENGTHS))


def config_of(case):
    config = Config(loss=replace(CASES[case], cross_rank=True))
    config.model.embedding_dim = config.model.value_dim = 8
    config.model.dropout = config.model.input_dropout = 0.0
    check(config)
    return config


def users():
    random, offsets = np.random.default_rng(1), np.concatenate([[0], np.cumsum(LENGTHS)])
    times = np.sort(random.integers(0, 10**6, offsets[-1]))
    rows = UserRows(np.arange(len(LENGTHS)), offsets, random.integers(0, V, offsets[-1]), times)
    return rows, Windows(rows.user_ids_U, offsets[:-1], offsets[1:])


def batch_of(part, sampler):
    rows, windows = users()
    return collate(rows, windows.take(part), sampler, STEP)


def parts_of(split):
    return slice(0, split), slice(split, None)


class UnionSampler(NegativeSampler):
    """What one process would have drawn that draws both ranks' pools: the in-batch items are the union's."""

    def __init__(self, config):
        one = replace(config, cross_rank=False)
        super().__init__(
            replace(one, num_negatives=2 * one.num_negatives, uniform_negatives=2 * one.uniform_negatives),
            V,
            seed=3,
            frequency_V=FREQUENCY_V,
        )
        self.ranks = [NegativeSampler(one, V, 3, rank, FREQUENCY_V) for rank in range(2)]

    def draw_pool(self, generator, step):
        super().draw_pool(generator, step)
        nothing = np.zeros(0, dtype=np.int64)  # pools are drawn first, so that positives make no difference to them
        return torch.cat([rank.sample(nothing, step).ids_U for rank in self.ranks]).numpy()


def step_of(config, batch, world):
    """Mean loss over all ranks' positions, and every parameter's gradient."""
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(config, V, 1.0, torch.device("cpu")))
    loss_sum = model(batch)
    total, positions = world.sum(torch.stack([loss_sum.detach().double(), torch.tensor(batch.num_tokens).double()]))
    (loss_sum * (world.size / positions)).backward()
    return total / positions, {name: p.grad for name, p in model.named_parameters()}


class Sent:
    """Counts what the collectives of a candidates' exchange send and receive on this rank."""

    def __init__(self):
        self.bytes, gather, scatter = 0, dist.all_gather_into_tensor, dist.reduce_scatter_tensor
        dist.all_gather_into_tensor = lambda out, mine: self.count(out.nbytes, lambda: gather(out, mine))
        dist.reduce_scatter_tensor = lambda mine, of_all: self.count(of_all.nbytes, lambda: scatter(mine, of_all))

    def count(self, nbytes, collective):
        self.bytes += nbytes  # of both ranks: one half goes out, the other comes in
        return collective()


def work(rank, port_file, results):
    torch.set_num_threads(1)
    sent = Sent()
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    world, done = World(rank, 2, torch.device("cpu")), {}
    for case in CASES:
        for split in SPLITS:
            config = config_of(case)
            sampler = NegativeSampler(config.loss, V, 3, rank, FREQUENCY_V)
            sent.bytes = 0
            done[case, split] = *step_of(config, batch_of(parts_of(split)[rank], sampler), world), sent.bytes
    if rank == 0:
        torch.save(done, results)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder / "store"), str(folder / "results")), nprocs=2)
    return torch.load(folder / "results")


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_give_the_loss_and_gradients_of_one_process_on_the_union(two_processes, alone, case, split):
    config = config_of(case)
    batch = batch_of(slice(None), UnionSampler(config.loss))
    expected, gradients = step_of(config, batch, alone)
    loss, found, _ = two_processes[case, split]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("case", ["shared", "shared, logQ"])
def test_what_the_exchange_moves_is_what_is_planned(two_processes, case):
    config = config_of(case)
    assert two_processes[case, SPLITS[0]][2] == candidate_traffic_bytes(config, V, events=6.0, world_size=2)


def test_other_ranks_negatives_do_change_the_loss(two_processes):
    """The comparison above would be empty if both sides ignored the other rank."""
    config = config_of("shared")
    config.loss.cross_rank = False
    torch.manual_seed(0)
    model = build_model(config, V, 1.0, torch.device("cpu"))
    batch = batch_of(slice(None), NegativeSampler(config.loss, V, 3, 0, FREQUENCY_V))
    own_pool = model(batch) / batch.num_tokens
    assert own_pool.item() < two_processes["shared", len(LENGTHS)][0].item() - 0.1
