"""Checkpoints: saved and loaded by all ranks, complete or absent."""

from fuxi_torchrec.checkpoint.manager import Checkpoints

__all__ = ["Checkpoints"]
