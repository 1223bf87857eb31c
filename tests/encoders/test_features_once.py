"""What encoders read of a batch's time gaps is made once, for all blocks and for backward."""

import pytest
import torch

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing import time_gaps

LENGTHS = [30, 3, 0, 30, 17, 1]


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("encoder", ["hstu", "fuxi_alpha", "fuxi_beta", "hstu_beta", "sasrec_beta"])
def test_every_strip_of_a_feature_is_made_once_a_batch_however_many_blocks_read_it(encoder, num_blocks, monkeypatch):
    made, gap_feature = [], time_gaps.gap_feature

    def counted(ticks, *rest):
        made.append(ticks.shape)
        return gap_feature(ticks, *rest)

    monkeypatch.setattr(time_gaps, "gap_feature", counted)
    sizes = dict(embedding_dim=8, num_heads=2, value_dim=4, qk_dim=4, num_blocks=num_blocks)
    tower = build_encoder(ModelConfig(encoder=encoder, token_mixing="blocked", **sizes), padded_length=40).train()
    layout = JaggedLayout.from_lengths(LENGTHS)
    times_T1 = torch.arange(layout.num_tokens + 1) * 1000
    outputs_TD = tower(torch.randn(layout.num_tokens, 8), times_T1[:-1], times_T1[1:], layout)
    outputs_TD.sum().backward()
    assert len(made) == sum(len(groups) for _, groups in layout.slots.strips()) > 0
