"""The training loop and what it is made of."""

from fuxi_torchrec.training.build import build_trainer
from fuxi_torchrec.training.trainer import Trainer

__all__ = ["Trainer", "build_trainer"]
