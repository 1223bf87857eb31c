"""FLOPs: the formulas against PyTorch's own counter on dense spellings, and against counts by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import ENCODERS, build_encoder, flash, fuxi_beta, hstu
from fuxi_torchrec.ops.jagged import JaggedLayout, from_padded, to_padded
from fuxi_torchrec.ops.pointwise_attention import silu_attention_reference
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference
from fuxi_torchrec.profiling.flops import (
    BLOCK_COSTS,
    FORWARD_AND_BACKWARD,
    causal_pairs,
    encoder_flops,
    loss_flops,
    non_embedding_parameters,
    training_flops,
)

SIZES = dict(embedding_dim=12, num_heads=2, value_dim=5, qk_dim=3, num_blocks=3, ffn_multiply=1.5)
USERS, LENGTH = 4, 9
DENSE = [
    dict(encoder="fuxi_beta"),
    dict(encoder="fuxi_beta", bias_function="nn"),
    dict(encoder="fuxi_beta", channels=["temporal"]),
    dict(encoder="fuxi_beta", channels=["positional", "temporal", "semantic"]),
    dict(encoder="fuxi_alpha"),
    dict(encoder="hstu"),
    dict(encoder="sasrec"),
    dict(encoder="flash"),
    dict(encoder="hstu_beta"),
    dict(encoder="sasrec_beta"),
]


def dense_flash_attention(queries_T1q, keys_T1q, values_T1E, layout, lag_weights_N):
    q_BNq, k_BNq, v_BNE = (to_padded(x[:, 0], layout) for x in (queries_T1q, keys_T1q, values_T1E))
    return from_padded(torch.relu(q_BNq @ k_BNq.mT).square() @ v_BNE, layout)[:, None]


@pytest.mark.parametrize("choice", DENSE, ids=lambda choice: "-".join(map(str, choice.values())))
def test_a_tower_costs_what_pytorch_counts_in_its_dense_form(choice, monkeypatch):
    """Users of one length: the dense form computes n² pairs where n (n + 1) / 2 are needed, and nothing else more."""
    monkeypatch.setattr(fuxi_beta, "silu_attention", silu_attention_reference)
    monkeypatch.setattr(hstu, "silu_attention", silu_attention_reference)
    monkeypatch.setattr(flash, "squared_relu_attention", dense_flash_attention)
    config = ModelConfig(**SIZES, token_mixing="reference", **choice)
    encoder = build_encoder(config, padded_length=LENGTH)
    layout = JaggedLayout.from_lengths([LENGTH] * USERS)
    times_T = torch.arange(USERS * LENGTH)
    embeddings_TD = torch.randn(USERS * LENGTH, config.embedding_dim, requires_grad=True)
    cost = BLOCK_COSTS[config.encoder](config)
    dense = config.num_blocks * (cost.per_token * USERS * LENGTH + cost.per_pair * USERS * LENGTH**2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs_TD = encoder(embeddings_TD, times_T, times_T + 1, layout)
        assert counter.get_total_flops() == dense
        outputs_TD.sum().backward()
    assert counter.get_total_flops() == FORWARD_AND_BACKWARD * dense
    halved = encoder_flops(config, [LENGTH] * USERS)
    assert dense - halved == config.num_blocks * cost.per_pair * USERS * LENGTH * (LENGTH - 1) // 2


def test_the_loss_costs_a_product_with_every_candidate():
    tokens, negatives, width = 7, 5, 12
    outputs_TD, positives_TD = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
    negatives_TKD = torch.randn(tokens, negatives, width, requires_grad=True)
    masked_TK = torch.zeros(tokens, negatives, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        sampled_softmax_reference(outputs_TD, positives_TD, negatives_TKD, masked_TK, 0.05).backward()
    # The product with the positive is spelled without one there.
    with_positive = FORWARD_AND_BACKWARD * 2 * tokens * width
    assert counter.get_total_flops() + with_positive == FORWARD_AND_BACKWARD * loss_flops(tokens, negatives, width)


def test_ml_1m_base_by_hand():
    """D = H d = F = 50, 2 blocks; users of 3 and 0 events have 6 pairs."""
    config = ModelConfig(encoder="fuxi_beta")
    assert causal_pairs([3, 0, 1]) == 7
    a_token = 2 * 50 * 150 + 2 * 100 * 50 + 2 * 50 * 100 + 2 * 50 * 50
    assert encoder_flops(config, [3, 0]) == 2 * (3 * a_token + 6 * 2 * 2 * 50)
    assert training_flops(config, [3, 0], 128) == 3 * (2 * (3 * a_token + 6 * 200) + 2 * 3 * 129 * 50)
    weights = 50 * 150 + 100 * 50 + 50 + 50 * 100 + 50 * 50
    assert non_embedding_parameters(config, padded_length=211) == 2 * (weights + 211 + 2)


def test_a_channel_without_a_map_costs_no_product():
    zero, none = ModelConfig(bias_function="zero"), ModelConfig(channels=["positional"])
    assert BLOCK_COSTS["fuxi_beta"](zero).per_pair == BLOCK_COSTS["fuxi_beta"](none).per_pair == 2 * 50


def test_every_tower_has_its_formula_and_its_presets():
    assert set(BLOCK_COSTS) == set(ENCODERS)
    for name in BLOCK_COSTS:
        config = ModelConfig(encoder=name)
        encoder = build_encoder(config, padded_length=30)
        outside = encoder.position_embedding_ND.numel()
        assert non_embedding_parameters(config, 30) == sum(p.numel() for p in encoder.parameters()) - outside
