"""A full disk: /dev/full stands for every file of one, and the system's own error comes of writing to it."""

import builtins

import pytest

from fuxi_torchrec.checkpoint import storage
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import path_manager
from fuxi_torchrec.run import tensorboard
from fuxi_torchrec.run.folder import RunFolder
from tests.helpers.training_runs import tiny, train

pytestmark = pytest.mark.thorough


def full(path, mode="rb", *more, **options):
    return builtins.open("/dev/full" if "r" not in mode else path, "wb" if "r" not in mode else mode)


def test_curves_that_cannot_be_written_are_told_once_and_training_goes_on(small_dataset, tmp_path, monkeypatch, capfd):
    config = tiny(small_dataset, max_epochs=1)
    expected = train(config, tmp_path / "whole")
    monkeypatch.setattr(tensorboard, "open", full, raising=False)
    capfd.readouterr()
    assert train(config, tmp_path / "run") == expected
    said = capfd.readouterr().err
    assert said.count("no curves from here on (No space left on device)") == 1 and "Traceback" not in said


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_that_finds_no_room_says_so_and_names_its_folder(
    small_dataset, tmp_path, monkeypatch, capfd, in_background
):
    class FullFolder:
        def __getattr__(self, name):
            return getattr(path_manager(), name)

        def open(self, path, mode):
            return full(path, mode) if path.endswith(".distcp") else path_manager().open(path, mode)

    monkeypatch.setattr(storage, "path_manager", FullFolder)
    with pytest.raises(UserError) as raised:
        train(tiny(small_dataset, max_epochs=1, async_checkpoint=in_background), tmp_path / "run")
    assert f"{tmp_path}/run/checkpoints/step-0000000" in str(raised.value)
    assert "checkpoint not saved (No space left on device)" in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err


def test_metrics_that_find_no_room_name_their_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        RunFolder(str(tmp_path)).append({"step": 1})
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
