"""SASRec (arXiv 1808.09781): causal softmax attention and a pointwise feed-forward layer.

Source: its section 3, with the conventions of the research code in docs/models.md, "SASRec": the query is normalised,
key and value are not.

Shapes: T tokens, D embedding, H heads, d = D / H, F feed-forward width; in a length group G users and n positions.
"""

import math
from typing import Callable, Dict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders.base import EncoderBlock, SequenceEncoder, reset_linear_bias
from fuxi_torchrec.ops.jagged import JaggedLayout, from_slots, to_slots
from fuxi_torchrec.ops.row_wise.dispatch import dropout, layer_norm, wide

EPS = 1e-8


def causal_softmax_attention(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: JaggedLayout, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d) v over j <= i of the same user, [T, H, d]; dropout on the weights where dropout_p > 0. One
    length group at a time; rows past a user's end are computed and dropped."""
    qkv_P = [to_slots(x, layout) for x in (query_THd, key_THd, value_THd)]
    outputs = [value_THd.new_zeros(0, *value_THd.shape[1:])]
    for group in layout.groups:
        q, k, v = (
            x[group.start : group.stop].unflatten(0, (group.length, group.users)).permute(1, 2, 0, 3) for x in qkv_P
        )
        if dropout_p == 0:
            y_GHnd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y_GHnd = _attention_with_dropout(q, k, v, dropout_p)
        outputs.append(y_GHnd.permute(2, 0, 1, 3).flatten(0, 1))
    return from_slots(torch.cat(outputs), layout)


def _attention_with_dropout(q_GHnd: Tensor, k_GHnd: Tensor, v_GHnd: Tensor, dropout_p: float) -> Tensor:
    """PyTorch has no fused kernel for this on a CPU, and its dropout draws slowly there."""
    n, d = q_GHnd.shape[-2:]
    future_nn = torch.ones(n, n, dtype=torch.bool, device=q_GHnd.device).triu(1)
    scores_GHnn = wide((q_GHnd * d**-0.5) @ k_GHnd.mT)
    weights_GHnn = torch.softmax(scores_GHnn.masked_fill(future_nn, float("-inf")), -1)
    return dropout(weights_GHnn, dropout_p, training=True).to(v_GHnd.dtype) @ v_GHnd


class FeedForward(nn.Module):
    """x + W_b dropout(act(W_a x)), with dropout after it too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, hidden = config.embedding_dim, int(config.embedding_dim * config.ffn_multiply)
        self.dropout = config.dropout
        activations: Dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
        self.activation = activations[config.activation]
        self.in_weight = nn.Parameter(torch.empty(hidden, D))
        self.in_bias = nn.Parameter(torch.empty(hidden))
        self.out_weight = nn.Parameter(torch.empty(D, hidden))
        self.out_bias = nn.Parameter(torch.empty(D))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for weight, bias in ((self.in_weight, self.in_bias), (self.out_weight, self.out_bias)):
            nn.init.xavier_normal_(weight)
            reset_linear_bias(bias, weight.shape[1])

    def forward(self, x_TD: Tensor) -> Tensor:
        """Computes the layer on every row, [T, D]."""
        hidden_TF = self.activation(F.linear(x_TD, self.in_weight, self.in_bias))
        out_TD = F.linear(dropout(hidden_TF, self.dropout, self.training), self.out_weight, self.out_bias)
        return x_TD + dropout(out_TD, self.dropout, self.training)


def reset_sasrec_positions(position_embedding_ND: Tensor) -> None:
    """Draws a position table: normal, σ = √(1/D), truncated at 2 σ (docs/models.md, "Input")."""
    std = math.sqrt(1 / position_embedding_ND.shape[1])
    nn.init.trunc_normal_(position_embedding_ND, std=std, a=-2 * std, b=2 * std)


class SASRecBlock(EncoderBlock):
    """Attention and feed-forward layer. attention_in_weight holds query, key and value, one above the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.embedding_dim
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.attention_in_weight = nn.Parameter(torch.empty(3 * D, D))
        self.attention_in_bias = nn.Parameter(torch.empty(3 * D))
        self.attention_out_weight = nn.Parameter(torch.empty(D, D))
        self.attention_out_bias = nn.Parameter(torch.empty(D))
        self.ffn = FeedForward(config)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for weight in (self.attention_in_weight, self.attention_out_weight):
            nn.init.xavier_normal_(weight)
        nn.init.zeros_(self.attention_in_bias)
        nn.init.zeros_(self.attention_out_bias)
        self.ffn.reset_parameters()

    def forward(self, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        """Computes the block on the rows of all users, [T, D]."""
        query_TD = layer_norm(x_TD, EPS)
        return self.ffn(layer_norm(query_TD + self._attention(query_TD, x_TD, layout), EPS))

    def _attention(self, query_TD: Tensor, x_TD: Tensor, layout: JaggedLayout) -> Tensor:
        D, heads = x_TD.shape[1], (self.num_heads, -1)
        query = F.linear(query_TD, self.attention_in_weight[:D], self.attention_in_bias[:D])
        key_value = F.linear(x_TD, self.attention_in_weight[D:], self.attention_in_bias[D:])
        key, value = key_value.chunk(2, dim=1)
        q, k, v = (x.unflatten(1, heads) for x in (query, key, value))
        y_TD = self.mix(q, k, v, layout).flatten(1)
        return F.linear(y_TD, self.attention_out_weight, self.attention_out_bias)

    @torch.compiler.disable
    def mix(self, q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, layout: JaggedLayout) -> Tensor:
        """Attends to each user's earlier rows, [T, H, d]."""
        return causal_softmax_attention(q_THd, k_THd, v_THd, layout, self.attention_dropout if self.training else 0.0)


class SASRecEncoder(SequenceEncoder):
    """A stack of SASRec blocks; times are not used."""

    def __init__(self, config: ModelConfig, padded_length: int, time_unit: float = 1.0) -> None:
        super().__init__(config.embedding_dim, padded_length, config.input_dropout, time_unit)
        self.blocks.extend(SASRecBlock(config) for _ in range(config.num_blocks))
        self.reset_parameters()

    def reset_positions(self) -> None:
        """Draws the position table as SASRec does."""
        reset_sasrec_positions(self.position_embedding_ND)

    def batch_context(self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout) -> JaggedLayout:
        """Returns the layout: times are not used."""
        return layout
