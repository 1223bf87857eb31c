"""Times training steps on random users, stage by stage, for several encoders and lengths: what `fuxi-torchrec bench` shows.

A step is the product's own: the Trainer's, with its batch made in line. All encoders of one length are held at once and run
in turns, so that what else the machine does falls on each alike; numbers are medians.
"""

import dataclasses
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import torch

from fuxi_torchrec.bench.random_dataset import random_dataset
from fuxi_torchrec.config import Config, DataConfig, EncoderName
from fuxi_torchrec.data.batch import SequenceBatch
from fuxi_torchrec.data.loader import StreamCursor, TrainingStream
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.profiling.flops import non_embedding_parameters, training_flops
from fuxi_torchrec.profiling.memory import PeakMemory, available, out_of_memory_as_user_error
from fuxi_torchrec.profiling.stages import StageClock, clocked, stage
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.sharding.memory_estimate import ADAMW_COPIES, FLOAT_BYTES, KEPT_WIDTHS
from fuxi_torchrec.training.build import build_trainer

LESS = "ask for fewer --tokens, shorter --lengths or a smaller model"
WARM_UP_STEPS = 2  # the first one makes the optimizer's state, the second one is looked at for its memory


@dataclass
class BenchRow:
    """One encoder at one length.

    users, peak_bytes: of this rank; tokens, flops: of a step of all ranks. seconds, stages, other (what no stage takes):
    medians, which need not add up. peak_bytes: weights and optimizer included; None where nobody tells.
    """

    encoder: str
    length: int
    users: int
    tokens: int
    parameters: int
    flops: int
    seconds: float
    stages: Dict[str, float]
    other: float
    tokens_per_second: float
    mfu: float
    peak_bytes: Optional[int]


@dataclass(frozen=True)
class BenchSize:
    """Size of a benchmark. tokens: inputs of a rank's step, whatever the length; at least the greatest length. items:
    the catalogue. steps: timed ones of each case."""

    tokens: int
    items: int
    steps: int


class BenchCase:
    """An encoder at a length: `step` trains on all its users once, and returns the seconds of its stages, "step" and
    "other".

    Close `stack` after use.
    """

    def __init__(self, config: Config, length: int, size: BenchSize, world: World, stack: ExitStack):
        self.memory, seed = PeakMemory(world.device), config.trainer.seed
        dataset = random_dataset(length, size.tokens, size.items, seed)
        users = dataset.identity.num_users
        data = DataConfig(max_sequence_length=length, batch_size=users, shuffle_buffer=users)
        self.config, self.length, self.world = dataclasses.replace(config, data=data), length, world
        run = RunFolder(stack.enter_context(tempfile.TemporaryDirectory()))
        self.trainer = build_trainer(self.config, dataset, run, world)
        stack.callback(self.trainer.progression.close)
        # Every rank takes all users, not a part of them.
        self.stream = TrainingStream(dataset, data, self.trainer.stream.sampler, seed)
        self.batches = self._batches()
        self.turns: List[Dict[str, float]] = []

    def _batches(self) -> Iterator[SequenceBatch]:
        """An epoch after the other, each of one batch."""
        cursor = StreamCursor()
        while True:
            for batch in self.stream.epoch(cursor):
                cursor = StreamCursor(epoch=cursor.epoch + 1, step=batch.cursor.step)
                self.host_lengths, self.candidates = batch.host_lengths, batch.num_candidates
                yield batch

    def step(self) -> Dict[str, float]:
        """Runs one training step; returns the seconds of its stages, "step" (all of it) and "other" (what no stage
        takes)."""
        with clocked(StageClock(self.world.device)) as clock:
            start = time.perf_counter()
            with stage("loader"):
                batch = self.trainer.pipeline.take(self.batches)
            assert batch is not None  # there is always another epoch
            self.trainer.step(batch)
            self.trainer.record.read(batch.cursor.step)
            seconds, stages = time.perf_counter() - start, clock.take()
            return {**stages, "step": seconds, "other": seconds - sum(stages.values())}

    def warm_up(self) -> None:
        """Runs the steps that do not count, and measures the peak memory of the last one."""
        for _ in range(WARM_UP_STEPS - 1):
            self.step()
        self.memory.restart()
        self.step()
        self.peak_bytes = self.memory.peak()

    def row(self, peak_flops: float) -> BenchRow:
        """Summarises the turns as one row of the table; a collective. peak_flops: FLOP/s of a device, for MFU."""
        medians = {name: statistics.median(turn[name] for turn in self.turns) for name in self.turns[0]}
        seconds, other, model = medians.pop("step"), medians.pop("other"), self.config.model
        here = [sum(self.host_lengths), training_flops(model, self.host_lengths, self.candidates)]
        tokens, flops = self.world.sum_on_host(here)
        return BenchRow(
            encoder=model.encoder,
            length=self.length,
            users=len(self.host_lengths),
            tokens=tokens,
            parameters=non_embedding_parameters(model, self.config.padded_length),
            flops=flops,
            seconds=seconds,
            stages=medians,
            other=other,
            tokens_per_second=tokens / seconds,
            mfu=flops / seconds / (peak_flops * self.world.size),
            peak_bytes=self.peak_bytes,
        )


def run_bench(
    config: Config,
    encoders: Sequence[EncoderName],
    lengths: Sequence[int],
    size: BenchSize,
    world: World,
    peak_flops: float,
    report: Callable[[str], None],
) -> List[BenchRow]:
    """Times every encoder at every length; returns rows by length and encoder. A collective.

    Args:
        config: the model (but for its encoder), loss, table, optimizer and trainer of every case.
        peak_flops: FLOP/s of a device, for MFU.
        report: is given a line on what is done.

    Raises:
        UserError: memory has run out.
    """
    configs, rows = _cases(config, encoders), []
    for length in sorted(lengths):
        rows += _run_length(configs, length, size, world, peak_flops)
        report(f"length {length:,}: done")
    return rows


def _run_length(
    configs: Sequence[Config], length: int, size: BenchSize, world: World, peak_flops: float
) -> List[BenchRow]:
    with ExitStack() as stack:
        cases = []
        for config in configs:
            with out_of_memory_as_user_error(f"bench: {config.model.encoder}, length {length:,}", LESS):
                cases.append(BenchCase(config, length, size, world, stack))
                cases[-1].warm_up()
        for _ in range(size.steps):
            for case in cases:
                with out_of_memory_as_user_error(f"bench: {case.config.model.encoder}, length {length:,}", LESS):
                    case.turns.append(case.step())
        return [case.row(peak_flops) for case in cases]


def check_memory(
    config: Config, encoders: Sequence[EncoderName], length: int, size: BenchSize, device: torch.device
) -> None:
    """Refuses what will hardly fit: weights with gradient and AdamW's two moments, and activations. Raises UserError."""
    free, tokens = available(device), size.tokens
    for one in _cases(config, encoders):
        model, padded_length = one.model, one.model.padded_length or length + 11
        weights = non_embedding_parameters(model, padded_length) + (padded_length + size.items) * model.embedding_dim
        kept = KEPT_WIDTHS * tokens * model.embedding_dim * model.num_blocks + tokens * config.loss.num_negatives
        needed = FLOAT_BYTES * (ADAMW_COPIES * weights + kept)
        if free is not None and needed > free:
            raise UserError(
                f"bench: {model.encoder} with {tokens:,} tokens needs about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} "
                "GB are free; ask for fewer --tokens or --items, shorter --lengths or a smaller model"
            )


def _cases(config: Config, encoders: Sequence[EncoderName]) -> List[Config]:
    models = [dataclasses.replace(config.model, encoder=name) for name in encoders]
    return [dataclasses.replace(config, model=model) for model in models]
