"""The least that a tower must read and write: every product's factors and result once, all else fused into them.

What is element-wise beside (residual lines, norms that read a row again) is not counted, so a share of the copy's bandwidth
that follows from these bytes is a lower bound too.
"""

from typing import Callable, Dict, List, Tuple

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig

Products = List[Tuple[int, int]]
"""(width in, width out) of each product of a block, of every token."""


def _fuxi(m: ModelConfig) -> Tuple[Products, int]:
    D, E, Q, hidden = m.embedding_dim, m.num_heads * m.value_dim, m.num_heads * m.qk_dim, int(m.embedding_dim * m.ffn_multiply)
    channels = CHANNEL_PRESETS[m.encoder] if m.channels is None else m.channels
    mixed, queries_keys = len(channels) * E, 2 * Q * ("semantic" in channels)
    return [(D, mixed + E + queries_keys), (mixed, D), (D, 2 * hidden), (hidden, D)], E + queries_keys + mixed


def _hstu(m: ModelConfig) -> Tuple[Products, int]:
    D, E, Q = m.embedding_dim, m.num_heads * m.value_dim, m.num_heads * m.qk_dim
    return [(D, 2 * E + 2 * Q), (E, D)], 2 * Q + 2 * E


def _sasrec(m: ModelConfig) -> Tuple[Products, int]:
    D, hidden = m.embedding_dim, int(m.embedding_dim * m.ffn_multiply)
    return [(D, D), (D, 2 * D), (D, D), (D, hidden), (hidden, D)], 4 * D


def _flash(m: ModelConfig) -> Tuple[Products, int]:
    D, E = m.embedding_dim, m.num_heads * m.value_dim
    return [(D, 2 * E + m.qk_dim), (E, D)], 2 * m.qk_dim + 2 * E


def _hstu_beta(m: ModelConfig) -> Tuple[Products, int]:
    D, E = m.embedding_dim, m.num_heads * m.value_dim
    return [(D, 2 * E), (E, D)], 2 * E


def _sasrec_beta(m: ModelConfig) -> Tuple[Products, int]:
    D, hidden = m.embedding_dim, int(m.embedding_dim * m.ffn_multiply)
    return [(D, D), (D, D), (D, hidden), (hidden, D)], 2 * D


BLOCKS: Dict[str, Callable[[ModelConfig], Tuple[Products, int]]] = {
    "fuxi_beta": _fuxi,
    "fuxi_alpha": _fuxi,
    "hstu": _hstu,
    "sasrec": _sasrec,
    "flash": _flash,
    "hstu_beta": _hstu_beta,
    "sasrec_beta": _sasrec_beta,
}
"""Encoder -> the products of a block, and the numbers of a token that its mixing reads and writes."""


def tower_bytes(model: ModelConfig, tokens: int, bytes_each: int) -> int:
    """Counts the bytes of a forward and backward: backward makes either factor's gradient from the other one and the
    result's gradient, so it moves twice what forward does."""
    products, mixed = BLOCKS[model.encoder](model)
    numbers = tokens * (sum(a + b for a, b in products) + mixed) + sum(a * b for a, b in products)
    return 3 * bytes_each * model.num_blocks * numbers


def loss_bytes(tokens: int, candidates: int, width: int, index: int) -> int:
    """Counts the bytes of a loss and its gradients in float32: outputs, positives and unique candidates read, their
    gradients written; `index`: drawn numbers a token, int32."""
    return 4 * (2 * (2 * tokens + candidates) * width + tokens * index)
