"""What every encoder shares: the input step, the call, and the checks at its edge.

Shapes: T tokens, D embedding, N padded length.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import add_positions


class EncoderBlock(nn.Module):
    """A block of an encoder: `forward` takes x_TD and what the encoder's `batch_context` made."""

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        raise NotImplementedError


class SequenceEncoder(nn.Module):
    """An encoder: jagged item embeddings and times in, one output per row. It knows nothing of tables, losses, files
    or ranks.

    Subclasses fill `blocks` and say in `batch_context` what the blocks of one forward share. What in a block depends on
    where the users lie is its method `mix` (or `mix_channels`); the rest is row by row, and a compiler sees that alone.
    time_unit is the seconds per tick of the timestamps. Source of the input step: docs/models.md, "Input".

    Attributes:
        activation_checkpointing: for backward, keep a block's input alone and compute the rest again.
        is_compiled: the blocks are (training/compile.py); only training runs their compiled code.
    """

    def __init__(self, embedding_dim: int, padded_length: int, input_dropout: float, time_unit: float) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.padded_length = padded_length
        self.input_dropout = input_dropout
        self.time_unit = time_unit
        self.position_embedding_ND = nn.Parameter(torch.empty(padded_length, embedding_dim))
        self.blocks = nn.ModuleList()
        self.activation_checkpointing = self.is_compiled = False

    def reset_parameters(self) -> None:
        """Draws every parameter anew (also after meta-device construction and `to_empty`)."""
        self.reset_positions()
        for block in self.blocks:
            assert isinstance(block, EncoderBlock)
            block.reset_parameters()

    def reset_positions(self) -> None:
        """Draws the position table by Xavier normal: the research code of HSTU and the FuXi encoders overwrites the
        input step's own draw by it."""
        nn.init.xavier_normal_(self.position_embedding_ND)

    def batch_context(self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout) -> Any:
        """Makes what the blocks share, once per forward; its type is the encoder's own."""
        raise NotImplementedError

    def check_fits(self, layout: JaggedLayout) -> None:
        """Checks that every sequence fits into the position table. Raises UserError for a longer one."""
        if layout.max_length > self.padded_length:
            raise UserError(
                f"a sequence of {layout.max_length} events does not fit into model.padded_length = "
                f"{self.padded_length}: cut the history or train with a longer table"
            )

    def input_step(self, embeddings_TD: Tensor, position_T: Tensor) -> Tensor:
        """Adds the position table's rows to the scaled embeddings, [T, D]."""
        return add_positions(
            embeddings_TD, self.position_embedding_ND, position_T, self.input_dropout, self.training
        )

    def forward(
        self, embeddings_TD: Tensor, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout
    ) -> Tensor:
        """Encodes every position of every user.

        Args:
            embeddings_TD: item embeddings of the events, float.
            timestamps_T: int64 ticks, non-decreasing within a user.
            next_timestamps_T: int64 ticks; row i holds t_{i+1}, a user's last row the target's or the request's time.
            layout: where the users lie in T.

        Returns:
            Raw outputs [T, D], not normalised.

        Raises:
            UserError: a sequence is longer than the position table.
        """
        self.check_fits(layout)
        assert embeddings_TD.shape == (layout.num_tokens, self.embedding_dim)
        x_TD = self.input_step(embeddings_TD, layout.position_T)
        context = self.batch_context(timestamps_T, next_timestamps_T, layout)
        for block in self.blocks:
            x_TD = self._run(block, x_TD, context)
        if layout.num_tokens == 0:
            # Data parallelism waits for a gradient of every parameter, zero ones from a rank without users too.
            x_TD = x_TD + 0 * sum(parameter.sum() for parameter in self.parameters())
        return x_TD

    def _run(self, block: nn.Module, x_TD: Tensor, context: Any) -> Tensor:
        # Evaluation and a single row would each be compiled anew, which takes longer than it saves.
        eager = self.is_compiled and (not self.training or len(x_TD) < 2)
        call = block.forward if eager else block
        if self.activation_checkpointing and torch.is_grad_enabled():
            # The state of the random generators is kept as well: dropout drops the same again.
            return checkpoint(call, x_TD, context, use_reentrant=False)
        return call(x_TD, context)


def reset_linear_bias(bias: Tensor, fan_in: int) -> None:
    """Draws a bias as PyTorch's linear layer does."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    nn.init.uniform_(bias, -bound, bound)
