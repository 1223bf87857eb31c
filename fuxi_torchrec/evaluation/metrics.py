"""Ranking metrics of docs/training.md, as sums over users that add up over batches and ranks."""

from typing import Dict

import torch
from torch import Tensor

from fuxi_torchrec.config import METRIC_CUTOFFS


def metric_sums(rank_Q: Tensor, log_prob_Q: Tensor) -> Dict[str, Tensor]:
    """Sums the metrics over queries, float64 scalars: users, HR@K = [rank ≤ K], NDCG@K = [rank ≤ K] / log2(rank + 1),
    MRR = 1 / rank, cross_entropy = −log p(target). Ranks are 1-based, ties counted half."""
    gain_Q = 1 / torch.log2(rank_Q + 1)
    sums = {"users": torch.tensor(float(len(rank_Q)), dtype=torch.float64, device=rank_Q.device)}
    for k in METRIC_CUTOFFS:
        hit_Q = rank_Q <= k
        sums[f"hr@{k}"] = hit_Q.double().sum()
        sums[f"ndcg@{k}"] = (gain_Q * hit_Q).sum()
    sums["mrr"] = (1 / rank_Q).sum()
    sums["cross_entropy"] = -log_prob_Q.sum()
    return sums


def is_better(metric: str, value: float, than: float) -> bool:
    """Compares two values of a metric: cross-entropy is better when lower, every other one when higher."""
    return value < than if metric.startswith("cross_entropy") else value > than
