"""The training loop.

A step: batch -> learning rate -> summed loss -> global number of positions -> backward (which updates sharded tables)
-> clip -> AdamW. What a step draws (order, negatives, dropout) is a function of (seed, rank, step), so a resumed run goes
on as if never stopped. No step waits for a GPU: what the host must know of it, the host knew before.
"""

import signal
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, NoReturn, Optional

import torch

from fuxi_torchrec.checkpoint.manager import Checkpoints
from fuxi_torchrec.config import Config, evaluation_splits
from fuxi_torchrec.config.unused import Resolved, unused_keys
from fuxi_torchrec.data.batch import SequenceBatch
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import Position, TrainingStream, check_same_order, positions_after
from fuxi_torchrec.data.negative_sampler import NegativeSampler, training_frequency
from fuxi_torchrec.data.prefetch import pinned, prefetch, prefetch_depth
from fuxi_torchrec.distributed.failures import Interrupted, signals
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.encoders.mixing import MixingEncoder
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.evaluate import Stopped, evaluate
from fuxi_torchrec.evaluation.popularity import popularity
from fuxi_torchrec.profiling.flops import FORWARD_AND_BACKWARD, encoder_flops, loss_flops, non_embedding_parameters
from fuxi_torchrec.profiling.peak_flops import peak_flops
from fuxi_torchrec.profiling.stages import stage
from fuxi_torchrec.profiling.trace import StepProfile
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.reporting import Progression
from fuxi_torchrec.sharding.model_parallel import build_distributed
from fuxi_torchrec.sharding.plan import PLAN_FILE, plan_record, trained_by
from fuxi_torchrec.training.compile import compile_blocks
from fuxi_torchrec.training.optimizer import build_optimizer, check_parameters, prepare_step
from fuxi_torchrec.training.schedule import learning_rate, step_seed
from fuxi_torchrec.training.step_meter import StepRecord
from fuxi_torchrec.training.train_pipeline import build_pipeline
from fuxi_torchrec.training.train_state import RunState


class StepDone(NamedTuple):
    """loss: mean over the global batch; None where it has been left on the device. positions: the global number. stop:
    whether any rank was told to stop."""

    loss: Optional[float]
    positions: int
    stop: bool


class Trainer:
    """One run, from its first or its resumed step to the last.

    Args:
        config: a checked Config.
        dataset: the prepared data set.
        run: the run's folder.
        world: this process's place.
        resume: go on from the last checkpoint, if there is one.
        profile: record some early steps for a trace viewer.
    """

    def __init__(
        self,
        config: Config,
        dataset: SequenceDataset,
        run: RunFolder,
        world: World,
        resume: bool = False,
        profile: bool = False,
    ):
        self.config, self.dataset, self.run, self.world = config, dataset, run, world
        seed, num_items = config.trainer.seed, dataset.identity.num_items
        torch.manual_seed(seed)
        self.model, self.table = build_distributed(config, dataset.identity, world)
        self._tell_unused()
        if config.trainer.compile:
            compile_blocks(self.model.module.tower.encoder)
        self.optimizer = build_optimizer(self.model, config.optimizer, self.table.rate_ratio)
        self.pipeline = build_pipeline(config, self.model, world.device)
        frequency_V = training_frequency(config.loss, config.data, dataset, world)
        sampler = NegativeSampler(config.loss, num_items, seed, world.rank, frequency_V)
        self.stream = TrainingStream(dataset, config.data, sampler, seed, world.rank, world.size)
        plan, table = self.model.plan, self.table
        beside = {PLAN_FILE: plan_record(plan, table, num_items, config.model.embedding_dim, world.size)}
        self.checkpoints = Checkpoints(run.checkpoints, config, num_items, world, beside, trained_by(plan, table), run)
        self.record = StepRecord(world, peak_flops(config.trainer, world.device))
        self.reads_every_step = world.device.type == "cpu"  # where it costs nothing
        self.state = RunState(config, dataset.identity.num_users)
        self.received: List[int] = []  # signals
        if resume:
            self._resume()
        else:
            self.checkpoints.refuse_others()
        if world.is_main:
            run.describe(config, dataset.identity)
        self.progression = Progression(run, self.state.done, self.state.step, world.is_main)
        self.profile = StepProfile(run, self.progression.say) if profile and world.is_main else None

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
                    self.progression.say(f"no better {self.config.trainer.metric} for {waited}")
                return self._final_evaluation()
        finally:
            if self.profile:
                self.profile.close()
            self.progression.close()

    def counted(self) -> Dict[str, Any]:
        """What the run is made of and took so far: sizes, tokens (over all ranks and epochs, of an early end too) and exact
        FLOPs."""
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
        state, device_type = self.state, self.world.device.type
        epoch = state.position.epoch
        stream = pinned(self.stream.epoch(state.position), device_type)
        batches = self._in_step(prefetch(stream, prefetch_depth(self.config.data, device_type)))
        self.pipeline.drop()
        self.record.start()
        while True:
            with stage("loader"):
                batch = self.pipeline.take(batches)
            done = self._step(batch, bool(self.received))
            if done is None:
                break
            if self.profile:
                self.profile.step()
            self.progression.step(state.done)
            if state.step % self.config.trainer.log_every_steps == 0:
                self._log()
            if done.stop:
                self._stop(evaluation_due=state.evaluates_after_step())
            if state.reached_max_steps:
                break
            if state.evaluates_after_step():
                self._evaluate_and_save(must_save=state.saves_after_step())
                self.record.start()
                if state.patience_is_out:
                    return
            elif state.saves_after_step():
                self.save(is_best=False)
                self.record.start()
        if not self.record.is_empty:
            self._log()
        if not state.reached_max_steps:
            state.begin_epoch(epoch + 1)
            self.stream.deals = []
        self._end_of_epoch(epoch)

    def _end_of_epoch(self, epoch: int) -> None:
        evaluates = self.state.evaluates_after_epoch(epoch)
        if evaluates and self.state.is_finished and self.state.chooses_nothing():
            self.save(is_best=True)  # the final evaluation is of this model
        elif evaluates:
            self._evaluate_and_save(must_save=self.state.saves_after_epoch(epoch))
        elif self.state.saves_after_epoch(epoch):
            self.save(is_best=False)

    def _in_step(self, batches: Iterator[SequenceBatch]) -> Iterator[SequenceBatch]:
        """An epoch's batches, then, among several ranks, empty ones without end: a rank without data left keeps step with
        the others until none has a position left."""
        position = self.state.position
        for batch in batches:
            position = batch.position
            yield batch
        while self.world.size > 1:
            batch = self.stream.empty_batch(position)
            position = batch.position
            yield batch

    def _step(self, batch: Optional[SequenceBatch], stop: bool) -> Optional[StepDone]:
        """One optimizer step on a batch that the pipeline handed out; None: there is none left, or no rank has a position
        left, and no step is made."""
        if batch is None:
            return None
        position = batch.position
        torch.manual_seed(step_seed(self.config.trainer.seed, self.world.rank, position.step))
        self.learning_rate = learning_rate(self.config.optimizer, position.step, self.state.done)
        prepare_step(self.optimizer, self.learning_rate)
        loss_sum = self.pipeline.forward(batch)
        here = [batch.num_positions, len(batch.user_ids_B), stop, batch.num_candidates, self._forward_flops(batch)]
        positions, users, stops, candidates, flops = self.world.sum_on_host(here)
        if positions == 0:
            return None
        self.record.add_loss(position.step, loss_sum, positions, batch.user_ids_B)
        loss = self.record.read(position.step) if self.reads_every_step else None
        # DDP averages over ranks, and so does TorchRec for the rows of a sharded table (its gradient division); the loss
        # is the mean over the positions of the global batch.
        with stage("backward"):
            (loss_sum * (self.world.size / positions)).backward()
        with stage("optimizer"):
            if self.config.optimizer.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad_norm)
            self.optimizer.step()
        if self.config.loss.cross_rank:
            flops += loss_flops(positions, candidates, self.config.model.embedding_dim)
        flops *= FORWARD_AND_BACKWARD
        self.state.trained(position, users, positions, flops)
        self.record.lap(positions, flops)
        return StepDone(loss, positions, stops > 0)

    def _forward_flops(self, batch: SequenceBatch) -> int:
        """Of this rank's tower, and of its loss where no rank sees another's candidates."""
        model = self.config.model
        flops = encoder_flops(model, batch.host_lengths)
        if not self.config.loss.cross_rank:
            flops += loss_flops(batch.num_positions, batch.num_candidates, model.embedding_dim)
        return flops

    def _log(self) -> None:
        step = self.state.step
        line = {"step": step, "epoch": self.state.position.epoch + 1}
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
        self.state.position = Position(**state["positions"][0])
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
            "positions": self.world.gathered(self.state.position.to_dict()),
            "deals": [[position.to_dict() for position in world] for world in self.stream.deals],
            "metrics_bytes": self.run.metrics_size(),
        }
        self.checkpoints.save(self.model, self.optimizer, state, is_best)

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint, or begins where no checkpoint was ever completed."""
        state = self.checkpoints.load_newest(self.model, self.optimizer, self._say)
        if state and state["dataset"] != self.dataset.identity.content_checksum:
            raise UserError(f"{self.run.path}: its checkpoints were made on another data set; name that by --data.path")
        if state:
            check_same_order(self.run.path, state, self.config)
        if self.world.is_main:
            if state is None:
                self.run.refuse_lost_checkpoints(self.checkpoints.folder)
            self.run.forget_after(state["metrics_bytes"] if state else 0)
        if state is None:
            return
        position, self.stream.deals = positions_after(state, self.world.rank, self.world.size)
        self.state.restore(state, position)

    def _tell_unused(self) -> None:
        """Names the keys that were set without any effect, in one line."""
        resolved = Resolved(self.table.is_sharded, self.world.device.type, self.world.size)
        keys = unused_keys(self.config, resolved)
        if keys:
            self._say(f"not used by this run: {', '.join(keys)}")

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, file=sys.stderr, flush=True)
