"""FLASH (arXiv 2202.10447): the gated attention unit with squared-ReLU attention, quadratic within a user's sequence.

Source: its sections 3.1 and 3.2. One low-dimensional Z with a scale and an offset per dimension for queries and for keys;
A[i,j] = relu(q_i · k_j / n + bias[i - j])², n the padded length, as FuXi's experiments use it; docs/models.md. Its
mixed-chunk linear attention pays for sequences longer than these encoders', and is left out.

Shapes: T tokens, D embedding, H heads, E = H * d gate and value width, q size of Z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders.base import EncoderBlock, SequenceEncoder, reset_linear_bias
from fuxi_torchrec.encoders.channels import ChannelParameters
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.pointwise_attention import squared_relu_attention
from fuxi_torchrec.ops.row_wise.dispatch import dropout, layer_norm, silu_split

EPS = 1e-6


class FLASHBlock(EncoderBlock):
    """A gated attention unit. input_weight and input_bias make u [E], v [E] and z [q], in this order; scale_2q and
    offset_2q turn z into queries (row 0) and keys (row 1)."""

    def __init__(self, config: ModelConfig, padded_length: int) -> None:
        super().__init__()
        D, E, q = config.embedding_dim, config.num_heads * config.value_dim, config.qk_dim
        self.value_width, self.qk_dim, self.dropout = E, q, config.dropout
        self.padded_length = padded_length
        self.positional = ChannelParameters("positional", padded_length)
        self.norm_weight = nn.Parameter(torch.empty(D))
        self.norm_bias = nn.Parameter(torch.empty(D))
        self.input_weight = nn.Parameter(torch.empty(2 * E + q, D))
        self.input_bias = nn.Parameter(torch.empty(2 * E + q))
        self.scale_2q = nn.Parameter(torch.empty(2, q))
        self.offset_2q = nn.Parameter(torch.empty(2, q))
        self.output_weight = nn.Parameter(torch.empty(D, E))
        self.output_bias = nn.Parameter(torch.empty(D))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        nn.init.xavier_uniform_(self.input_weight)
        nn.init.zeros_(self.input_bias)
        nn.init.normal_(self.scale_2q, std=0.02)
        nn.init.zeros_(self.offset_2q)
        nn.init.xavier_uniform_(self.output_weight)
        reset_linear_bias(self.output_bias, self.value_width)
        self.positional.reset_parameters()

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        """Computes the block on the rows of all users, [T, D]."""
        normed_TD = layer_norm(x_TD, EPS) * self.norm_weight + self.norm_bias
        E = self.value_width
        u, v, z = silu_split(F.linear(normed_TD, self.input_weight, self.input_bias), (E, E, self.qk_dim))
        queries_keys_T2q = z[:, None] * self.scale_2q + self.offset_2q
        queries, keys = queries_keys_T2q.unsqueeze(1).unbind(2)  # one head
        y_T1E = self.mix(queries / self.padded_length, keys, v.unsqueeze(1), layout)
        mixed_TE = dropout(u * y_T1E.flatten(1), self.dropout, self.training)
        return F.linear(mixed_TE, self.output_weight, self.output_bias) + x_TD

    @torch.compiler.disable
    def mix(self, q_T1q: Tensor, k_T1q: Tensor, v_T1E: Tensor, layout: JaggedLayout) -> Tensor:
        """Attention, [T, 1, E]."""
        return squared_relu_attention(q_T1q, k_T1q, v_T1E, layout, self.positional.get_parameter("weight_N"))


class FLASHEncoder(SequenceEncoder):
    """A stack of gated attention units; times are not used."""

    def __init__(self, config: ModelConfig, padded_length: int, time_unit: float = 1.0) -> None:
        super().__init__(config.embedding_dim, padded_length, config.input_dropout, time_unit)
        self.blocks.extend(FLASHBlock(config, padded_length) for _ in range(config.num_blocks))
        self.reset_parameters()

    def batch_context(self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout) -> JaggedLayout:
        """Returns the layout: times are not used."""
        return layout
