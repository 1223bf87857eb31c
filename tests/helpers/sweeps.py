"""Sweeps small enough for tests."""

import yaml

from tests.helpers.command_line import SMOKE

# Small enough that a start costs more than the training.
SMALL = {
    "data.max_sequence_length": 20,
    "data.batch_size": 16,
    "loss.num_negatives": 10,
    "model.embedding_dim": 8,
    "model.value_dim": 8,
    "evaluation.every_epochs": None,
    "trainer.device": "cpu",
    "trainer.max_epochs": 1,
    "trainer.log_every_steps": 1,
}


def write_sweep(folder, **values):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"config": SMOKE, "set": SMALL, **values}, sort_keys=False))
    return str(path)
