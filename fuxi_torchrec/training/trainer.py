"""The training loop.

A step: batch -> learning rate -> summed loss -> global number of tokens -> backward (which updates sharded tables)
-> clip -> AdamW. What a step draws (order, negatives, dropout) is a function of (seed, rank, step), so a resumed run goes
on as if never stopped. No step waits for a GPU: what the host must know of it, the host knew before.
"""

import signal
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, NoReturn, Optional

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from fuxi_torchrec.checkpoint.manager import Checkpoints
from fuxi_torchrec.config import Config, evaluation_splits
from fuxi_torchrec.data.batch import SequenceBatch
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import StreamCursor, TrainingStream
from fuxi_torchrec.data.prefetch import pinned, prefetch, prefetch_depth
from fuxi_torchrec.distributed.failures import Interrupted, signals
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.encoders.mixing import MixingEncoder
from fuxi_torchrec.evaluation.evaluate import Stopped, evaluate
from fuxi_torchrec.evaluation.popularity import popularity
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.profiling.flops import FORWARD_AND_BACKWARD, encoder_flops, loss_flops, non_embedding_parameters
from fuxi_torchrec.profiling.stages import stage
from fuxi_torchrec.profiling.trace import StepProfile
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.reporting import Progression
from fuxi_torchrec.training.optimizer import check_parameters, clip_gradients, prepare_step
from fuxi_torchrec.training.schedule import learning_rate, step_seed
from fuxi_torchrec.training.step_meter import StepRecord
from fuxi_torchrec.training.train_pipeline import Pipeline
from fuxi_torchrec.training.train_state import RunState


class StepTotals(NamedTuple):
    """Counts of a step over all ranks; stop: whether any rank was told to stop; flops: forward and backward."""

    tokens: int
    users: int
    stop: bool
    flops: int


class StepResult(NamedTuple):
    """What a step gives: this rank's summed loss, on the device, and the counts of all ranks. Without a token on any rank
    there was nothing to do, and nothing was updated."""

    loss_sum: Tensor
    totals: StepTotals


@dataclass
class TrainingParts:
    """What a trainer is made of; see `build_trainer`. profile: None unless some steps are to be traced."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    pipeline: Pipeline
    stream: TrainingStream
    checkpoints: Checkpoints
    record: StepRecord
    state: RunState
    progression: Progression
    profile: Optional[StepProfile] = None


class Trainer:
    """Trains one run, from its first or its resumed step to the last.

    Args:
        config: a checked Config.
        dataset: the prepared data set.
        run: the run's folder.
        world: this process's place.
        parts: model, optimizer, data and everything else (`build_trainer` makes them).
    """

    def __init__(self, config: Config, dataset: SequenceDataset, run: RunFolder, world: World, parts: TrainingParts):
        self.config, self.dataset, self.run, self.world = config, dataset, run, world
        self.model, self.optimizer, self.pipeline, self.stream = parts.model, parts.optimizer, parts.pipeline, parts.stream
        self.checkpoints, self.record, self.state = parts.checkpoints, parts.record, parts.state
        self.progression, self.profile = parts.progression, parts.profile
        self.reads_every_step = world.device.type == "cpu"  # where it costs nothing
        self.received: List[int] = []  # signals

    def step(self, batch: SequenceBatch) -> StepResult:
        """Trains on one global batch, of which every rank brings its part, as the pipeline handed it out."""
        self.prepare(batch)
        loss_sum = self.forward(batch)
        totals = self.count(batch)
        if totals.tokens:
            self.backward(batch, loss_sum, totals)
            self.update(batch, totals)
        return StepResult(loss_sum.detach(), totals)

    def prepare(self, batch: SequenceBatch) -> None:
        """Sets the step's random seed and learning rate, and clears gradients."""
        step = batch.cursor.step
        torch.manual_seed(step_seed(self.config.trainer.seed, self.world.rank, step))
        self.learning_rate = learning_rate(self.config.optimizer, step, self.state.done)
        prepare_step(self.optimizer, self.learning_rate)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Computes this rank's summed loss, float32 scalar."""
        return self.pipeline.forward(batch)

    def count(self, batch: SequenceBatch) -> StepTotals:
        """Adds up over all ranks what the host knows of the step; a collective of the hosts alone."""
        config = self.config
        flops = encoder_flops(config.model, batch.host_lengths)
        if not config.loss.cross_rank:
            flops += loss_flops(batch.num_tokens, batch.num_candidates, config.model.embedding_dim)
        here = [batch.num_tokens, len(batch.user_ids_B), bool(self.received), batch.num_candidates, flops]
        tokens, users, stops, candidates, flops = self.world.sum_on_host(here)
        if config.loss.cross_rank:  # each token is set against every rank's candidates
            flops += loss_flops(tokens, candidates, config.model.embedding_dim)
        return StepTotals(tokens, users, stops > 0, FORWARD_AND_BACKWARD * flops)

    def backward(self, batch: SequenceBatch, loss_sum: Tensor, totals: StepTotals) -> None:
        """Makes the gradients of the mean loss over the global batch; sharded tables are updated on the way.

        Raises UserError, before anything is updated, for a loss that is not finite where reading it costs nothing.
        """
        self.record.add_loss(batch.cursor.step, loss_sum, totals.tokens, batch.user_ids_B)
        if self.reads_every_step:
            self.record.read(batch.cursor.step)
        # DDP averages over ranks, and so does TorchRec for the rows of a sharded table (its gradient division); the loss
        # is the mean over the tokens of the global batch.
        with stage("backward"):
            (loss_sum * (self.world.size / totals.tokens)).backward()

    def update(self, batch: SequenceBatch, totals: StepTotals) -> None:
        """Clips gradients, updates the dense parameters, and moves the run on by this step."""
        with stage("optimizer"):
            clip_gradients(self.model, self.config.optimizer.clip_grad_norm)
            self.optimizer.step()
        self.state.trained(batch.cursor, totals.users, totals.tokens, totals.flops)
        self.record.lap(totals.tokens, totals.flops)

    def fit(self) -> Dict[str, Dict[str, float]]:
        """Trains to the end, then evaluates the best checkpoint. Returns {split: metrics} with a popularity row as
        {"popularity " + split: metrics}. Raises Interrupted after a signal, UserError for a diverged loss."""
        try:
            with signals() as self.received:
                if self.state.evaluation_due:  # what a signal put off
                    self._evaluate_and_save(must_save=True)
                while not self.state.is_finished and not self.state.patience_is_out:
                    self._epoch()
                if self.state.patience_is_out:
                    waited = f"{self.state.without_better} evaluations"
                    self.progression.report(f"no better {self.config.trainer.metric} for {waited}")
                return self._final_evaluation()
        finally:
            if self.profile:
                self.profile.close()
            self.progression.close()

    def counted(self) -> JsonObject:
        """Sums up what the run is made of and took so far: sizes, tokens (over all ranks and epochs, of an early end
        too) and exact FLOPs."""
        config = self.config
        return {
            "processes": self.world.size,
            "step": self.state.step,
            "users": self.dataset.identity.num_users,
            "items": self.dataset.identity.num_items,
            "width": config.model.embedding_dim,
            "non_embedding_parameters": non_embedding_parameters(config.model, config.padded_length),
            "tokens": self.state.tokens,
            "flops": self.state.flops,
        }

    def _epoch(self) -> None:
        epoch = self.state.cursor.epoch
        self.record.start()
        for batch in self._batches():
            totals = self.step(batch).totals
            if not totals.tokens:
                break
            self._report_step()
            if totals.stop:
                self._stop(evaluation_due=self.state.evaluates_after_step())
            if self.state.reached_max_steps:
                break
            self._evaluate_or_save()
            if self.state.patience_is_out:
                return
        if not self.record.is_empty:
            self._log()
        if not self.state.reached_max_steps:
            self.state.begin_epoch(epoch + 1)
            self.stream.earlier_cursors = []
        self._end_of_epoch(epoch)

    def _batches(self) -> Iterator[SequenceBatch]:
        """The rest of the epoch, as the pipeline hands it out."""
        kind = self.world.device.type
        stream = pinned(self.stream.epoch(self.state.cursor), kind)
        batches = self.with_empty_batches(prefetch(stream, prefetch_depth(self.config.data, kind)))
        self.pipeline.drop()
        while True:
            with stage("loader"):
                batch = self.pipeline.take(batches)
            if batch is None:
                return
            yield batch

    def with_empty_batches(self, batches: Iterator[SequenceBatch]) -> Iterator[SequenceBatch]:
        """Adds empty batches without end to an epoch's, among several ranks: a rank without data left keeps step with the
        others until none has a token left."""
        cursor = self.state.cursor
        for batch in batches:
            cursor = batch.cursor
            yield batch
        while self.world.size > 1:
            batch = self.stream.empty_batch(cursor)
            cursor = batch.cursor
            yield batch

    def _report_step(self) -> None:
        if self.profile:
            self.profile.step()
        self.progression.step(self.state.done)
        if self.state.step % self.config.trainer.log_every_steps == 0:
            self._log()

    def _evaluate_or_save(self) -> None:
        """What is due after a step, in the middle of an epoch."""
        if self.state.evaluates_after_step():
            self._evaluate_and_save(must_save=self.state.saves_after_step())
            self.record.start()
        elif self.state.saves_after_step():
            self.save(is_best=False)
            self.record.start()

    def _end_of_epoch(self, epoch: int) -> None:
        evaluates = self.state.evaluates_after_epoch(epoch)
        if evaluates and self.state.is_finished and self.state.chooses_nothing():
            self.save(is_best=True)  # the final evaluation is of this model
        elif evaluates:
            self._evaluate_and_save(must_save=self.state.saves_after_epoch(epoch))
        elif self.state.saves_after_epoch(epoch):
            self.save(is_best=False)

    def _log(self) -> None:
        step = self.state.step
        line = {"step": step, "epoch": self.state.cursor.epoch + 1}
        self.progression.training({**line, **self.record.take(step), "learning_rate": self.learning_rate})
        for module in self.model.modules():
            if isinstance(module, MixingEncoder):
                module.check_mixing()

    def _evaluate_and_save(self, must_save: bool) -> None:
        self._settle()
        split = self.config.evaluation.split or evaluation_splits(self.config.data)[0]
        try:
            metrics = self._evaluate(split)
        except Stopped:
            self._stop(evaluation_due=True)
        is_best = self.state.evaluated(metrics[self.config.trainer.metric])
        if is_best or must_save:
            self.save(is_best)

    def _evaluate(self, split: str, **extra: Any) -> Dict[str, float]:
        started = time.perf_counter()
        self.pipeline.release()
        metrics = evaluate(self.model, self.dataset, self.config, split, self.world, lambda: bool(self.received))
        line = {"split": split, "step": self.state.step, "epoch": self.state.epochs_done, **extra, **metrics}
        self.progression.evaluation({**line, "seconds": round(time.perf_counter() - started, 3)})
        return metrics

    def _final_evaluation(self) -> Dict[str, Dict[str, float]]:
        """The best checkpoint on every split: the numbers that `evaluate RUN_DIR` gives again."""
        state = self.checkpoints.load("best", self.model)
        self.state.cursor = StreamCursor(**state["positions"][0])
        results = {}
        for split in evaluation_splits(self.config.data):
            try:
                results[split] = self._evaluate(split, checkpoint="best")
            except Stopped:  # the end of training is saved
                raise Interrupted(self._signal()) from None
            results[f"popularity {split}"] = popularity(self.dataset, self.config, split, self.world)
        return results

    def _stop(self, evaluation_due: bool) -> NoReturn:
        """Saves and leaves, on all ranks, after a signal to any of them."""
        self.save(is_best=False, evaluation_due=evaluation_due)
        self.checkpoints.wait()
        raise Interrupted(self._signal())

    def _signal(self) -> int:
        return self.received[0] if self.received else signal.SIGTERM

    def _settle(self) -> None:
        """Waits for the steps made so far. Raises UserError where one of them broke the model."""
        self.record.read(self.state.step)
        self.record.lap()

    def save(self, is_best: bool, evaluation_due: bool = False) -> None:
        """Saves everything as it stands, on all ranks; see Checkpoints.save. Raises UserError for a broken model."""
        self._settle()
        check_parameters(self.model, self.world, self.state.step)
        self.state.evaluation_due = evaluation_due
        state = {
            **self.state.to_dict(),
            "dataset": self.dataset.identity.content_checksum,
            "positions": self.world.gathered(self.state.cursor.to_dict()),
            "deals": [[cursor.to_dict() for cursor in world] for world in self.stream.earlier_cursors],
            "metrics_bytes": self.run.metrics_size(),
        }
        self.checkpoints.save(self.model, self.optimizer, state, is_best)
