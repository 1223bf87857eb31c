"""HSTU-β: FuXi-β's framework on HSTU's block. Its attention becomes (A_pos + A_time) v: no queries, no keys, and a
function of the time difference in the buckets' place.

Source: FuXi-β (arXiv 2508.10615), the compatibility experiment; HSTU (arXiv 2402.17152); docs/models.md.

Shapes: T tokens, D embedding, H heads, d value size per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig
from fuxi_torchrec.encoders.base import reset_linear_bias
from fuxi_torchrec.encoders.hstu import EPS
from fuxi_torchrec.encoders.mixing import MixingBlock, MixingContext, MixingEncoder
from fuxi_torchrec.ops.row_wise.dispatch import dropout, layer_norm, silu_split


class HSTUBetaBlock(MixingBlock):
    """One HSTU-β layer. input_weight makes u and v, in this order."""

    def __init__(self, config: ModelConfig, padded_length: int) -> None:
        super().__init__(config, CHANNEL_PRESETS["fuxi_beta"], padded_length)
        D, H, d = config.embedding_dim, config.num_heads, config.value_dim
        self.num_heads, self.value_dim, self.dropout = H, d, config.dropout
        self.input_weight = nn.Parameter(torch.empty(D, 2 * H * d))
        self.output_weight = nn.Parameter(torch.empty(D, H * d))
        self.output_bias = nn.Parameter(torch.empty(D))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        nn.init.normal_(self.input_weight, std=0.02)
        nn.init.xavier_uniform_(self.output_weight)
        reset_linear_bias(self.output_bias, self.output_weight.shape[1])
        self.reset_mixers()

    def forward(self, x_TD: Tensor, context: MixingContext) -> Tensor:
        """Computes the block on the rows of all users, [T, D]."""
        values = self.num_heads * self.value_dim
        u, v = silu_split(layer_norm(x_TD, EPS) @ self.input_weight, (values, values))
        y_THd = self.mix_channels(v.unflatten(1, (self.num_heads, self.value_dim)), context).sum(2)
        mixed = dropout(u * layer_norm(y_THd.flatten(1), EPS), self.dropout, self.training)
        return F.linear(mixed, self.output_weight, self.output_bias) + x_TD


def build_hstu_beta(config: ModelConfig, padded_length: int, time_unit: float) -> MixingEncoder:
    """HSTU-β with config.bias_function as the function of time."""
    blocks = [HSTUBetaBlock(config, padded_length) for _ in range(config.num_blocks)]
    return MixingEncoder(config, blocks, padded_length, time_unit)
