"""Training: resume goes on exactly, the best model is kept, a diverged loss and a signal stop it cleanly."""

import importlib
import os
import signal

import pytest
import torch

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.evaluate import evaluate
from fuxi_torchrec.evaluation.load_model import open_model
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.training.schedule import learning_rate
from fuxi_torchrec.training.trainer import Interrupted
from tests.helpers.training_runs import losses, stop_after, tiny, train

pytestmark = pytest.mark.thorough


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
    """Fifty steps and more after it, from within the first, the second and the third epoch."""
    config = tiny(small_dataset, max_epochs=8)
    whole = train(config, tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) >= stop + 50
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


def test_ranking_some_batches_at_a_time_changes_nothing(small_dataset, tmp_path, monkeypatch):
    results = train(tiny(small_dataset, max_epochs=1), tmp_path / "run")
    run = RunFolder.open(str(tmp_path / "run"))
    module = importlib.import_module("fuxi_torchrec.evaluation.evaluate")  # the package hands on its function by that name
    monkeypatch.setattr(module, "BATCHES_A_RANKING", 1)
    with open_model(run, run.config(["--evaluation.batch_size", "7"]), "best") as saved:
        again = evaluate(saved.model, saved.dataset, saved.config, "test", saved.world)
    assert again == pytest.approx(results["test"], rel=1e-5)


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


def test_a_signal_in_an_evaluation_puts_it_off(small_dataset, tmp_path):
    def stop_in_evaluation(trainer):
        evaluate = trainer._evaluate

        def stopped(split, **extra):
            if trainer.state.cursor.step >= 20:
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
