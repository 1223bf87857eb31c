"""What a step's number decides: its learning rate, and what it draws."""

import math

import numpy as np

from fuxi_torchrec.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Computes the learning rate of the step-th step (from 1): linear warm-up, then constant, or cosine in `progress`
    (0 … 1)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def step_seed(seed: int, rank: int, step: int) -> int:
    """Computes torch's seed of a rank's step: dropout is a function of it."""
    return int(np.random.SeedSequence([seed, rank, step, 1]).generate_state(1, np.uint64)[0] >> 1)
