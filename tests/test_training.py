"""Training: resume goes on exactly, the best model is kept, a diverged loss and a signal stop it cleanly."""

import errno
import json
import os
import signal

import pytest
import torch
from iopath.common.file_io import PathHandler

from fuxi_torchrec import checkpoint_storage
from fuxi_torchrec.config import Config, check
from fuxi_torchrec.config_io import load_config
from fuxi_torchrec.dataset import SequenceDataset
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation import evaluate
from fuxi_torchrec.paths import path_manager
from fuxi_torchrec.run_folder import RunFolder
from fuxi_torchrec.saved import open_model
from fuxi_torchrec.sharding import start_world
from fuxi_torchrec.training import Interrupted, Trainer, learning_rate


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
        trainer = Trainer(config, dataset, run, world, resume)
        if before:
            before(trainer)
        return trainer.fit()


def losses(output):
    return [(line["step"], line["loss"]) for line in RunFolder(str(output)).metrics() if "loss" in line]


def stop_after(steps):
    """Sends this process a SIGTERM once `steps` steps are done."""

    def arrange(trainer):
        step = trainer._step

        def counted(batch, stop):
            done = step(batch, stop)
            if trainer.position.step == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

        trainer._step = counted

    return arrange


@pytest.mark.parametrize("encoder", ["fuxi_beta", "fuxi_alpha", "hstu", "sasrec"])
def test_every_encoder_trains_from_a_config_and_repeats_exactly(small_dataset, tmp_path, encoder):
    config = tiny(small_dataset, max_epochs=1)
    config.model.encoder = encoder
    first = train(config, tmp_path / "a")
    second = train(config, tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert first == second


def test_bf16_follows_float32(small_dataset, tmp_path):
    """Autocast changes the tower's products only: the losses stay within a percent."""
    train(tiny(small_dataset, max_epochs=1), tmp_path / "fp32")
    train(tiny(small_dataset, max_epochs=1, precision="bf16"), tmp_path / "bf16")
    for (_, full), (_, half) in zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16")):
        assert half == pytest.approx(full, rel=0.01) and half != full


def test_a_shared_pool_trains(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=4)
    config.loss.negatives, config.loss.num_negatives = "shared", 40
    train(config, tmp_path / "run")
    curve = [loss for _, loss in losses(tmp_path / "run")]
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("stop", [4, 11, 20])
def test_a_stopped_run_resumes_with_the_same_losses_to_the_bit(small_dataset, tmp_path, stop):
    config = tiny(small_dataset)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        train(config, tmp_path / "cut", before=stop_after(stop))
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = train(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed == whole


def test_evaluation_of_the_saved_model_gives_the_numbers_of_training(small_dataset, tmp_path):
    config = tiny(small_dataset)
    config.data.split = "leave_two_out"
    results = train(config, tmp_path / "run")
    run = RunFolder.open(str(tmp_path / "run"))
    lines = [line for line in run.metrics() if line.get("checkpoint") == "best"]
    assert {line["split"] for line in lines} == {"validation", "test"}
    for line in lines:
        with open_model(run, run.config(), "best") as saved:
            again = evaluate(saved.model, saved.dataset, saved.config, line["split"], saved.world)
        assert again == results[line["split"]] == {name: line[name] for name in again}
    watched = [line["ndcg@10"] for line in run.metrics() if line.get("split") == "validation"]
    assert results["validation"]["ndcg@10"] == max(watched)  # the best, not the last


def test_early_stopping_waits_for_its_patience(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=50, patience=2)
    config.optimizer.learning_rate = 1e-12  # nothing gets better after the first evaluation
    train(config, tmp_path / "run")
    epochs = [line["epoch"] for line in RunFolder(str(tmp_path / "run")).metrics() if "split" in line]
    assert max(epochs) == 3


def test_a_diverged_loss_stops_before_the_update_and_names_step_and_users(small_dataset, tmp_path):
    def poison(trainer):
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))

    with pytest.raises(UserError, match=r"step 1: the loss is not finite.*users of its batch: \d+"):
        train(tiny(small_dataset), tmp_path / "run", before=poison)


def test_a_checkpoint_of_another_model_is_refused_by_the_key_that_differs(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1)
    train(config, tmp_path / "run")
    config.model.num_blocks = 3
    with pytest.raises(UserError, match="checkpoint of another model; model.num_blocks is 2 there and 3 here"):
        train(config, tmp_path / "run", resume=True)


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
    "half a marker": (lambda folder: (folder / "complete.json").write_text('{"step": 1'), "complete.json cannot be read"),
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

    monkeypatch.setattr(checkpoint_storage, "write_text", full)
    with pytest.raises(UserError, match="step-00000002: checkpoint not saved .*No space left"):
        train(config, tmp_path / "full")


class Bucket(PathHandler):
    """bucket://name: a folder that cannot rename, as in an object store."""

    def __init__(self, root):
        self.root = root

    def _get_supported_prefixes(self):
        return ["bucket://"]

    def _local(self, path):
        return os.path.join(self.root, path[len("bucket://") :])

    def _open(self, path, mode="r", buffering=-1, **more):
        return open(self._local(path), mode)

    def _exists(self, path, **more):
        return os.path.exists(self._local(path))

    def _isdir(self, path, **more):
        return os.path.isdir(self._local(path))

    def _ls(self, path, **more):
        return os.listdir(self._local(path))

    def _mkdirs(self, path, **more):
        os.makedirs(self._local(path), exist_ok=True)

    def _rm(self, path, **more):
        os.remove(self._local(path))


def test_checkpoints_can_live_in_a_bucket(small_dataset, tmp_path):
    (tmp_path / "bucket").mkdir()
    path_manager().register_handler(Bucket(str(tmp_path / "bucket")), allow_override=True)
    config = tiny(small_dataset, checkpoint_every_steps=2)
    whole = train(config, tmp_path / "whole")
    config.trainer.checkpoint_folder = "bucket://run"
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", before=stop_after(13))
    assert (tmp_path / "bucket" / "run" / "step-00000014" / "complete.json").exists()
    assert train(config, tmp_path / "run", resume=True) == whole
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_data_set_is_refused(small_dataset, tmp_path):
    from data_pipelines.events import prepare_events

    train(tiny(small_dataset, max_epochs=1), tmp_path / "run")
    log = tmp_path / "log.csv"
    log.write_text("user,item,time\n1,2,3\n1,3,4\n1,4,5\n")
    prepare_events([str(log)], "user", "item", "time", str(tmp_path / "other"))
    config = tiny(str(tmp_path / "other"))
    run = RunFolder.open(str(tmp_path / "run"))
    with pytest.raises(UserError, match="another model; num_items"):
        train(config, tmp_path / "run", resume=True)
    assert run.config().data.path == small_dataset
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
    assert all((folder / name / "complete.json").exists() and (folder / name / "config.yaml").exists() for name in steps)


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


def test_a_signal_in_an_evaluation_puts_it_off(small_dataset, tmp_path):
    def stop_in_evaluation(trainer):
        evaluate = trainer._evaluate

        def stopped(split, **extra):
            if trainer.position.step >= 20:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(split, **extra)

        trainer._evaluate = stopped

    config = tiny(small_dataset)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", before=stop_in_evaluation)
    assert train(config, tmp_path / "run", resume=True) == whole
    lines = [[line.get("step") for line in RunFolder(str(tmp_path / name)).metrics()] for name in ("whole", "run")]
    assert lines[0] == lines[1]


def test_learning_rate_warms_up_and_follows_the_cosine():
    config = Config().optimizer
    config.learning_rate, config.warmup_steps, config.schedule, config.min_learning_rate = 1.0, 4, "cosine", 0.2
    assert [learning_rate(config, step, 0) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert learning_rate(config, 5, 0.5) == pytest.approx(0.6)
    assert learning_rate(config, 5, 1.0) == pytest.approx(0.2)


def test_a_run_folder_holds_what_it_promises(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1)
    train(config, tmp_path / "run")
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config
    assert (tmp_path / "run" / "dataset.json").exists()
    assert any(name.name.startswith("events.out") for name in (tmp_path / "run" / "tensorboard").iterdir())
    lines = RunFolder(str(tmp_path / "run")).metrics()
    assert {"step", "epoch", "loss", "tokens_per_second", "learning_rate"} <= set(lines[0])
    assert {"split", "ndcg@10", "hr@1000", "mrr", "cross_entropy"} <= set(lines[-1])
    with pytest.raises(UserError, match="a run is already here"):
        train(config, tmp_path / "run")
