"""The training loop.

A step: batch -> learning rate -> summed loss -> global number of positions -> backward (which updates sharded tables)
-> clip -> AdamW. What a step draws (order, negatives, dropout) is a function of (seed, rank, step), so a resumed run goes
on as if never stopped.
"""

import math
import signal
import sys
import time
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist

from fuxi_torchrec.batch import SequenceBatch
from fuxi_torchrec.checkpoint import Checkpoints
from fuxi_torchrec.config import Config, OptimizerConfig, evaluation_splits
from fuxi_torchrec.dataset import SequenceDataset
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation import Stopped, evaluate, popularity
from fuxi_torchrec.faults import Interrupted, signals
from fuxi_torchrec.flops import causal_pairs, non_embedding_parameters, training_flops_of
from fuxi_torchrec.loader import Position, TrainingStream, positions_after, prefetch, prefetch_depth
from fuxi_torchrec.metrics import is_better
from fuxi_torchrec.negatives import NegativeSampler, training_frequency
from fuxi_torchrec.pipelines import build_pipeline
from fuxi_torchrec.progress import Progression, Rate
from fuxi_torchrec.run_folder import RunFolder
from fuxi_torchrec.sharding import World, build_distributed, build_optimizer, prepare_step
from fuxi_torchrec.shards import PLAN_FILE, plan_record, trained_by


class Trainer:
    """One run, from its first or its resumed step to the last.

    Args:
        config: a checked Config.
        dataset: the prepared data set.
        run: the run's folder.
        world: this process's place.
        resume: go on from the last checkpoint, if there is one.
    """

    def __init__(self, config: Config, dataset: SequenceDataset, run: RunFolder, world: World, resume: bool = False):
        self.config, self.dataset, self.run, self.world = config, dataset, run, world
        seed, num_items = config.trainer.seed, dataset.identity.num_items
        torch.manual_seed(seed)
        self.model, self.table = build_distributed(config, dataset.identity, world)
        self.optimizer = build_optimizer(self.model, config.optimizer, self.table.rate_ratio)
        self.pipeline = build_pipeline(config, self.model, world.device)
        frequency_V = training_frequency(config.loss, dataset)
        sampler = NegativeSampler(config.loss, num_items, seed, world.rank, frequency_V)
        self.stream = TrainingStream(dataset, config.data, sampler, seed, world.rank, world.size)
        plan, table = self.model.plan, self.table
        beside = {PLAN_FILE: plan_record(plan, table, num_items, config.model.embedding_dim, world.size)}
        self.checkpoints = Checkpoints(run.checkpoints, config, num_items, world, beside, trained_by(plan, table))
        self.position = Position()
        self.users_seen = 0  # of the current epoch, over all ranks
        self.tokens, self.pairs = 0, 0  # positions trained on since the first step, and their pairs j <= i, over all ranks
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
            self.progression.close()

    def counted(self) -> Dict[str, Any]:
        """What the run is made of and took so far: sizes, tokens (over all ranks and epochs, of an early end too) and exact
        FLOPs, null where the number of a position's candidates changes from step to step."""
        config, loss = self.config, self.config.loss
        drawn = loss.num_negatives + loss.uniform_negatives
        candidates = drawn * (self.world.size if loss.cross_rank else 1)
        fixed = loss.negatives in ("per_token", "shared")
        flops = training_flops_of(config.model, self.tokens, self.pairs, candidates) if fixed else None
        return {
            "processes": self.world.size,
            "step": self.position.step,
            "users": self.dataset.identity.num_users,
            "items": self.dataset.identity.num_items,
            "width": config.model.embedding_dim,
            "non_embedding_parameters": non_embedding_parameters(config.model, config.padded_length),
            "tokens": self.tokens,
            "flops": flops,
        }

    def _epoch(self) -> None:
        epoch, losses, rate = self.position.epoch, [], Rate()
        depth = prefetch_depth(self.config.data, self.world.device.type)
        batches = self._in_step(prefetch(self.stream.epoch(self.position), depth))
        self.pipeline.drop()
        while True:
            done = self._step(self.pipeline.take(batches), bool(self.received))
            if done is None:
                break
            loss, positions, stop = done
            losses.append((loss, positions))
            rate.add(positions)
            step = self.position.step
            self.progression.step(self._progress())
            if step % self.config.trainer.log_every_steps == 0:
                self._log(losses, rate)
            if stop:
                self._stop(evaluation_due=self._evaluation_is_due())
            if self._reached_max_steps():
                break
            if self._evaluation_is_due():
                self._evaluate_and_save(must_save=self._save_is_due())
                rate.start()
                if self._patience_is_out():
                    return
            elif self._save_is_due():
                self._save(is_best=False)
                rate.start()
        if losses:
            self._log(losses, rate)
        if not self._reached_max_steps():
            self.position, self.users_seen = Position(epoch=epoch + 1, step=self.position.step), 0
            self.stream.deals = []
        self._end_of_epoch(epoch, already=self.evaluated_step == self.position.step)

    def _end_of_epoch(self, epoch: int, already: bool) -> None:
        last = self._finished()
        every = self.config.evaluation.every_epochs
        due = (epoch + 1) % self.config.trainer.checkpoint_every_epochs == 0 or last
        if (every and (epoch + 1) % every == 0 and not already) or (last and not already):
            self._evaluate_and_save(must_save=due)
        elif due:
            self._save(is_best=False)

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

    def _step(self, batch: Optional[SequenceBatch], stop: bool) -> Optional[Tuple[float, int, bool]]:
        """One optimizer step on a batch that the pipeline handed out; None: there is none left.

        Returns the global mean loss, the global number of positions, and whether any rank was told to stop; None (and
        no step is made) where no rank has a position left.
        """
        if batch is None:
            return None
        position = batch.position
        torch.manual_seed(_step_seed(self.config.trainer.seed, self.world.rank, position.step))
        self.learning_rate = learning_rate(self.config.optimizer, position.step, self._progress())
        prepare_step(self.optimizer, self.learning_rate)
        loss_sum = self.pipeline.forward(batch)
        here = [batch.num_positions, len(batch.user_ids_B), stop, causal_pairs(batch.host_lengths)]
        here = torch.tensor(here, dtype=torch.float64, device=self.world.device)
        total, positions, users, stops, pairs = self.world.sum(torch.cat([loss_sum.detach().double()[None], here])).tolist()
        if positions == 0:
            return None
        loss = total / positions
        if not math.isfinite(loss):
            raise self._diverged(batch, float(loss_sum.detach()), position.step)
        # DDP averages over ranks, and so does TorchRec for the rows of a sharded table (its gradient division); the loss
        # is the mean over the positions of the global batch.
        (loss_sum * (self.world.size / positions)).backward()
        if self.config.optimizer.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad_norm)
        self.optimizer.step()
        self.position = position
        self.users_seen += int(users)
        self.tokens, self.pairs = self.tokens + int(positions), self.pairs + int(pairs)
        return loss, int(positions), stops > 0

    def _diverged(self, batch: SequenceBatch, loss_sum: float, step: int) -> UserError:
        """Every rank comes here, since the loss is that of all; the users are those of the ranks where it broke."""
        mine = [] if math.isfinite(loss_sum) else batch.user_ids_B.tolist()
        users = [user for some in self._gathered(mine) for user in some]
        shown = ", ".join(map(str, users[:10])) + (f", … ({len(users)} in all)" if len(users) > 10 else "")
        whose = f"users of its batch: {shown}"
        return UserError(
            f"step {step}: the loss is not finite, stopped before the update; {whose}; "
            "try a lower optimizer.learning_rate or optimizer.clip_grad_norm"
        )

    def _gathered(self, value: Any) -> List[Any]:
        values = [value]
        if self.world.size > 1:
            values = [None] * self.world.size
            dist.all_gather_object(values, value)
        return values

    def _log(self, losses: List[Tuple[float, int]], rate: Rate) -> None:
        positions = sum(count for _, count in losses)
        line = {
            "step": self.position.step,
            "epoch": self.position.epoch + 1,
            "loss": sum(loss * count for loss, count in losses) / positions,
            "tokens_per_second": rate.take(),
            "learning_rate": self.learning_rate,
        }
        losses.clear()
        self.progression.training(line)

    def _evaluate_and_save(self, must_save: bool) -> None:
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
            self._save(is_best)

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
        self._save(is_best=False, evaluation_due=evaluation_due)
        self.checkpoints.wait()
        raise Interrupted(self._signal())

    def _signal(self) -> int:
        return self.received[0] if self.received else signal.SIGTERM

    def _save(self, is_best: bool, evaluation_due: bool = False) -> None:
        positions = self._gathered(self.position.to_dict())
        state = {
            "step": self.position.step,
            "epoch": self._epochs_done(),
            "dataset": self.dataset.identity.content_checksum,
            "positions": positions,
            "deals": [[position.to_dict() for position in world] for world in self.stream.deals],
            "metrics_bytes": self.run.metrics_size(),
            "users_seen": self.users_seen,
            "tokens": self.tokens,
            "pairs": self.pairs,
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
        self.users_seen, self.tokens, self.pairs = (state.get(name, 0) for name in ("users_seen", "tokens", "pairs"))
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


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of the step-th step (from 1): linear warm-up, then constant, or cosine in `progress` (0 … 1)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step, 1]).generate_state(1, np.uint64)[0] >> 1)
