"""SIGTERM at any moment of a training: it is saved and resumes to the same numbers."""

import os
import signal

import pytest

from fuxi_torchrec.checkpoint import manager
from fuxi_torchrec.distributed.failures import Interrupted
from fuxi_torchrec.training import trainer
from tests.helpers.training_runs import losses, tiny, train

pytestmark = pytest.mark.thorough

MOMENTS = {
    "the first step": (trainer, "step_seed"),
    "an evaluation": (trainer, "evaluate"),
    "a save": (manager.dcp, "save"),
    "a save's marker": (manager.storage, "write_text"),
    "the removal of older checkpoints": (manager.Checkpoints, "_prune"),
    "the last evaluation": (trainer.Trainer, "_final_evaluation"),
}


@pytest.fixture(scope="module")
def whole(small_dataset, tmp_path_factory):
    """(results, losses) of a training that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return train(tiny(small_dataset, max_epochs=2), output), losses(output)


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_ends_a_training_saved_whenever_it_comes(small_dataset, whole, tmp_path, monkeypatch, moment):
    config = tiny(small_dataset, max_epochs=2)
    owner, name = MOMENTS[moment]
    function = getattr(owner, name)

    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(owner, name, signalled)
        train(config, tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert train(config, tmp_path / "run", resume=True) == whole[0] and losses(tmp_path / "run") == whole[1]
