"""The loader alone: events a second against what training takes, and its peak memory as the data set grows.

    python -m benchmarks.loader_rate [--shuffle-buffer 16384] [--times 1 2 10] [--training-events-per-second R]

Writes data sets in ML-1M's shape (3,706 items, 20 to 199 supervised events a user) to a temporary folder, `--times` the
shuffle buffer large, and reads a whole epoch of each in a fresh process of one thread: Parquet, shuffling, collation,
and 128 negatives a token (`per_token`) or none. Events are supervised tokens. What training takes is measured on
such a data set by `Trainer`'s step of the ML-1M base model, on all cores, between the measurements of the loader.
"Beyond imports" is the peak resident memory (VmHWM) less what there was once everything was imported. Prints one JSON
line a measurement and a Markdown table.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Dict, List, Optional

import numpy as np
import pyarrow as pa
import torch

from benchmarks.large_catalogue import in_processes, memory_now
from benchmarks.research_step import LONGEST, SHAPES
from data_pipelines.output import OutputFolder
from data_pipelines.writer import Sequences, SequenceWriter
from fuxi_torchrec.config import Config, DataConfig, LossConfig, ModelConfig, TrainerConfig
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import StreamCursor, TrainingStream
from fuxi_torchrec.data.negative_sampler import NegativeSampler
from fuxi_torchrec.distributed.world import World, start_world
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.training.build import build_trainer

BLOCK_USERS = 4096
BASE = SHAPES["ml-1m-base"]


def write_dataset(folder: str, users: int, seed: int = 0) -> None:
    """Random users: lengths as in benchmarks/research_step.py, with the events that begin and that are held out."""
    random = np.random.default_rng(seed)
    with OutputFolder(folder) as output, SequenceWriter(output, users, BASE.items) as writer:
        for first in range(0, users, BLOCK_USERS):
            count = min(BLOCK_USERS, users - first)
            events_B = np.exp(random.standard_normal(count) + 4.6).astype(np.int64).clip(20, LONGEST - 1) + 2
            offsets = np.concatenate([[0], events_B.cumsum()])
            times_E = random.integers(0, 5000, offsets[-1]).cumsum()  # of all users together: ascending in each
            ids_E = random.integers(0, BASE.items, offsets[-1])
            writer.write(Sequences(np.arange(first, first + count), offsets, ids_E, times_E))
        writer.write_items(pa.array(np.arange(BASE.items)))
        writer.finish({}, name="loader", catalogue="all", time_unit=1.0, source="benchmark", source_checksum="")


def base_config(folder: str, shuffle_buffer: int) -> Config:
    """Makes the config whose loader is timed."""
    return Config(
        data=DataConfig(path=folder, max_sequence_length=LONGEST, batch_size=BASE.users, shuffle_buffer=shuffle_buffer),
        model=ModelConfig(embedding_dim=BASE.embedding_dim, num_blocks=BASE.blocks, value_dim=BASE.value_dim),
        loss=LossConfig(negatives="per_token", num_negatives=128),
        trainer=TrainerConfig(device="cpu"),
    )


def read_epoch(world: World, folder: str, shuffle_buffer: int, with_negatives: bool, most: Optional[int]) -> Dict:
    """Events and seconds of an epoch, or of its first `most` events; memory in MB."""
    before = memory_now()["VmRSS"]
    config = base_config(folder, shuffle_buffer)
    dataset = SequenceDataset(folder)
    sampler = NegativeSampler(config.loss, dataset.identity.num_items, 0) if with_negatives else None
    stream = TrainingStream(dataset, config.data, sampler, 0)
    events = batches = 0
    start = time.perf_counter()
    for batch in stream.epoch(StreamCursor()):
        events += batch.num_tokens
        batches += 1
        if most is not None and events >= most:
            break
    seconds = time.perf_counter() - start
    return {
        "negatives": config.loss.num_negatives if with_negatives else 0,
        "events": events,
        "batches": batches,
        "seconds": round(seconds, 2),
        "events_per_second": round(events / seconds),
        "beyond_imports_mb": round((memory_now()["VmHWM"] - before) / 1e6),
    }


def training_rate(folder: str, shuffle_buffer: int, steps: int) -> Dict:
    """Events a second of the Trainer's step, its batches made in line."""
    config = base_config(folder, shuffle_buffer)
    with tempfile.TemporaryDirectory() as run, start_world("cpu") as world:
        trainer = build_trainer(config, SequenceDataset(folder), RunFolder(run), world)
        rates: List[float] = []
        batches = trainer.stream.epoch(StreamCursor())
        for step in range(steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            trainer.step(batch)
            if step:  # the first one warms up, and reads the buffer
                rates.append(batch.num_tokens / (time.perf_counter() - start))
        trainer.progression.close()
    return {"steps": steps, "events_per_second": round(statistics.median(rates)), "quickest": round(max(rates))}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shuffle-buffer", type=int, default=16384, help="users")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 10], help="shuffle buffers in a data set")
    parser.add_argument("--most-events", type=int, help="read only so many of an epoch")
    parser.add_argument("--training-events-per-second", type=float, help="instead of measuring it")
    parser.add_argument("--training-steps", type=int, default=7)
    options = parser.parse_args()
    if BASE.users * (options.training_steps + 1) > options.shuffle_buffer:
        parser.error("--shuffle-buffer: not enough users for --training-steps")
    buffer, most, rows = options.shuffle_buffer, options.most_events, []
    with tempfile.TemporaryDirectory() as folder:
        folders = {times: os.path.join(folder, f"times-{times}") for times in options.times}
        for times, path in folders.items():
            write_dataset(path, times * buffer)

        def read(times: int, with_negatives: bool) -> None:
            (result,) = in_processes(read_epoch, 1, folders[times], buffer, with_negatives, most)
            rows.append({"buffers": times, **result})
            print(json.dumps({"loader": rows[-1], "load": os.getloadavg()[0]}), flush=True)

        for times in options.times:
            read(times, True)
        rate = options.training_events_per_second
        if rate is None:
            trained = training_rate(folders[options.times[0]], buffer, options.training_steps)
            print(json.dumps({"training": trained, "threads": torch.get_num_threads()}), flush=True)
            rate = trained["events_per_second"]
        for times in options.times:
            read(times, False)
    print("\n| shuffle buffers | negatives | events/s | over training's | peak beyond imports, MB |")
    print("|---|---|---|---|---|")
    for row in rows:
        events, memory = row["events_per_second"], row["beyond_imports_mb"]
        print(f"| {row['buffers']} | {row['negatives']} | {events:,} | {events / rate:.1f} | {memory} |")


if __name__ == "__main__":
    main()
