"""Tiny trainings in this process."""

import os
import signal

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.distributed.world import start_world
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.training.build import build_trainer


def tiny(folder, **trainer):
    config = Config()
    config.data.path = folder
    config.data.batch_size = 16
    config.data.max_sequence_length = 20
    config.model.embedding_dim = config.model.value_dim = config.model.qk_dim = 8
    config.loss.num_negatives = 10
    config.trainer.log_every_steps = 1
    for key, value in {"max_epochs": 3, "device": "cpu", **trainer}.items():
        setattr(config.trainer, key, value)
    check(config)
    return config


def train(config, output, resume=False, before=None):
    dataset = SequenceDataset(config.data.path)
    with start_world("cpu") as world:
        run = RunFolder.create(str(output), config, dataset.identity, resume)
        trainer = build_trainer(config, dataset, run, world, resume)
        if before:
            before(trainer)
        return trainer.fit()


def killed_before_its_first_save(output, data, max_sequence_length=20):
    """Makes what a training on `data` leaves that is killed in its second step."""
    config = Config()
    config.data.path, config.data.max_sequence_length = str(data), max_sequence_length
    run = RunFolder.create(str(output), config, SequenceDataset(str(data)).identity, resume=False)
    run.append({"step": 1, "epoch": 1, "loss": 99.0})


def losses(output):
    return [(line["step"], line["loss"]) for line in RunFolder(str(output)).metrics() if "loss" in line]


def stop_after(steps):
    """Sends this process a SIGTERM once `steps` steps are done."""

    def arrange(trainer):
        step = trainer.step

        def counted(batch):
            done = step(batch)
            if trainer.state.cursor.step == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

        trainer.step = counted

    return arrange
