"""Exact ranking against the whole catalogue: evaluation, its popularity row, recommendations."""

from fuxi_torchrec.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
