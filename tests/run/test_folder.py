"""A run folder: what is missing is not taken for never done, and what an epoch has begun with stays."""

import json
import os
import shutil

import pytest

from fuxi_torchrec.distributed.failures import Interrupted
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.run.folder import RunFolder
from tests.helpers.training_runs import losses, stop_after, tiny, train

pytestmark = pytest.mark.thorough


class Killed(Exception):
    pass


def killed_after(steps):
    """Ends training without a save once `steps` steps are done."""

    def arrange(trainer):
        step = trainer.step

        def counted(batch):
            if trainer.state.cursor.step == steps:
                raise Killed
            return step(batch)

        trainer.step = counted

    return arrange


@pytest.fixture(scope="module")
def whole(small_dataset, tmp_path_factory):
    """The folder of a finished run of an epoch, and its results."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(tiny(small_dataset, max_epochs=1), folder)


@pytest.fixture
def trained(small_dataset, tmp_path, whole):
    """A config of two epochs, and the folder of a run that has finished the first."""
    return tiny(small_dataset, max_epochs=2), shutil.copytree(whole[0], tmp_path / "run")


@pytest.mark.parametrize("age", ["this version", "older"])
def test_resume_without_the_checkpoints_that_were_saved_is_refused_and_changes_nothing(trained, age):
    config, run = trained
    metrics = (run / "metrics.jsonl").read_bytes()
    if age == "older":
        (run / "saved.json").unlink()
    (run / "checkpoints").rename(run / "away")
    with pytest.raises(UserError, match="no checkpoint here, but this run has saved one .*; put its checkpoints back"):
        train(config, run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == metrics and RunFolder(str(run)).config().trainer.max_epochs == 1
    (run / "away").rename(run / "checkpoints")
    train(config, run, resume=True)
    assert losses(run)[-1][0] > losses(run)[0][0] and (run / "metrics.jsonl").read_bytes().startswith(metrics[:100])


def test_resume_with_another_folder_of_checkpoints_is_refused(trained, tmp_path):
    config, run = trained
    config.trainer.checkpoint_folder = str(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{tmp_path}/elsewhere: no checkpoint here, but .* .checkpoints/step-"):
        train(config, run, resume=True)
    shutil.copytree(run / "checkpoints", tmp_path / "elsewhere")
    train(config, run, resume=True)
    assert json.loads((run / "saved.json").read_text())["checkpoint"].startswith(f"{tmp_path}/elsewhere/step-")


@pytest.mark.parametrize("age", ["this version", "older"])
def test_a_run_killed_before_its_first_save_begins_again(small_dataset, tmp_path, whole, age):
    config = tiny(small_dataset, max_epochs=1)
    with pytest.raises(Killed):
        train(config, tmp_path / "run", before=killed_after(3))
    if age == "older":
        (tmp_path / "run" / "saved.json").unlink()
    assert train(config, tmp_path / "run", resume=True) == whole[1]
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_run_killed_between_its_first_evaluation_and_its_save_begins_again(small_dataset, tmp_path, whole):
    config = tiny(small_dataset, max_epochs=1)

    def unsaved(trainer):
        trainer.save = lambda *arguments, **more: (_ for _ in ()).throw(Killed)

    with pytest.raises(Killed):
        train(config, tmp_path / "run", before=unsaved)
    assert any("split" in line for line in RunFolder(str(tmp_path / "run")).metrics())
    assert train(config, tmp_path / "run", resume=True) == whole[1]


def test_a_damaged_line_of_metrics_stops_nothing(trained):
    config, run = trained
    with open(run / "metrics.jsonl", "r+b") as file:
        file.write(b"\xff")
    train(config, run, resume=True)
    assert [step for step, _ in losses(run)][:2] == [2, 3]


def test_a_relative_folder_of_checkpoints_of_an_older_run_is_found_from_everywhere(trained, tmp_path, monkeypatch):
    """It was relative to the folder that 'train' was typed in, from where the run lies in, say, runs/NAME."""
    _, run = trained
    (tmp_path / "runs").mkdir()
    run = run.rename(tmp_path / "runs" / "a")
    (run / "checkpoints").rename(tmp_path / "kept")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("checkpoint_folder: null", "checkpoint_folder: kept"))
    monkeypatch.chdir("/")
    assert RunFolder.open(str(run)).config().trainer.checkpoint_folder == str(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / "gone")
    assert RunFolder.open(str(run)).config().trainer.checkpoint_folder == "/kept"


ORDERS = [("trainer", "seed", 5), ("data", "shuffle_buffer", 40)]


@pytest.fixture(scope="module")
def stopped(small_dataset, tmp_path_factory):
    """The folder of a run that was stopped inside its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        train(tiny(small_dataset), folder, before=stop_after(13))
    return folder


@pytest.mark.parametrize("section, key, value", ORDERS)
def test_an_epoch_goes_on_only_in_the_order_that_it_was_begun_in(small_dataset, stopped, section, key, value):
    config = tiny(small_dataset)
    was = getattr(getattr(config, section), key)
    setattr(getattr(config, section), key, value)
    with pytest.raises(UserError, match=f"{section}.{key} was {was} when epoch 2 was begun, not {value}; in the middle"):
        train(config, stopped, resume=True)
    assert getattr(getattr(RunFolder(str(stopped)).config(), section), key) == was


def test_between_epochs_the_order_may_change(trained):
    config, run = trained
    for section, key, value in ORDERS:
        setattr(getattr(config, section), key, value)
    train(config, run, resume=True)
    assert RunFolder(str(run)).config().trainer.max_epochs == 2


def test_a_config_keeps_absolute_paths(small_dataset, tmp_path, monkeypatch):
    from fuxi_torchrec.config.parsing import make_paths_absolute

    monkeypatch.chdir(os.path.dirname(small_dataset))
    config = tiny(os.path.basename(small_dataset), checkpoint_folder="kept")
    make_paths_absolute(config)
    assert config.data.path == small_dataset
    assert config.trainer.checkpoint_folder == os.path.join(os.path.dirname(small_dataset), "kept")
    config.trainer.checkpoint_folder = "s3://bucket/kept"
    make_paths_absolute(config)
    assert config.trainer.checkpoint_folder == "s3://bucket/kept"
