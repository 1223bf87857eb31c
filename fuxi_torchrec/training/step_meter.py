"""What a training run keeps of its steps between two log lines: losses, tokens, FLOPs and time."""

import math
import time
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import AGAINST_DIVERGENCE, UserError
from fuxi_torchrec.files import JsonObject


class _Unread(NamedTuple):
    """A step whose loss nobody has read yet."""

    step: int
    loss_sum: Tensor  # this rank's, on the device
    tokens: int  # all ranks'
    user_ids_B: Tensor


class StepRecord:
    """Losses, tokens, FLOPs and time of the steps since the last log line. Losses stay on the device until `read`
    asks for them: a GPU that has to tell its loss at every step stands still meanwhile. Time goes on from `start` to
    `lap`, so that evaluations and checkpoints are left out.

    Args:
        world: whose losses are added up.
        peak_flops: FLOP/s of one device; None: no MFU.

    Attributes:
        loss: newest mean loss over the global batch that was read; nan before.
    """

    def __init__(self, world: World, peak_flops: Optional[float] = None):
        self.world, self.peak_flops = world, peak_flops
        self._unread: List[_Unread] = []
        self._losses: List[Tuple[float, int]] = []
        self.loss = math.nan
        self._tokens, self._flops, self._seconds = 0, 0, 0.0
        self.start()

    def start(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def lap(self, tokens: int = 0, flops: int = 0) -> None:
        """Adds the time since the last call, and the tokens and FLOPs of all ranks that it was spent on."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._tokens += tokens
        self._flops += flops

    def add_loss(self, step: int, loss_sum: Tensor, tokens: int, user_ids_B: Tensor) -> None:
        """Keeps a step's summed loss on this rank, and its number of tokens on all."""
        self._unread.append(_Unread(step, loss_sum.detach(), tokens, user_ids_B))

    def read(self, now: int) -> None:
        """Reads the losses since the last time; the newest is `loss` then. A collective, all ranks read alike.

        Raises UserError at step `now` where one of them is not finite.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        here_S = torch.stack([step.loss_sum for step in unread]).double()
        mine, totals = here_S.tolist(), self.world.sum(here_S).tolist()
        for step, loss_sum, total in zip(unread, mine, totals):
            loss = self.loss = total / step.tokens
            if not math.isfinite(loss):
                raise self._diverged(step, loss_sum, now)
            self._losses.append((loss, step.tokens))

    def _diverged(self, step: _Unread, loss_sum: float, now: int) -> UserError:
        """Every rank comes here, since the loss is that of all; the users are those of the ranks where it broke."""
        mine = [] if math.isfinite(loss_sum) else step.user_ids_B.tolist()
        users = [user for some in self.world.gathered(mine) for user in some]
        shown = ", ".join(map(str, users[:10])) + (f", … ({len(users)} in all)" if len(users) > 10 else "")
        stopped = "stopped before the update"
        if now > step.step:
            stopped = f"read after step {now}; nothing of the steps {step.step} to {now} is saved"
        return UserError(
            f"step {step.step}: the loss is not finite, {stopped}; users of its batch: {shown}; "
            + AGAINST_DIVERGENCE
        )

    @property
    def is_empty(self) -> bool:
        """Whether no loss has been added since `take`."""
        return not self._unread and not self._losses

    def take(self, now: int) -> JsonObject:
        """Returns loss, tokens_per_second, and mfu where a peak is known, of the steps since the last call; see
        `read`."""
        self.read(now)
        self.lap()  # reading waits for the device
        tokens, seconds = sum(count for _, count in self._losses), max(self._seconds, 1e-9)
        line: JsonObject = {
            "loss": sum(loss * count for loss, count in self._losses) / tokens,
            "tokens_per_second": self._tokens / seconds,
        }
        if self.peak_flops is not None:
            line["mfu"] = self._flops / seconds / (self.peak_flops * self.world.size)
        self._losses = []
        self._tokens, self._flops, self._seconds = 0, 0, 0.0
        return line
