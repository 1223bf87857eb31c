"""Checkpoints: complete or absent, damaged ones passed over, kept and refused as promised in docs/checkpoints.md."""

import errno
import json
import os
import zlib

import pytest

from fuxi_torchrec.checkpoint import storage
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.distributed.failures import Interrupted
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.load_model import open_model
from fuxi_torchrec.run.folder import RunFolder
from tests.helpers.training_runs import losses, stop_after, tiny, train

pytestmark = pytest.mark.thorough


def test_a_checkpoint_of_another_model_is_refused_by_the_key_that_differs(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1)
    train(config, tmp_path / "run")
    config.model.num_blocks = 3
    with pytest.raises(UserError, match="checkpoint of another model; model.num_blocks is 2 there and 3 here"):
        train(config, tmp_path / "run", resume=True)


def test_how_tokens_are_mixed_is_no_part_of_a_model(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1)
    train(config, tmp_path / "run")
    config.model.token_mixing, config.model.mixing_tolerance = "reference", 1e-5
    with open_model(RunFolder.open(str(tmp_path / "run")), config, "best") as saved:
        assert saved.model.module.tower.encoder.blocks[0].token_mixing == "reference"


def test_a_damaged_checkpoint_is_an_error_that_names_it(small_dataset, tmp_path):
    train(tiny(small_dataset, max_epochs=1), tmp_path / "run")
    run = RunFolder.open(str(tmp_path / "run"))
    name = json.load(open(os.path.join(run.checkpoints, "index.json")))["best"]
    shard = next(f for f in os.listdir(os.path.join(run.checkpoints, name)) if f.endswith(".distcp"))
    with open(os.path.join(run.checkpoints, name, shard), "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=f"{name}: damaged checkpoint"):
        with open_model(run, run.config(), "best"):
            pass


def truncate_shard(folder):
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])


def flip_a_bit(folder):
    shard = next(folder.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


DAMAGES = {
    "truncated": (truncate_shard, "has 1000 of"),
    "another bit": (flip_a_bit, "another checksum"),
    "no shard": (lambda folder: next(folder.glob("*.distcp")).unlink(), "No such file"),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), "No such file"),
    "half a marker": (lambda folder: (folder / "complete.json").write_text('{"step": 1'), "json cannot be read"),
    "killed while saving": (lambda folder: (folder / "complete.json").unlink(), "saving was cut off"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(small_dataset, tmp_path, capfd, how):
    config = tiny(small_dataset, checkpoint_every_steps=2)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", before=stop_after(13))
    damage, says = DAMAGES[how]
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    damage(newest)
    capfd.readouterr()
    assert train(config, tmp_path / "run", resume=True) == whole
    reports = [line for line in capfd.readouterr().err.splitlines() if "the one before is used" in line]
    assert len(reports) == 1 and f"{newest}: " in reports[0] and says in reports[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_without_a_whole_checkpoint_stops_or_starts_anew(small_dataset, tmp_path):
    """Cut off in its first save it starts anew; with nothing but damaged checkpoints it stops."""
    config = tiny(small_dataset, checkpoint_every_steps=2)
    whole = train(config, tmp_path / "whole")
    half = tmp_path / "run" / "checkpoints" / "step-00000002"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"half")
    assert train(config, tmp_path / "run", resume=True) == whole
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        truncate_shard(folder)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(config, tmp_path / "run", resume=True)


def test_saving_in_the_background_changes_nothing_and_its_errors_are_told(small_dataset, tmp_path, monkeypatch):
    config = tiny(small_dataset, checkpoint_every_steps=2)
    whole = train(config, tmp_path / "whole")
    config.trainer.async_checkpoint = True
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", before=stop_after(13))
    assert train(config, tmp_path / "run", resume=True) == whole
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_text", full)
    with pytest.raises(UserError, match="step-00000002: checkpoint not saved .*No space left"):
        train(config, tmp_path / "full")


def test_checkpoints_with_one_checksum_a_file_can_still_be_read(small_dataset, tmp_path):
    train(tiny(small_dataset, max_epochs=1), tmp_path / "run")
    run = RunFolder.open(str(tmp_path / "run"))
    for marker in (tmp_path / "run" / "checkpoints").glob("step-*/complete.json"):
        content = json.loads(marker.read_text())
        for name, file in content["files"].items():
            file["crc32"] = zlib.crc32((marker.parent / name).read_bytes())
        marker.write_text(json.dumps({**content, "format": 2}))
    with open_model(run, run.config(), "best") as saved:
        assert saved.epoch == 1


def test_checkpoints_can_live_in_a_bucket(small_dataset, tmp_path, bucket):
    config = tiny(small_dataset, checkpoint_every_steps=2)
    whole = train(config, tmp_path / "whole")
    config.trainer.checkpoint_folder = "bucket://run"
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", before=stop_after(13))
    assert (tmp_path / "bucket" / "run" / "step-00000014" / "complete.json").exists()
    assert train(config, tmp_path / "run", resume=True) == whole
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_data_set_or_split_is_refused(small_dataset, tmp_path):
    from data_pipelines.events import prepare_events

    train(tiny(small_dataset, max_epochs=1), tmp_path / "run")
    log = tmp_path / "log.csv"
    log.write_text("user,item,time\n1,2,3\n1,3,4\n1,4,5\n")
    prepare_events([str(log)], "user", "item", "time", str(tmp_path / "other"))
    config = tiny(str(tmp_path / "other"))
    run = RunFolder.open(str(tmp_path / "run"))
    with pytest.raises(UserError, match="trained on another data set"):
        train(config, tmp_path / "run", resume=True)
    config = tiny(small_dataset)
    config.data.split = "leave_two_out"
    with pytest.raises(UserError, match="data.split is leave_one_out in this run, not leave_two_out"):
        train(config, tmp_path / "run", resume=True)
    assert run.config().data.path == small_dataset and run.config().data.split == "leave_one_out"
    with pytest.raises(UserError, match="not the data set"):
        with open_model(run, run.config(["--data.path", str(tmp_path / "other")]), "best"):
            pass


def test_the_newest_and_the_best_are_kept_and_nothing_half_written(small_dataset, tmp_path):
    config = tiny(small_dataset, checkpoint_every_steps=2, keep_checkpoints=3)
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    index = json.loads((folder / "index.json").read_text())
    steps = sorted(path.name for path in folder.iterdir() if path.name != "index.json")
    assert steps[-1] == index["last"] and set(steps[-3:]) | {index["best"]} == set(steps)
    assert all((folder / name / file).exists() for name in steps for file in ("complete.json", "config.yaml"))


def test_only_a_restart_of_its_own_launch_goes_on_in_a_run_unasked(small_dataset, tmp_path, monkeypatch):
    identity, config, path = SequenceDataset(small_dataset).identity, tiny(small_dataset), str(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert not RunFolder.start(path, config, identity, resume=False)[1]
    with pytest.raises(UserError, match="a run is already here"):
        RunFolder.start(path, config, identity, resume=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert RunFolder.start(path, config, identity, resume=False)[1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UserError, match="a run is already here"):
        RunFolder.start(path, config, identity, resume=False)
