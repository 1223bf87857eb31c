"""How many floating-point operations the model's definition asks for, from the lengths of the users; and its parameters.

Counted are matrix products, 2 m n k each, and of token mixing and attention only what causality leaves: n (n + 1) / 2 pairs
of positions for a user of n events. So it is the model that is counted, not an implementation of it: what `linear` mixing
saves, recomputation (activation checkpointing) adds, and norms, gates and maps cost, is not in it. That is the numerator
of MFU (PaLM, arXiv 2204.02311, appendix B).

No torch here but in `non_embedding_parameters`.
"""

from dataclasses import dataclass
from typing import Callable, Dict, Iterable

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig

FORWARD_AND_BACKWARD = 3
"""A product's backward is two products of its size: one for either factor's gradient, and every factor has one."""
_NN_MAP = 2 * (5 * 5 + 5 * 1)  # bias_function nn: two linear layers for each pair


@dataclass(frozen=True)
class BlockCost:
    """Forward FLOPs of one block: for each token, and for each pair j <= i of a user's positions."""

    per_token: int
    per_pair: int


def _fuxi(config: ModelConfig) -> BlockCost:
    D, H, d, q = config.embedding_dim, config.num_heads, config.value_dim, config.qk_dim
    hidden = int(D * config.ffn_multiply)
    channels = CHANNEL_PRESETS[config.encoder] if config.channels is None else config.channels
    is_semantic = "semantic" in channels
    mixed = len(channels) * H * d
    width_in = mixed + H * d + (2 * H * q if is_semantic else 0)
    maps = len(channels) - ("temporal" in channels and config.bias_function == "zero")
    per_pair = 2 * maps * H * d + (2 * H * q if is_semantic else 0)
    if "temporal" in channels and config.bias_function == "nn":
        per_pair += _NN_MAP
    return BlockCost(2 * D * width_in + 2 * mixed * D + 6 * D * hidden, per_pair)


def _hstu(config: ModelConfig) -> BlockCost:
    D, H, d, q = config.embedding_dim, config.num_heads, config.value_dim, config.qk_dim
    return BlockCost(2 * D * (2 * H * d + 2 * H * q) + 2 * H * d * D, 2 * H * (q + d))


def _sasrec(config: ModelConfig) -> BlockCost:
    D, hidden = config.embedding_dim, int(config.embedding_dim * config.ffn_multiply)
    return BlockCost(8 * D * D + 4 * D * hidden, 4 * D)


def _flash(config: ModelConfig) -> BlockCost:
    D, E, q = config.embedding_dim, config.num_heads * config.value_dim, config.qk_dim
    return BlockCost(2 * D * (2 * E + q) + 2 * E * D, 2 * (q + E))


def _maps(config: ModelConfig) -> int:
    """Forward FLOPs per pair and value column of a positional and a functional channel."""
    return 2 * (1 + (config.bias_function != "zero"))


def _hstu_beta(config: ModelConfig) -> BlockCost:
    D, E = config.embedding_dim, config.num_heads * config.value_dim
    return BlockCost(2 * D * 2 * E + 2 * E * D, _maps(config) * E + _NN_MAP * (config.bias_function == "nn"))


def _sasrec_beta(config: ModelConfig) -> BlockCost:
    D, hidden = config.embedding_dim, int(config.embedding_dim * config.ffn_multiply)
    return BlockCost(4 * D * D + 4 * D * hidden, _maps(config) * D + _NN_MAP * (config.bias_function == "nn"))


BLOCK_COSTS: Dict[str, Callable[[ModelConfig], BlockCost]] = {
    "fuxi_beta": _fuxi,
    "fuxi_alpha": _fuxi,
    "hstu": _hstu,
    "sasrec": _sasrec,
    "flash": _flash,
    "hstu_beta": _hstu_beta,
    "sasrec_beta": _sasrec_beta,
}
"""config.encoder -> the cost of one of its blocks. A new encoder needs its line here."""


def causal_pairs(lengths: Iterable[int]) -> int:
    """Counts the pairs j <= i of positions of one user, over all users."""
    return sum(n * (n + 1) // 2 for n in lengths)


def encoder_flops(config: ModelConfig, lengths: Iterable[int]) -> int:
    """Counts the forward FLOPs of the encoder on users of these lengths; the input step has no product."""
    lengths = list(lengths)
    cost = BLOCK_COSTS[config.encoder](config)
    return config.num_blocks * (cost.per_token * sum(lengths) + cost.per_pair * causal_pairs(lengths))


def loss_flops(tokens: int, candidates: int, width: int) -> int:
    """Counts the forward FLOPs of the sampled softmax: a product with the positive and with every candidate (the K
    negatives of per_token, else all that a token is compared with), masked ones included."""
    return 2 * tokens * (candidates + 1) * width


def training_flops(config: ModelConfig, lengths: Iterable[int], candidates: int) -> int:
    """Counts the FLOPs of a training step on users of these lengths: encoder and loss, forward and backward."""
    lengths = list(lengths)
    forward = encoder_flops(config, lengths) + loss_flops(sum(lengths), candidates, config.embedding_dim)
    return FORWARD_AND_BACKWARD * forward


def non_embedding_parameters(config: ModelConfig, padded_length: int) -> int:
    """Counts the parameters of the encoder's blocks: all but the item table and the position table (as Kaplan et al.,
    arXiv 2001.08361, count). padded_length counts, since a positional channel has a weight for every lag."""
    import torch

    from fuxi_torchrec.encoders import build_encoder

    with torch.device("meta"):
        encoder = build_encoder(config, padded_length=padded_length)
    return sum(parameter.numel() for parameter in encoder.blocks.parameters())
