"""Saving and loading a large table's checkpoint against torch.save and torch.load of the same tensors.

    python -m benchmarks.checkpoint_rate [--items 10000000] [--processes 2] [--rounds 2] [--folder DIR]

The table (10^7 × 64 float32 is 2.56 GB) is cut by rows over the processes, with row-wise Adagrad's state, in the
product's own `Trainer`. "ours" is fuxi_torchrec.checkpoint.Checkpoints.save and load; "plain" is every process's
torch.save of its part of table and state to a file of its own at the same time, and its torch.load into new tensors.
Both write files anew, flush them, and fsync them before the clock stops; a round is plain, then ours. Loads are timed
twice: "cold", after the files were dropped from the page cache (posix_fadvise), and "cached" right after. Ours compares
checksums on the way, plain does not. The clock runs from when all processes are ready to when the last is done. MB are
10^6 bytes of table and state. Prints one JSON line a round and a Markdown table of medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from typing import Callable, Dict, List, Optional

import torch
import torch.distributed as dist

from benchmarks.large_catalogue import ShardedStep, in_processes, memory_now
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.sharding.model_parallel import local_parts

USERS, NEGATIVES = 8, 128  # of the one step that makes the dense optimizer's state: they don't matter here


def measure(world: World, folder: str, items: int, rounds: int) -> Dict[str, object]:
    """Seconds by kind and round, the same on every rank."""
    options = argparse.Namespace(users=USERS, negatives=NEGATIVES)
    seconds: Dict[str, List[float]] = {}
    with ExitStack() as stack:
        made = ShardedStep(items, options, world, stack)
        made.step()
        trainer, size = made.trainer, made.bytes()
        checkpoints = trainer.checkpoints
        checkpoints.folder = os.path.join(folder, "ours")
        plain = os.path.join(folder, f"plain-{world.rank}.pt")
        tensors = {f"table {row}": part for row, _, part in local_parts(trainer.model)}
        tensors["state"] = torch.ones(size["state"] // 4)  # the same bytes as the fused optimizer's

        def save_plain() -> None:
            with open(plain, "wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

        def save_ours(step: int) -> None:
            state = {"step": step, "best_value": None}
            checkpoints.save(trainer.model, trainer.optimizer, state, is_best=False)

        def load_ours() -> None:
            checkpoints.load("last", trainer.model, trainer.optimizer)

        def load_plain() -> None:
            torch.load(plain)

        before = memory_now()["VmHWM"]
        for turn in range(rounds):
            took = {"plain save": timed(save_plain), "ours save": timed(partial(save_ours, turn))}
            for kind, load in (("plain load", load_plain), ("ours load", load_ours)):
                if world.is_main:
                    drop_from_cache(folder)
                took[f"{kind}, cold"] = timed(load)
                took[f"{kind}, cached"] = timed(load)
            for name, value in took.items():
                seconds.setdefault(name, []).append(value)
            if world.is_main:
                rounded = {name: round(value, 2) for name, value in took.items()}
                print(json.dumps({**rounded, "load": os.getloadavg()[0]}), flush=True)
        return {"bytes": sum(size.values()), "seconds": seconds, "more memory": memory_now()["VmHWM"] - before}


def timed(work: Callable[[], Optional[object]]) -> float:
    """Runs the work; returns its seconds."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def drop_from_cache(folder: str) -> None:
    """Takes the folder's files, all of them written to the disk, out of the page cache."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10**7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="where to write (about three times the table); a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ranks = in_processes(measure, options.processes, folder, options.items, options.rounds)
    total = sum(rank["bytes"] for rank in ranks)
    rate = {name: total / 1e6 / statistics.median(values) for name, values in ranks[0]["seconds"].items()}
    more = ", ".join(f"{rank['more memory'] / 1e9:.2f}" for rank in ranks)
    print(f"\n{total / 1e9:.2f} GB, {options.processes} processes; peak grew by {more} GB, plain's copies included\n")
    print("| | plain, MB/s | ours, MB/s | ours over plain |\n|---|---|---|---|")
    for kind in ("save", "load, cold", "load, cached"):
        plain, ours = rate[f"plain {kind}"], rate[f"ours {kind}"]
        print(f"| {kind} | {plain:,.0f} | {ours:,.0f} | {ours / plain:.2f} |")


if __name__ == "__main__":
    main()
