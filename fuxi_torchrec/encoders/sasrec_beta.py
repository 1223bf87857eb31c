"""SASRec-β: FuXi-β's framework on SASRec's block. Softmax attention becomes the β token mixer (A_pos + A_time) v, so the
encoder knows what time it is and has neither queries nor keys.

Source: FuXi-β (arXiv 2508.10615), the compatibility experiment; SASRec (arXiv 1808.09781); docs/models.md.

Shapes: T tokens, D embedding, H heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig
from fuxi_torchrec.encoders.mixing import MixingBlock, MixingContext, MixingEncoder
from fuxi_torchrec.encoders.sasrec import EPS, FeedForward, reset_sasrec_positions
from fuxi_torchrec.ops.row_wise.dispatch import layer_norm


class SASRecBetaBlock(MixingBlock):
    """One SASRec-β layer: β token mixing and the feed-forward layer."""

    def __init__(self, config: ModelConfig, padded_length: int) -> None:
        super().__init__(config, CHANNEL_PRESETS["fuxi_beta"], padded_length)
        D = config.embedding_dim
        self.num_heads = config.num_heads
        self.value_weight = nn.Parameter(torch.empty(D, D))
        self.value_bias = nn.Parameter(torch.empty(D))
        self.output_weight = nn.Parameter(torch.empty(D, D))
        self.output_bias = nn.Parameter(torch.empty(D))
        self.ffn = FeedForward(config)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for weight, bias in ((self.value_weight, self.value_bias), (self.output_weight, self.output_bias)):
            nn.init.xavier_normal_(weight)
            nn.init.zeros_(bias)
        self.ffn.reset_parameters()
        self.reset_mixers()

    def forward(self, x_TD: Tensor, context: MixingContext) -> Tensor:
        """Computes the block on the rows of all users, [T, D]."""
        v_TD = F.linear(x_TD, self.value_weight, self.value_bias)
        y_THd = self.mix_channels(v_TD.unflatten(1, (self.num_heads, -1)), context).sum(2)
        mixed_TD = F.linear(y_THd.flatten(1), self.output_weight, self.output_bias)
        return self.ffn(layer_norm(layer_norm(x_TD, EPS) + mixed_TD, EPS))


class SASRecBetaEncoder(MixingEncoder):
    """A stack of SASRec-β blocks, with SASRec's positions."""

    def __init__(self, config: ModelConfig, padded_length: int, time_unit: float = 1.0) -> None:
        blocks = [SASRecBetaBlock(config, padded_length) for _ in range(config.num_blocks)]
        super().__init__(config, blocks, padded_length, time_unit)

    def reset_positions(self) -> None:
        """Draws the position table as SASRec does."""
        reset_sasrec_positions(self.position_embedding_ND)
