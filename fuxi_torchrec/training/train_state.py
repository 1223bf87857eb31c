"""Where a run stands: what it counts, what a checkpoint holds of it beside tensors, and what is due there."""

from typing import Optional

from fuxi_torchrec.config import Config
from fuxi_torchrec.data.loader import StreamCursor
from fuxi_torchrec.evaluation.metrics import is_better
from fuxi_torchrec.files import JsonObject

# Of a checkpoint's state; `positions` and `deals`, of all ranks, are the loader's.
COUNTED = ("users_seen", "tokens", "flops", "best_value", "without_better", "evaluated_step", "evaluation_due")


class RunState:
    """Progress of a run: the same on every rank, but for where each one's data go on (`cursor`).

    Args:
        config: the run's.
        num_users: of the data set.
    """

    def __init__(self, config: Config, num_users: int):
        self.config, self.num_users = config, num_users
        self.cursor = StreamCursor()
        self.users_seen = 0  # of the current epoch, over all ranks
        self.tokens, self.flops = 0, 0  # trained on since the first step and what they took, over all ranks
        self.best_value: Optional[float] = None
        self.without_better = 0
        self.evaluated_step = -1
        self.evaluation_due = False  # where a signal has put one off

    def to_dict(self) -> JsonObject:
        """Returns what a checkpoint keeps, as plain values."""
        return {"step": self.step, "epoch": self.epochs_done, **{name: getattr(self, name) for name in COUNTED}}

    def restore(self, state: JsonObject, cursor: StreamCursor) -> None:
        """Takes over a checkpoint's state."""
        self.cursor = cursor
        for name in COUNTED:
            setattr(self, name, state.get(name, getattr(self, name)))

    def trained(self, cursor: StreamCursor, users: int, tokens: int, flops: int) -> None:
        """Counts a step, over all ranks."""
        self.cursor = cursor
        self.users_seen += users
        self.tokens += tokens
        self.flops += flops

    def begin_epoch(self, epoch: int) -> None:
        """Moves on to the beginning of an epoch (from 0)."""
        self.cursor, self.users_seen = StreamCursor(epoch=epoch, step=self.step), 0

    def evaluated(self, value: float) -> bool:
        """Notes the metric of this step's model. Returns whether it is the best so far."""
        self.evaluated_step = self.step
        is_best = self.best_value is None or is_better(self.config.trainer.metric, value, self.best_value)
        self.without_better = 0 if is_best else self.without_better + 1
        if is_best:
            self.best_value = value
        return is_best

    @property
    def step(self) -> int:
        """Number of optimizer steps that were made."""
        return self.cursor.step

    @property
    def epochs_done(self) -> int:
        """Epochs finished, the current one included once it has begun."""
        return self.cursor.epoch + (1 if self.cursor.buffer or self.cursor.taken else 0)

    @property
    def done(self) -> float:
        """Part of the run that is done, 0 … 1."""
        trainer = self.config.trainer
        by_epochs = (self.cursor.epoch + self.users_seen / max(self.num_users, 1)) / trainer.max_epochs
        by_steps = self.step / trainer.max_steps if trainer.max_steps else 0.0
        return min(1.0, max(by_epochs, by_steps))

    @property
    def is_finished(self) -> bool:
        """Whether all epochs, or trainer.max_steps, are done."""
        return self.cursor.epoch >= self.config.trainer.max_epochs or self.reached_max_steps

    @property
    def reached_max_steps(self) -> bool:
        """Whether trainer.max_steps are done."""
        return self.config.trainer.max_steps is not None and self.step >= self.config.trainer.max_steps

    @property
    def patience_is_out(self) -> bool:
        """Whether trainer.patience evaluations in a row found no better model."""
        patience = self.config.trainer.patience
        return patience is not None and self.without_better >= patience

    def evaluates_after_step(self) -> bool:
        """Tells whether an evaluation is due after this step."""
        every = self.config.evaluation.every_steps
        return every is not None and self.step % every == 0

    def saves_after_step(self) -> bool:
        """Tells whether a checkpoint is due after this step."""
        every = self.config.trainer.checkpoint_every_steps
        return every is not None and self.step % every == 0 and not self.is_finished

    def evaluates_after_epoch(self, epoch: int) -> bool:
        """Tells whether an evaluation is due after this epoch (from 0)."""
        every, already = self.config.evaluation.every_epochs, self.evaluated_step == self.step
        return not already and (self.is_finished or bool(every and (epoch + 1) % every == 0))

    def saves_after_epoch(self, epoch: int) -> bool:
        """Tells whether a checkpoint is due after this epoch (from 0)."""
        return (epoch + 1) % self.config.trainer.checkpoint_every_epochs == 0 or self.is_finished

    def chooses_nothing(self) -> bool:
        """Tells whether only the last model is to be evaluated, and that at the very end."""
        evaluation = self.config.evaluation
        return self.best_value is None and evaluation.every_epochs is None and evaluation.every_steps is None
