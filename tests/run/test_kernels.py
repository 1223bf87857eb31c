"""A run's CPU kernels: measured once, kept with the run, and taken by whatever goes on with it or uses its model."""

import json

import pytest
import torch

from fuxi_torchrec.config import Config
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.load_model import open_model
from fuxi_torchrec.ops import kernel_choice
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.run import kernels
from fuxi_torchrec.run.folder import RunFolder
from tests.helpers.training_runs import losses, tiny, train

ALL = list(native.FAMILIES)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """No variable fixes the kernels; a measurement finds what `measured` says, and is counted."""
    if native.library() is None:
        pytest.skip("no C compiler here")
    monkeypatch.delenv(native.SWITCH, raising=False)
    found = {"row_wise": 2.0, "token_mixing": 0.95, "sampled_softmax": 0.8}
    calls = []
    monkeypatch.setattr(kernels, "time_families", lambda sizes: calls.append(sizes) or dict(found))
    yield calls
    native.leave_to_pytorch(())


def record(folder):
    return json.loads((folder / "kernels.json").read_text())


@pytest.fixture
def trained(small_dataset, tmp_path):
    config = tiny(small_dataset, max_epochs=1)
    train(config, tmp_path / "run")
    return config, tmp_path / "run"


def test_kernels_that_lose_by_over_a_tenth_are_left_and_the_choice_is_kept_with_run_and_checkpoint(trained, measured, capfd):
    config, run = trained
    assert len(measured) == 1 and native.left_to_pytorch() == {"sampled_softmax"}
    kept = record(run)
    assert kept["left_to_pytorch"] == ["sampled_softmax"] and kept["processor"] == native.processor()
    assert kept["pytorch_seconds_over_kernels"]["row_wise"] == 2.0 and kept["chosen_by"] == "measurement"
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert record(checkpoint) == kept
    train(config, run.parent / "other")
    assert "norms and gates 2.0 ×, token mixing 0.9 ×, loss 0.8 ×; left to PyTorch: loss" in capfd.readouterr().err


def test_every_family_has_a_name_for_users():
    assert kernels.NAMES.keys() == set(native.FAMILIES)


def test_a_resumed_run_keeps_its_choice_whatever_would_be_measured_now(small_dataset, trained, measured, monkeypatch, capfd):
    _, run = trained
    before = record(run)
    monkeypatch.setattr(kernels, "time_families", lambda sizes: {"row_wise": 0.1})
    train(tiny(small_dataset, max_epochs=2), run, resume=True)
    assert record(run) == before and native.left_to_pytorch() == {"sampled_softmax"}
    assert "CPU kernels" not in capfd.readouterr().err
    uninterrupted = run.parent / "uninterrupted"
    monkeypatch.setattr(kernels, "time_families", lambda sizes: before["pytorch_seconds_over_kernels"])
    train(tiny(small_dataset, max_epochs=2), uninterrupted)
    assert losses(run) == losses(uninterrupted)


def test_evaluation_computes_with_the_kernels_of_the_run(trained):
    config, run = trained
    native.leave_to_pytorch(())
    with open_model(RunFolder.open(str(run)), config, "last"):
        assert native.left_to_pytorch() == {"sampled_softmax"}


def test_another_processor_is_said_in_one_line(trained, capfd):
    config, run = trained
    kept = record(run)
    (run / "kernels.json").write_text(json.dumps({**kept, "processor": "Abacus 3000"}))
    capfd.readouterr()
    with open_model(RunFolder.open(str(run)), config, "last"):
        assert native.left_to_pytorch() == {"sampled_softmax"}
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "CPU kernels" in line]
    assert "Abacus 3000" in line and "not bit for bit" in line


def test_the_environment_goes_before_the_record_and_the_change_is_said(small_dataset, trained, measured, monkeypatch, capfd):
    _, run = trained
    capfd.readouterr()
    monkeypatch.setenv(native.SWITCH, "1")
    train(tiny(small_dataset, max_epochs=2), run, resume=True)
    assert native.left_to_pytorch() == set() and record(run)["chosen_by"] == "FUXI_TORCHREC_NATIVE=1"
    assert "not bit for bit" in capfd.readouterr().err and len(measured) == 1


def test_a_job_that_is_told_to_resume_from_its_first_start_on_measures_once(small_dataset, tmp_path, measured):
    config = tiny(small_dataset, max_epochs=1)
    train(config, tmp_path / "run", resume=True)
    assert len(measured) == 1 and record(tmp_path / "run")["chosen_by"] == "measurement"
    train(tiny(small_dataset, max_epochs=2), tmp_path / "run", resume=True)
    assert len(measured) == 1


def test_a_run_of_before_the_choice_goes_on_with_all_kernels(small_dataset, trained):
    _, run = trained
    (run / "kernels.json").unlink()
    train(tiny(small_dataset, max_epochs=2), run, resume=True)
    assert record(run)["left_to_pytorch"] == []


def test_a_record_that_cannot_be_read_is_named(trained):
    config, run = trained
    for text in ("", "{}", '{"left_to_pytorch": 3, "processor": "x"}', "[]"):
        (run / "kernels.json").write_text(text)
        with pytest.raises(UserError, match="kernels.json: cannot be read"):
            RunFolder.open(str(run)).kernels()


def test_a_measurement_is_of_both_at_the_runs_sizes_and_is_kept(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = kernels.step_sizes(tiny(small_dataset), SequenceDataset(small_dataset).identity)
    assert (sizes.width, sizes.negatives, sizes.longest) == (8, 10, 20) and sizes.channels == ("positional", "pow")
    state = torch.get_rng_state()
    found = kernel_choice.time_families(sizes)
    assert found.keys() == {"row_wise", "token_mixing", "sampled_softmax"} and all(ratio > 0 for ratio in found.values())
    assert torch.equal(state, torch.get_rng_state()) and native.left_to_pytorch() == set()
    (kept,) = (tmp_path / "fuxi_torchrec").glob("*.json")
    kept.write_text(json.dumps({"row_wise": 7.5}))
    assert kernel_choice.time_families(sizes) == {"row_wise": 7.5}
    kept.write_text("nonsense")
    assert kernel_choice.time_families(sizes).keys() == found.keys()


def test_long_users_are_measured_in_linear_time_too_and_encoders_without_mixing_not_at_all(small_dataset, monkeypatch):
    identity = SequenceDataset(small_dataset).identity
    config = Config()
    config.model.encoder = "sasrec"
    assert kernels.step_sizes(config, identity).channels == ()
    long = kernel_choice.StepSizes(4000, 3000, 8, 8, 1, 8, ("positional", "pow"), 0.1, 0, 50)
    assert kernel_choice._steps(long).keys() == {"row_wise", "token_mixing", "linear_mixing"}
    unknown = kernel_choice.StepSizes(400, 30, 8, 8, 1, 8, ("positional", "sin"), 0.1, 0, 50)
    assert kernel_choice._steps(unknown).keys() == {"row_wise"}
