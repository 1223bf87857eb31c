"""FuXi-β (arXiv 2508.10615): a block whose token mixing asks only where and when, never what: no query-key map.

The block, in the order of docs/models.md, "FuXi block"; x its input, A_c the map of channel c, causal:

    (1)  u, v = split(SiLU(RMSNorm(x) W_in))
    (2)  y    = per head, A_c v of all channels side by side     positional, A[i,j] = w[i - j], and
                                                                 temporal, A[i,j] = f(t_{i+1} - t_j), in FuXi-β
    (3)  m    = u ⊙ RMSNorm(y)
    (4)  h    = x + dropout(m) W_0 + b_0
    (5)  g    = dropout(RMSNorm(h))
    (6)  next = h + (SiLU(g W_1) ⊙ (g W_3)) W_2

FuXi-α (arXiv 2502.03036) is the same block with other channels, and so is every ablation between the two.

Shapes: T tokens, D embedding, H heads, d value and q query/key size per head, E = H * d, C channels, F feed-forward width.
"""

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig
from fuxi_torchrec.encoders import streaming
from fuxi_torchrec.encoders.base import reset_linear_bias
from fuxi_torchrec.encoders.mixing import MixingBlock, MixingContext, MixingEncoder
from fuxi_torchrec.encoders.streaming import StreamingState
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.pointwise_attention import silu_attention
from fuxi_torchrec.ops.row_wise.dispatch import gated_rms_norm, rms_norm, silu_split, swiglu

CHANNEL_ORDER = ("positional", "temporal", "bucketed_temporal", "semantic")
"""The order of the channels in a block, whatever their order in the config."""


class FuXiBlock(MixingBlock):
    """A token-mixing stage, then a feed-forward stage, each on a residual line.

    Parameters: input_weight = W_in, output_weight/bias = W_0 and b_0 (transposed), ffn_in_weight = W_1 above W_3
    (transposed), ffn_out_weight = W_2 (transposed); without the feed-forward stage (ffn_multiply 0) the last two are absent.
    """

    def __init__(self, config: ModelConfig, channels: Sequence[str], padded_length: int) -> None:
        super().__init__(config, [name for name in channels if name != "semantic"], padded_length)
        D, H, d, q = config.embedding_dim, config.num_heads, config.value_dim, config.qk_dim
        self.num_heads, self.value_dim, self.qk_dim = H, d, q
        self.dropout = config.dropout
        self.padded_length = padded_length
        self.has_semantic = "semantic" in channels
        self.mixed_width = len(channels) * H * d
        width = self.mixed_width + H * d + (2 * H * q if self.has_semantic else 0)
        self.ffn_width = int(D * config.ffn_multiply)
        self.input_weight = nn.Parameter(torch.empty(D, width))
        self.output_weight = nn.Parameter(torch.empty(D, self.mixed_width))
        self.output_bias = nn.Parameter(torch.empty(D))
        if self.ffn_width:
            self.ffn_in_weight = nn.Parameter(torch.empty(2 * self.ffn_width, D))
            self.ffn_out_weight = nn.Parameter(torch.empty(D, self.ffn_width))

    def forward(self, x_TD: Tensor, context: MixingContext) -> Tensor:
        """Computes the block, equations (1) to (6), on the rows of all users."""
        u, v_TE, queries_keys = self.project(x_TD)
        y = self.mix(v_TE, queries_keys, context)
        return self.residual_stages(x_TD, u, y)

    def project(self, x_TD: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Projects to gates u [T, C * H * d], values v [T, H * d] and queries beside keys [T, 2 * H * q] (1)."""
        values = self.num_heads * self.value_dim
        z_TW = rms_norm(x_TD) @ self.input_weight
        u, v_TE, queries_keys = silu_split(z_TW, (self.mixed_width, values, z_TW.shape[1] - self.mixed_width - values))
        return u, v_TE, queries_keys

    @torch.compiler.disable
    def mix(self, v_TE: Tensor, queries_keys: Tensor, context: MixingContext) -> Tensor:
        """Mixes each user's values by every channel's causal map (2): [T, C * H * d], per head the channels side by side."""
        v_THd = v_TE.unflatten(1, (self.num_heads, self.value_dim))
        parts = []
        if self.mixers:
            parts.append(self.mix_channels(v_THd, context))
        if self.has_semantic:
            q_THq, k_THq = queries_keys.unflatten(1, (2, self.num_heads, self.qk_dim)).unbind(1)
            y_THd = silu_attention(q_THq, k_THq, v_THd, context.layout, scale=1 / self.padded_length)
            parts.append(y_THd.unsqueeze(2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).flatten(1)

    def residual_stages(self, x_TD: Tensor, u: Tensor, y: Tensor) -> Tensor:
        """Adds both stages to the block's input; u gates, y mixed values, [T, C * H * d] each."""
        h_TD = x_TD + self.gated_output(u, y)
        return h_TD + self.feed_forward(h_TD) if self.ffn_width else h_TD

    def gated_output(self, u: Tensor, y: Tensor) -> Tensor:
        """Gates what was mixed and projects it back to [T, D] (3), (4)."""
        return F.linear(gated_rms_norm(u, y, self.dropout, self.training), self.output_weight, self.output_bias)

    def feed_forward(self, h_TD: Tensor) -> Tensor:
        """Applies the SwiGLU network to every row (5), (6)."""
        g_TD = rms_norm(h_TD, self.dropout, self.training)
        return F.linear(swiglu(F.linear(g_TD, self.ffn_in_weight)), self.ffn_out_weight)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        nn.init.normal_(self.input_weight, std=0.02)
        nn.init.xavier_uniform_(self.output_weight)
        reset_linear_bias(self.output_bias, self.mixed_width)
        if self.ffn_width:
            for half in self.ffn_in_weight.data.chunk(2):
                nn.init.xavier_uniform_(half)
            nn.init.xavier_uniform_(self.ffn_out_weight)
        self.reset_mixers()


class FuXiEncoder(MixingEncoder):
    """A stack of FuXi blocks."""

    def __init__(
        self, config: ModelConfig, channels: Sequence[str], padded_length: int, time_unit: float = 1.0
    ) -> None:
        self.channels = tuple(name for name in CHANNEL_ORDER if name in channels)
        blocks = [FuXiBlock(config, self.channels, padded_length) for _ in range(config.num_blocks)]
        super().__init__(config, blocks, padded_length, time_unit)

    def fuxi_blocks(self) -> List[FuXiBlock]:
        """Returns the blocks, as what they are."""
        return [block for block in self.blocks if isinstance(block, FuXiBlock)]

    @property
    def value_width(self) -> int:
        """Width of a block's values, H * d."""
        first = self.fuxi_blocks()[0]
        return first.num_heads * first.value_dim

    def block_values(
        self, embeddings_TD: Tensor, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout
    ) -> Tensor:
        """Computes v of every block, [T, L, H * d]; arguments as of `forward`."""
        self.check_fits(layout)
        x_TD = self.input_step(embeddings_TD, layout.position_T)
        context, values = self.batch_context(timestamps_T, next_timestamps_T, layout), []
        for block in self.fuxi_blocks():
            u, v_TE, queries_keys = block.project(x_TD)
            x_TD = block.residual_stages(x_TD, u, block.mix(v_TE, queries_keys, context))
            values.append(v_TE)
        return torch.stack(values, 1)

    def init_state(self, batch: int) -> StreamingState:
        """Makes the state of `batch` users without events, for `observe` and `query`. docs/streaming.md has an
        example.

        Raises:
            UserError: the encoder is in training mode, or has channels without a state of fixed size (the semantic and
                the bucketed ones; of the functions of time only pow, exp and zero have one).
        """
        return streaming.empty_state(self, batch)

    def state_of(self, embeddings_TD: Tensor, timestamps_T: Tensor, layout: JaggedLayout) -> StreamingState:
        """Computes the state after whole histories, in one full pass: as if `observe` had taken their events one by
        one. Each history has at most padded_length events (UserError otherwise); a user may have none."""
        return streaming.state_of(self, embeddings_TD, timestamps_T, layout)

    def observe(self, state: StreamingState, item_embedding: Tensor, timestamp: Tensor) -> StreamingState:
        """Takes one event of every user of the state, in place, and returns the state.

        The pending event becomes final, since its next time is known now; the new one becomes pending.

        Args:
            item_embedding: float [B, D], as `forward` takes them.
            timestamp: int64 [B] ticks (or one for all), not before the user's newest event.

        Raises:
            StateFull: users with padded_length events; nothing has changed.
            ValueError: wrong shapes or types, or a time before the newest event's.
        """
        streaming.observe(self, state, item_embedding, timestamp)
        return state

    def query(self, state: StreamingState, at: Tensor) -> Tensor:
        """Computes the raw output [B, D] for a request at time `at`, int64 [B] ticks (or one for all); changes
        nothing. It equals `forward` on the events so far, with `at` as the last row's next time."""
        return streaming.query(self, state, at)


def build_fuxi_beta(config: ModelConfig, padded_length: int, time_unit: float) -> FuXiEncoder:
    """Builds FuXi-β with config.bias_function as f; config.channels makes the paper's ablations of it."""
    channels = CHANNEL_PRESETS["fuxi_beta"] if config.channels is None else config.channels
    return FuXiEncoder(config, channels, padded_length, time_unit)
