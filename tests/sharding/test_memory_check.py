"""What cannot fit a rank's memory is refused by the key that asks for it, before anything of that size is made."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fuxi_torchrec.config import Config, DataConfig, LossConfig, ModelConfig
from fuxi_torchrec.data.format import DatasetIdentity, read_identity
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.profiling.flops import non_embedding_parameters
from fuxi_torchrec.profiling.memory import out_of_memory_as_user_error
from fuxi_torchrec.sharding.memory_check import check_memory
from fuxi_torchrec.sharding.planner import GIB


@pytest.fixture
def identity(small_dataset):
    return read_identity(small_dataset)


def test_parameters_with_gradient_and_moments_must_fit(identity: DatasetIdentity):
    config = Config(loss=LossConfig(negatives="full"))
    parameters = non_embedding_parameters(config.model, 211) + 211 * config.model.embedding_dim
    check_memory(config, identity, 16 * parameters)
    with pytest.raises(UserError, match=f"model: {parameters:,} parameters .*model.num_blocks.*data.max_sequence_length"):
        check_memory(config, identity, 16 * parameters - 1)


@pytest.mark.parametrize(
    "changes",
    [
        dict(model=ModelConfig(embedding_dim=2**16, num_blocks=2)),
        dict(model=ModelConfig(num_heads=1024, value_dim=2**16)),
        dict(data=DataConfig(max_sequence_length=2**31 - 12)),
    ],
)
def test_the_largest_sizes_are_refused_at_once(identity, changes):
    with pytest.raises(UserError, match="^model: "):
        check_memory(Config(**changes), identity, 64 * GIB)


@pytest.mark.parametrize("negatives, key", [("per_token", "num"), ("shared", "num"), ("shared", "uniform"), ("mixed", "num")])
def test_negatives_that_are_drawn_must_fit(identity, negatives, key):
    loss = LossConfig(negatives=negatives, sampling_alpha=0.5)
    check_memory(Config(loss=loss), identity, GIB)
    with pytest.raises(UserError, match=f"^loss.{key}_negatives: "):
        check_memory(Config(loss=replace(loss, **{f"{key}_negatives": 2**40})), identity, 64 * GIB)


def test_an_allocation_that_fails_is_one_line():
    for allocate in (torch.empty, np.empty):
        with pytest.raises(UserError, match="^training: out of memory; lower the batch$"):
            with out_of_memory_as_user_error("training", "lower the batch"):
                allocate(2**57)
