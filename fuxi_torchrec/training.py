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

from fuxi_torchrec.batch import SequenceBatch
from fuxi_torchrec.checkpoint import Checkpoints
from fuxi_torchrec.compiling import compile_blocks
from fuxi_torchrec.config import Config, evaluation_splits
from fuxi_torchrec.dataset import SequenceDataset
from fuxi_torchrec.encoders.mixing import MixingEncoder
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation import Stopped, evaluate, popularity
from fuxi_torchrec.faults import Interrupted, signals
from fuxi_torchrec.flops import FORWARD_AND_BACKWARD, encoder_flops, loss_flops, non_embedding_parameters
from fuxi_torchrec.hardware import peak_flops
from fuxi_torchrec.loader import Position, TrainingStream, pinned, positions_after, prefetch, prefetch_depth
from fuxi_torchrec.metrics import is_better
from fuxi_torchrec.negatives import NegativeSampler, training_frequency
from fuxi_torchrec.pipelines import build_pipeline
from fuxi_torchrec.profiling import StepProfile
from fuxi_torchrec.progress import Progression
from fuxi_torchrec.run_folder import RunFolder
from fuxi_torchrec.schedule import learning_rate, step_seed
from fuxi_torchrec.sharding import World, build_distributed, build_optimizer, check_parameters, prepare_step
from fuxi_torchrec.shards import PLAN_FILE, plan_record, trained_by
from fuxi_torchrec.stages import stage
from fuxi_torchrec.step_record import StepRecord


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
        if config.trainer.compile:
            compile_blocks(self.model.module.tower.encoder)
        self.optimizer = build_optimizer(self.model, config.optimizer, self.table.rate_ratio)
        self.pipeline = build_pipeline(config, self.model, world.device)
        frequency_V = training_frequency(config.loss, dataset)
        sampler = NegativeSampler(config.loss, num_items, seed, world.rank, frequency_V)
        self.stream = TrainingStream(dataset, config.data, sampler, seed, world.rank, world.size)
        plan, table = self.model.plan, self.table
        beside = {PLAN_FILE: plan_record(plan, table, num_items, config.model.embedding_dim, world.size)}
        self.checkpoints = Checkpoints(run.checkpoints, config, num_items, world, beside, trained_by(plan, table))
        self.record = StepRecord(world, peak_flops(config.trainer, world.device))
        self.reads_every_step = world.device.type == "cpu"  # where it costs nothing
        self.position = Position()
        self.users_seen = 0  # of the current epoch, over all ranks
        self.tokens, self.flops = 0, 0  # positions trained on since the first step and what they took, over all ranks
        self.best_value: Optional[float] = None
        self.without_better = 0
        self.evaluated_step = -1
        self.received: List[int] = []  # signals
        self.evaluation_due = False  # where a signal has put one off
        if resume:
            self._resume()
        else:
            self.checkpoints.refuse_others()
        if world.is_main:
            run.describe(config, dataset.identity)
        self.progression = Progression(run, self._progress(), self.position.step, world.is_main)
        self.profile = StepProfile(run, self.progression.say) if profile and world.is_main else None

    def fit(self) -> Dict[str, Dict[str, float]]:
        """Trains to the end, then evaluates the best checkpoint. Returns {split: metrics} with a popularity row as
        {"popularity " + split: metrics}. Raises Interrupted after a signal, UserError for a diverged loss."""
        try:
            with signals() as self.received:
                if self.evaluation_due:  # what a signal put off
                    self._evaluate_and_save(must_save=True)
                while not self._finished() and not self._patience_is_out():
                    self._epoch()
                if self._patience_is_out():
                    waited = f"{self.without_better} evaluations"
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
            "step": self.position.step,
            "users": self.dataset.identity.num_users,
            "items": self.dataset.identity.num_items,
            "width": config.model.embedding_dim,
            "non_embedding_parameters": non_embedding_parameters(config.model, config.padded_length),
            "tokens": self.tokens,
            "flops": self.flops,
        }

    def _epoch(self) -> None:
        epoch, device_type = self.position.epoch, self.world.device.type
        stream = pinned(self.stream.epoch(self.position), device_type)
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
            self.progression.step(self._progress())
            if self.position.step % self.config.trainer.log_every_steps == 0:
                self._log()
            if done.stop:
                self._stop(evaluation_due=self._evaluation_is_due())
            if self._reached_max_steps():
                break
            if self._evaluation_is_due():
                self._evaluate_and_save(must_save=self._save_is_due())
                self.record.start()
                if self._patience_is_out():
                    return
            elif self._save_is_due():
                self.save(is_best=False)
                self.record.start()
        if not self.record.is_empty:
            self._log()
        if not self._reached_max_steps():
            self.position, self.users_seen = Position(epoch=epoch + 1, step=self.position.step), 0
            self.stream.deals = []
        self._end_of_epoch(epoch, already=self.evaluated_step == self.position.step)

    def _end_of_epoch(self, epoch: int, already: bool) -> None:
        last = self._finished()
        every = self.config.evaluation.every_epochs
        if last and not already and self.best_value is None and every is None and self.config.evaluation.every_steps is None:
            self.save(is_best=True)  # nothing to choose from; the final evaluation is of this model
            return
        due = (epoch + 1) % self.config.trainer.checkpoint_every_epochs == 0 or last
        if (every and (epoch + 1) % every == 0 and not already) or (last and not already):
            self._evaluate_and_save(must_save=due)
        elif due:
            self.save(is_best=False)

    def _in_step(self, batches: Iterator[SequenceBatch]) -> Iterator[SequenceBatch]:
        """An epoch's batches, then, among several ranks, empty ones without end: a rank without data left keeps step with
        the others until none has a position left."""
        position = self.position
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
        self.learning_rate = learning_rate(self.config.optimizer, position.step, self._progress())
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
        self.position = position
        self.users_seen += users
        if self.config.loss.cross_rank:
            flops += loss_flops(positions, candidates, self.config.model.embedding_dim)
        self.tokens, self.flops = self.tokens + positions, self.flops + FORWARD_AND_BACKWARD * flops
        self.record.lap(positions, FORWARD_AND_BACKWARD * flops)
        return StepDone(loss, positions, stops > 0)

    def _forward_flops(self, batch: SequenceBatch) -> int:
        """Of this rank's tower, and of its loss where no rank sees another's candidates."""
        model = self.config.model
        flops = encoder_flops(model, batch.host_lengths)
        if not self.config.loss.cross_rank:
            flops += loss_flops(batch.num_positions, batch.num_candidates, model.embedding_dim)
        return flops

    def _log(self) -> None:
        line = {"step": self.position.step, "epoch": self.position.epoch + 1}
        self.progression.training({**line, **self.record.take(self.position.step), "learning_rate": self.learning_rate})
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
        self.evaluated_step = self.position.step
        value = metrics[self.config.trainer.metric]
        is_best = self.best_value is None or is_better(self.config.trainer.metric, value, self.best_value)
        self.without_better = 0 if is_best else self.without_better + 1
        if is_best:
            self.best_value = value
        if is_best or must_save:
            self.save(is_best)

    def _evaluate(self, split: str, **extra: Any) -> Dict[str, float]:
        started = time.perf_counter()
        self.pipeline.release()
        metrics = evaluate(self.model, self.dataset, self.config, split, self.world, lambda: bool(self.received))
        line = {"split": split, "step": self.position.step, "epoch": self._epochs_done(), **extra, **metrics}
        self.progression.evaluation({**line, "seconds": round(time.perf_counter() - started, 3)})
        return metrics

    def _final_evaluation(self) -> Dict[str, Dict[str, float]]:
        """The best checkpoint on every split: the numbers that `evaluate RUN_DIR` gives again."""
        state = self.checkpoints.load("best", self.model)
        self.position = Position(**state["positions"][0])
        results = {}
        for split in evaluation_splits(self.config.data):
            try:
                results[split] = self._evaluate(split, checkpoint="best")
            except Stopped:  # the end of training is saved
                raise Interrupted(self._signal()) from None
            if self.world.is_main:
                results[f"popularity {split}"] = popularity(self.dataset, self.config, split)
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
        self.record.read(self.position.step)
        self.record.lap()

    def save(self, is_best: bool, evaluation_due: bool = False) -> None:
        """Saves everything as it stands, on all ranks; see Checkpoints.save. Raises UserError for a broken model."""
        self._settle()
        check_parameters(self.model, self.world, self.position.step)
        positions = self.world.gathered(self.position.to_dict())
        state = {
            "step": self.position.step,
            "epoch": self._epochs_done(),
            "dataset": self.dataset.identity.content_checksum,
            "positions": positions,
            "deals": [[position.to_dict() for position in world] for world in self.stream.deals],
            "metrics_bytes": self.run.metrics_size(),
            "users_seen": self.users_seen,
            "tokens": self.tokens,
            "flops": self.flops,
            "best_value": self.best_value,
            "without_better": self.without_better,
            "evaluated_step": self.evaluated_step,
            "evaluation_due": evaluation_due,
        }
        self.checkpoints.save(self.model, self.optimizer, state, is_best)

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint, or begins where no checkpoint was ever completed."""
        state = self.checkpoints.load_newest(self.model, self.optimizer, self._say)
        if state and state["dataset"] != self.dataset.identity.content_checksum:
            raise UserError(f"{self.run.path}: its checkpoints were made on another data set; name that by --data.path")
        if self.world.is_main:
            self.run.forget_after(state["metrics_bytes"] if state else 0)
        if state is None:
            return
        self.position, self.stream.deals = positions_after(state, self.world.rank, self.world.size)
        self.users_seen, self.tokens, self.flops = (state.get(name, 0) for name in ("users_seen", "tokens", "flops"))
        self.evaluated_step, self.evaluation_due = state["evaluated_step"], state["evaluation_due"]
        self.best_value, self.without_better = state["best_value"], state["without_better"]

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, file=sys.stderr, flush=True)

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluation.every_steps
        return every is not None and self.position.step % every == 0

    def _save_is_due(self) -> bool:
        every = self.config.trainer.checkpoint_every_steps
        return every is not None and self.position.step % every == 0 and not self._finished()

    def _epochs_done(self) -> int:
        """Epochs finished, the current one included once it has begun."""
        return self.position.epoch + (1 if self.position.buffer or self.position.taken else 0)

    def _finished(self) -> bool:
        return self.position.epoch >= self.config.trainer.max_epochs or self._reached_max_steps()

    def _reached_max_steps(self) -> bool:
        return self.config.trainer.max_steps is not None and self.position.step >= self.config.trainer.max_steps

    def _patience_is_out(self) -> bool:
        patience = self.config.trainer.patience
        return patience is not None and self.without_better >= patience

    def _progress(self) -> float:
        """Part of the run that is done, 0 … 1, the same on every rank."""
        trainer, users = self.config.trainer, max(self.dataset.identity.num_users, 1)
        by_epochs = (self.position.epoch + self.users_seen / users) / trainer.max_epochs
        by_steps = self.position.step / trainer.max_steps if trainer.max_steps else 0.0
        return min(1.0, max(by_epochs, by_steps))
