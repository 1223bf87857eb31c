"""Step time and peak memory as the catalogue grows, the table cut by rows over real gloo processes of one thread each.

    python -m benchmarks.large_catalogue [--items 10000 100000 1000000 10000000] [--rounds 5] [--steps 4]

The product's own step (`Trainer`, `shared` negatives, row-wise Adagrad) on the same users at every size: the same
lengths and times, ids drawn anew over the catalogue. Prints two Markdown tables.

Step time: all sizes live in one pair of processes and take turns, a round being `--steps` steps at each size, in an
order that rotates, so that whatever else the machine does hits all alike. "Ratio" is the median over rounds of a size's
median step over that of the first size in the same round.

Memory: fresh processes for each size, `--memory-steps` steps. "Beyond imports" is the peak resident memory of a rank
(VmHWM) less what it had once everything was imported, "made" the same before the first step; the goal is that the sum
over the ranks is at most table + optimizer state + 1 GB. "Ranking adds" is the peak of a rank while its users' targets
are ranked against the whole catalogue, less what it held before: a block of scores, whatever the catalogue.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, Callable, Dict, Iterator, List, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks.research_step import LONGEST, Shape, draw_users
from fuxi_torchrec.config import Config, DataConfig, LossConfig, ModelConfig, TableConfig, TrainerConfig
from fuxi_torchrec.data.dataset import RowGroup, UserRows
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.data.loader import StreamCursor
from fuxi_torchrec.distributed.world import World, start_world
from fuxi_torchrec.evaluation.full_ranking import rank_targets
from fuxi_torchrec.ops.ranking import Seen
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.sharding.model_parallel import local_parts
from fuxi_torchrec.training.build import build_trainer

WIDTH = 64
GB = 1e9


class RankUsers:
    """A SequenceDataset in memory, a row group of `users` users for each rank; an epoch is one batch a rank."""

    def __init__(self, num_items: int, users: int, ranks: int, seed: int = 0):
        drawn = draw_users(Shape(users * ranks, num_items, WIDTH, 1, WIDTH, 2, 1), seed)
        events_B = (drawn.lengths_B + 2).numpy()  # the last one is held out
        keep_BN = np.arange(drawn.ids_BN.shape[1])[None] < events_B[:, None]
        self.parts = []
        for begin in range(0, users * ranks, users):
            mine = slice(begin, begin + users)
            ids_E, times_E = (x_BN[mine].numpy()[keep_BN[mine]] for x_BN in (drawn.ids_BN, drawn.timestamps_BN))
            offsets = np.concatenate([[0], events_B[mine].cumsum()])
            self.parts.append(UserRows(np.arange(begin, begin + users), offsets, ids_E - 1, times_E))
        self.row_groups = [RowGroup("memory", rank, users) for rank in range(ranks)]
        self.identity = DatasetIdentity(
            name="memory",
            num_users=users * ranks,
            num_items=num_items,
            num_events=int(events_B.sum()),
            catalogue="all",
            time_unit=1.0,
            min_timestamp=0,
            max_timestamp=int(drawn.timestamps_BN.max()),
            max_events_per_user=int(events_B.max()),
            source="benchmark",
            source_checksum="",
            content_checksum="",
        )

    def read(self, group: RowGroup, log_probs: bool = False) -> UserRows:
        """Returns the users of a rank."""
        return self.parts[group.index]


class ShardedStep:
    """`step()` trains on the users once. Close the stack after use."""

    def __init__(self, num_items: int, options: argparse.Namespace, world: World, stack: ExitStack):
        dataset = RankUsers(num_items, options.users, world.size)
        run = RunFolder(stack.enter_context(tempfile.TemporaryDirectory()))
        self.trainer = build_trainer(sharded_config(options.users, options.negatives), dataset, run, world)
        stack.callback(self.trainer.progression.close)
        self.cursor = StreamCursor()

    def step(self) -> float:
        """Seconds of one step, the ranks having begun together."""
        dist.barrier()
        start = time.perf_counter()
        (batch,) = self.trainer.stream.epoch(self.cursor)
        self.trainer.step(batch)
        seconds = time.perf_counter() - start
        self.cursor = replace(self.cursor, epoch=self.cursor.epoch + 1, step=batch.cursor.step)
        return seconds

    def bytes(self) -> Dict[str, int]:
        """This rank's part of the table and of its optimizer's state."""
        table = sum(part.nbytes for _, _, part in local_parts(self.trainer.model))
        return {"table": table, "state": sum(map(_nbytes, self.trainer.model.fused_optimizer.state.values()))}


def sharded_config(users: int, negatives: int) -> Config:
    """Makes the config of a run with a sharded table."""
    return Config(
        data=DataConfig(max_sequence_length=LONGEST, batch_size=users),
        model=ModelConfig(embedding_dim=WIDTH, value_dim=WIDTH),
        loss=LossConfig(negatives="shared", num_negatives=negatives),
        table=TableConfig(sharding="row_wise", optimizer="rowwise_adagrad"),
        trainer=TrainerConfig(device="cpu", keep_checkpoints=1, async_checkpoint=False),
    )


def _nbytes(state: Any) -> int:
    """Bytes that this process holds of an optimizer's state: tensors, sharded ones, in dicts."""
    if isinstance(state, dict):
        return sum(map(_nbytes, state.values()))
    if hasattr(state, "local_shards"):
        return sum(shard.tensor.nbytes for shard in state.local_shards())
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def step_times(world: World, options: argparse.Namespace) -> List[List[List[float]]]:
    """Seconds by size, round and step."""
    with ExitStack() as stack:
        steps = [ShardedStep(num_items, options, world, stack) for num_items in options.items]
        for step in steps:
            step.step()
        rounds: List[List[List[float]]] = [[] for _ in steps]
        for turn in range(options.rounds):
            for place in range(len(steps)):
                size = (turn + place) % len(steps)
                rounds[size].append([steps[size].step() for _ in range(options.steps)])
        return rounds


def memory(world: World, num_items: int, options: argparse.Namespace) -> Dict[str, float]:
    """Measures the memory that a rank takes, in bytes, by what takes it."""
    before = memory_now()["VmRSS"]
    with ExitStack() as stack:
        step = ShardedStep(num_items, options, world, stack)
        made = memory_now()["VmHWM"] - before
        for _ in range(options.memory_steps):
            step.step()
        beyond = memory_now()["VmHWM"] - before
        adds = ranking_adds(step.trainer.model, world, num_items, options.users)
        return {**step.bytes(), "imported": before, "made": made, "beyond": beyond, "ranking": adds}


def ranking_adds(model: DistributedModelParallel, world: World, num_items: int, users: int) -> int:
    """Bytes by which ranking `users` random queries of each rank raises the peak."""
    queries_QD, target_Q = torch.randn(users, WIDTH), torch.randint(num_items, (users,))
    seen = Seen(torch.arange(users), torch.randint(num_items, (users,)))
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak begins anew
    before = memory_now()["VmRSS"]
    rank_targets(model, world, queries_QD, target_Q, seen, temperature=0.05, normalize_eps=1e-6)
    return memory_now()["VmHWM"] - before


def memory_now() -> Dict[str, int]:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def in_processes(job: Callable, processes: int, *arguments: Any) -> List[Any]:
    """job(world, *arguments) on so many fresh processes of one thread each; every rank's result. Where one dies, so do the
    others, which would wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started, results = {}, [None] * processes
    for rank in range(processes):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, rank, place, job, arguments), daemon=True)
        with _one_thread():
            process.start()
        there.close()
        started[here] = rank, process
    try:
        while started:
            for here in wait(started):
                results[started[here][0]] = here.recv()
                started.pop(here)[1].join()
    except EOFError:
        rank, process = started.pop(here)
        process.join()
        raise SystemExit(f"rank {rank} died with exit code {process.exitcode}") from None
    finally:
        for _, process in started.values():
            process.kill()
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """For processes started meanwhile: their OpenMP and Arrow pools are made at import."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _work(pipe: Any, rank: int, place: Dict[str, Any], job: Callable, arguments: Sequence[Any]) -> None:
    os.environ.update({name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})
    torch.set_num_threads(1)
    with start_world("cpu") as world:
        pipe.send(job(world, *arguments))


def time_table(items: Sequence[int], ranks: Sequence[List[List[List[float]]]]) -> str:
    """A step takes as long as its slowest rank."""
    seconds = np.array(ranks).max(0)  # [size, round, step]
    by_round = np.median(seconds, axis=2)
    lines = ["| items | median step, s | quickest, s | ratio | ratios of the rounds |", "|---|---|---|---|---|"]
    for size, num_items in enumerate(items):
        ratios = by_round[size] / by_round[0]
        spread = f"{ratios.min():.3f} … {ratios.max():.3f}"
        quickest, median = seconds[size].min(), np.median(seconds[size])
        lines.append(f"| {num_items:,} | {median:.4f} | {quickest:.4f} | {np.median(ratios):.3f} | {spread} |")
    return "\n".join(lines)


def memory_line(num_items: int, ranks: Sequence[Dict[str, float]]) -> str:
    """Writes the memory table's line of one catalogue."""
    table, state, beyond = (sum(rank[name] for rank in ranks) / GB for name in ("table", "state", "beyond"))
    each, made, imported, ranking = (
        ", ".join(f"{rank[name] / GB:.2f}" for rank in ranks) for name in ("beyond", "made", "imported", "ranking")
    )
    rest = beyond - table - state
    values = f"{table:.3f} | {state:.3f} | {imported} | {made} | {each} | {beyond:.2f} | {rest:.2f}"
    return f"| {num_items:,} | {values} | {'yes' if rest <= 1 else 'no'} | {ranking} |"


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--users", type=int, default=128, help="of a rank's batch")
    parser.add_argument("--negatives", type=int, default=128, help="in a rank's pool")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round, at each size")
    parser.add_argument("--memory-steps", type=int, default=3)
    parser.add_argument("--only", choices=["time", "memory"])
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if options.only != "memory":
        print(time_table(options.items, in_processes(step_times, options.processes, options)), flush=True)
        print(f"\nload before {load:.1f}, after {os.getloadavg()[0]:.1f}\n", flush=True)
    if options.only != "time":
        print("| items | table, GB | state | imported, by rank | made | beyond imports | sum | above both | ≤ 1 GB | ranking |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for num_items in options.items:
            print(memory_line(num_items, in_processes(memory, options.processes, num_items, options)), flush=True)


if __name__ == "__main__":
    main()
