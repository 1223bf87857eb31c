"""HSTU (arXiv 2402.17152): pointwise SiLU attention with relative position and bucketed time biases, gated.

Source: its section 3.1 and the research code's conventions in docs/models.md, "HSTU".

Shapes: T tokens, D embedding, H heads, d value and q query/key size per head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders.base import EncoderBlock, SequenceEncoder, reset_linear_bias
from fuxi_torchrec.encoders.channels import ChannelParameters
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.pointwise_attention import silu_attention
from fuxi_torchrec.ops.row_wise.dispatch import dropout, layer_norm, silu_split
from fuxi_torchrec.ops.token_mixing.dispatch import plan_mixing
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

EPS = 1e-6


@dataclass
class HSTUContext:
    """The context that the blocks of one forward share."""

    layout: JaggedLayout
    gaps: TimeGaps


class HSTUBlock(EncoderBlock):
    """One HSTU layer. input_weight makes u, v, q, k in this order."""

    def __init__(self, config: ModelConfig, padded_length: int) -> None:
        super().__init__()
        D, H, d, q = config.embedding_dim, config.num_heads, config.value_dim, config.qk_dim
        self.num_heads, self.value_dim, self.qk_dim = H, d, q
        self.dropout = config.dropout
        self.padded_length = padded_length
        self.positional = ChannelParameters("positional", padded_length)
        self.bucketed_temporal = ChannelParameters("bucketed", padded_length)
        self.input_weight = nn.Parameter(torch.empty(D, 2 * H * (d + q)))
        self.output_weight = nn.Parameter(torch.empty(D, H * d))
        self.output_bias = nn.Parameter(torch.empty(D))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        nn.init.normal_(self.input_weight, std=0.02)
        nn.init.xavier_uniform_(self.output_weight)
        reset_linear_bias(self.output_bias, self.output_weight.shape[1])
        self.positional.reset_parameters()
        self.bucketed_temporal.reset_parameters()

    def forward(self, x_TD: Tensor, context: HSTUContext) -> Tensor:
        """Computes the block on the rows of all users, [T, D]."""
        H, d, q = self.num_heads, self.value_dim, self.qk_dim
        z_TW = layer_norm(x_TD, EPS) @ self.input_weight
        u, v, queries, keys = silu_split(z_TW, (H * d, H * d, H * q, H * q))
        y_THd = self.mix(queries.unflatten(1, (H, q)), keys.unflatten(1, (H, q)), v.unflatten(1, (H, d)), context)
        mixed = dropout(u * layer_norm(y_THd.flatten(1), EPS), self.dropout, self.training)
        return F.linear(mixed, self.output_weight, self.output_bias) + x_TD

    @torch.compiler.disable
    def mix(self, q_THq: Tensor, k_THq: Tensor, v_THd: Tensor, context: HSTUContext) -> Tensor:
        """Attends to each user's earlier rows, [T, H, d]."""
        weights = (self.positional.get_parameter("weight_N"), self.bucketed_temporal.get_parameter("weight"))
        return silu_attention(q_THq, k_THq, v_THd, context.layout, 1 / self.padded_length, *weights, context.gaps)


class HSTUEncoder(SequenceEncoder):
    """A stack of HSTU layers."""

    def __init__(self, config: ModelConfig, padded_length: int, time_unit: float = 1.0) -> None:
        super().__init__(config.embedding_dim, padded_length, config.input_dropout, time_unit)
        self.blocks.extend(HSTUBlock(config, padded_length) for _ in range(config.num_blocks))
        self.reset_parameters()

    def batch_context(self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout) -> HSTUContext:
        """Makes the buckets of the batch's time gaps, once for all blocks."""
        gaps = TimeGaps(timestamps_T, next_timestamps_T, layout, self.time_unit)
        # Attention reads its buckets strip by strip, as blocked token mixing does: made here, they are kept in gaps.
        channels = [block.bucketed_temporal.channel() for block in self.blocks if isinstance(block, HSTUBlock)]
        plan_mixing(channels[0][1][0], layout, channels, gaps, "blocked")
        return HSTUContext(layout, gaps)
