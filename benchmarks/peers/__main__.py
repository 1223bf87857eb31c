"""FuXi-β beside RecTools' SASRec and HSTU and the research code's way: the same events, width, blocks, batch and negatives.

    make peers                      installs RecTools into an environment of its own, and runs this on data/ml-1m
    python -m benchmarks.peers data/ml-1m --python .venv-peers/bin/python [--seconds 600] [--output runs/peers]

Each trains for as long as the others, evaluations not counted, and ranks each user's last event against the whole catalogue
less the user's history after each minute. Of the research code's way only the time of a step is taken, on the same batches.
One after the other, each alone on the machine: leave it alone meanwhile. Writes peers.json, peers.md and peers.png.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Callable, Dict, List

import numpy as np
import torch

from benchmarks.peers.page import write_page
from benchmarks.reproduce.step_seconds import Stepper
from benchmarks.research_step import NEGATIVES, PADDED, SHAPES, PaddedUsers, ResearchStep
from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.data.dataset import SequenceDataset, ranges
from fuxi_torchrec.data.splits import windows
from fuxi_torchrec.distributed.world import start_world
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.evaluate import evaluate
from fuxi_torchrec.profiling.memory import keep_freed_memory

CONFIG = "configs/ml-1m/fuxi-beta-sampled-softmax-n128-final.yaml"
RUNNER = os.path.join(os.path.dirname(__file__), "rectools_runner.py")
PEERS = {"RecTools SASRec": "sasrec", "RecTools HSTU": "hstu"}
SHOWN = ("ndcg@10", "hr@10")
STEPS = 5

Line = Dict[str, float]


def write_events(dataset: SequenceDataset, folder: str) -> None:
    """Writes events.csv, what may be trained on under leave-one-out, and targets.csv, each user's last event."""
    with ExitStack() as stack:
        names = ("events.csv", "targets.csv")
        files = [stack.enter_context(open(f"{folder}/{name}", "w", encoding="utf-8", newline="")) for name in names]
        writers = [csv.writer(file) for file in files]
        for writer in writers:
            writer.writerow(("user", "item", "time"))
        for group in dataset.row_groups:
            rows = dataset.read(group)
            for writer, window in zip(writers, ("train", "test")):
                kept = windows(rows, DataConfig(max_sequence_length=rows.item_ids_E.size), window)
                start_U = kept.start_U if window == "train" else kept.stop_U - 1
                at_E = ranges(start_U, kept.stop_U)
                user_E = np.repeat(kept.user_ids_U, kept.stop_U - start_U)
                seconds_E = (rows.timestamps_E[at_E] * dataset.identity.time_unit).astype(np.int64)
                writer.writerows(zip(user_E.tolist(), rows.item_ids_E[at_E].tolist(), seconds_E.tolist()))


def run_peer(python: str, model: str, folder: str, seconds: float, every: float) -> List[Line]:
    """Runs a model of RecTools in its own environment; returns its lines. Raises UserError where it fails."""
    command = [python, RUNNER, model, folder, str(seconds), str(every)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)}: ended with exit code {done.returncode}, for the reason above")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_own(dataset: SequenceDataset, seconds: float, every: float) -> List[Line]:
    """Trains FuXi-β by the product's own trainer; returns its lines."""
    lines: List[Line] = []
    with ExitStack() as stack:
        world = stack.enter_context(start_world("cpu"))
        stepper, trained, due, steps = Stepper(CONFIG, dataset, world, stack), 0.0, every, 0
        trainer = stepper.trainer
        per_epoch = -(-dataset.identity.num_users // trainer.config.data.batch_size)
        while trained < seconds:
            trained += stepper.step()
            steps += 1
            if trained >= due or trained >= seconds:
                due += every
                metrics = evaluate(trainer.model, dataset, trainer.config, "test", world)
                shown = {name: metrics[name] for name in SHOWN}
                lines.append({"seconds": round(trained, 1), "epochs": round(steps / per_epoch, 3), **shown})
    return lines


def research_seconds(dataset: SequenceDataset) -> float:
    """Returns the seconds of an epoch by the research code's way: its step on STEPS batches of users, times their number."""
    shape, taken = SHAPES["ml-1m-base"], []
    histories = training_histories(dataset)
    np.random.default_rng(0).shuffle(histories)
    batches = [padded(histories[first : first + shape.users]) for first in range(0, STEPS * shape.users, shape.users)]
    step = ResearchStep(shape, batches[0])
    for users in batches:
        step.use(users)
        started = time.perf_counter()
        step.step()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]) * -(-dataset.identity.num_users // shape.users)


def training_histories(dataset: SequenceDataset) -> List[np.ndarray]:
    """Lists every user's training events as int64 [2, events]: ids from 1 on, and times."""
    histories = []
    for group in dataset.row_groups:
        rows = dataset.read(group)
        kept = windows(rows, DataConfig(), "train")
        for start, stop in zip(kept.start_U.tolist(), kept.stop_U.tolist()):
            histories.append(np.stack([rows.item_ids_E[start:stop] + 1, rows.timestamps_E[start:stop]]))
    return histories


def padded(histories: List[np.ndarray]) -> PaddedUsers:
    """Pads some users' events to PADDED; times stand still behind the last event."""
    ids_BN, times_BN = (torch.zeros(len(histories), PADDED, dtype=torch.int64) for _ in range(2))
    for row, events in enumerate(histories):
        n = events.shape[1]
        ids_BN[row, :n], times_BN[row, :n] = torch.from_numpy(events)
        times_BN[row, n:] = int(events[1, -1])
    return PaddedUsers(ids_BN, times_BN, torch.tensor([events.shape[1] - 1 for events in histories]))


def main() -> None:
    """Runs the comparison from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of a prepared data set")
    parser.add_argument("--python", required=True, help="the Python of an environment with RecTools")
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, each")
    parser.add_argument("--every", type=float, default=60.0, help="seconds of training between evaluations")
    parser.add_argument("--output", default="runs/peers")
    options = parser.parse_args()
    os.makedirs(options.output, exist_ok=True)
    keep_freed_memory()
    try:
        dataset = SequenceDataset(options.data)
        write_events(dataset, options.output)
        runs: Dict[str, Callable[[], List[Line]]] = {
            "FuXi-β": lambda: run_own(dataset, options.seconds, options.every),
            **{
                name: (lambda model=model: run_peer(options.python, model, options.output, options.seconds, options.every))
                for name, model in PEERS.items()
            },
        }
        found = {}
        for name, run in runs.items():
            print(f"{name}: {options.seconds:g} s of training", file=sys.stderr, flush=True)
            found[name] = run()
        write_page(options.output, found, research_seconds(dataset), NEGATIVES)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None


if __name__ == "__main__":
    main()
