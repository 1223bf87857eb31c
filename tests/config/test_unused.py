"""Keys without effect are named at a run's start, and those that have one are not."""

import dataclasses
from pathlib import Path

import pytest

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.config.unused import RULES, Resolved, unused_keys
from fuxi_torchrec.encoders import ENCODERS, build_encoder
from tests.helpers.command_line import ROOT
from tests.helpers.training_runs import tiny, train

ALONE = Resolved(is_sharded=False, device_type="cpu", processes=1)


def config_with(*settings):
    config = Config()
    for key, value in settings:
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name)
        setattr(getattr(config, section), name, value)
    return config


def unused(*settings, run=ALONE):
    return [text.split(" ")[0] for text in unused_keys(config_with(*settings), run)]


def test_a_default_config_has_nothing_to_tell():
    assert unused() == []


@pytest.mark.parametrize(
    "key, value, used, otherwise",
    [
        ("table.learning_rate", 0.1, Resolved(True, "cpu", 2), ALONE),
        ("table.intra_host_gb_s", 1.0, Resolved(True, "cuda", 2), ALONE),
        ("table.ddr_gb", 1.0, ALONE, Resolved(False, "cuda", 1)),
        ("table.hbm_gb", 1.0, Resolved(False, "cuda", 1), ALONE),
        ("loss.cross_rank", True, Resolved(False, "cpu", 2), ALONE),
        ("trainer.timeout_minutes", 1.0, Resolved(False, "cpu", 2), ALONE),
    ],
)
def test_what_a_run_has_found_out_decides(key, value, used, otherwise):
    assert unused((key, value), run=used) == [] and unused((key, value), run=otherwise) == [key]


@pytest.mark.parametrize(
    "key, value, needed",
    [
        ("loss.num_negatives", 7, ("loss.negatives", "full")),
        ("optimizer.min_learning_rate", 1e-5, ("optimizer.schedule", "constant")),
        ("trainer.patience", 3, ("evaluation.every_epochs", None)),
        ("model.mixing_tolerance", 1e-3, ("model.token_mixing", "exact")),
    ],
)
def test_another_setting_decides(key, value, needed):
    assert unused((key, value), needed) == [key]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_sizes_that_an_encoder_does_not_use_are_those_that_do_not_change_it(encoder):
    """Compared with the parameters that are built, so that a new encoder cannot be forgotten."""
    for key, value in {"value_dim": 10, "qk_dim": 10, "ffn_multiply": 2.0, "bias_function": "mixed"}.items():
        plain = config_with(("model.encoder", encoder))
        changed = config_with(("model.encoder", encoder), (f"model.{key}", value))
        changes = shapes(plain) != shapes(changed)
        assert changes != (f"model.{key}" in unused(("model.encoder", encoder), (f"model.{key}", value))), key


def shapes(config):
    model = dataclasses.replace(config.model)
    return [(name, tensor.shape) for name, tensor in build_encoder(model, padded_length=20).state_dict().items()]


def test_every_rule_is_of_a_key():
    for key in RULES:
        section, name = key.split(".")
        assert hasattr(getattr(Config(), section), name)


@pytest.mark.parametrize("path", sorted(Path(ROOT, "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_config_that_is_delivered_sets_what_it_does_not_use(path):
    if {"sweeps", "chains"} & set(path.parts):
        return
    assert unused_keys(load_config(str(path)), ALONE) == []


def test_a_run_says_in_one_line_what_it_does_not_use(small_dataset, tmp_path, capfd):
    config = tiny(small_dataset, max_steps=1)
    config.table.learning_rate = 0.5
    train(config, tmp_path / "run")
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("not used by this run: ")]
    assert len(told) == 1 and "table.learning_rate (the table is replicated, and trained by optimizer" in told[0]
