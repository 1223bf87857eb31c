"""The published runs are what the papers say, and every file under configs/ is a config."""

import glob
import os
from dataclasses import replace
from typing import get_args

import pytest

from fuxi_torchrec.config import BiasFunction
from fuxi_torchrec.config.parsing import load_config, to_yaml
from fuxi_torchrec.encoders import build_encoder
from tests.helpers.command_line import ROOT

CONFIGS = os.path.join(ROOT, "configs")
RUNS = glob.glob(os.path.join(CONFIGS, "**", "*.yaml"), recursive=True)
OTHERS = {"sweeps", "chains"}  # tests/launch reads those
FILES = sorted(path for path in RUNS if not OTHERS & set(path.split(os.sep)))


@pytest.mark.parametrize("path", FILES, ids=[os.path.relpath(path, CONFIGS) for path in FILES])
def test_every_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("name", ["fuxi-beta", "fuxi-alpha", "hstu", "sasrec", "hstu-beta", "sasrec-beta"])
@pytest.mark.parametrize(
    "data, large, width, blocks, heads, value, rate",
    [
        ("ml-1m", "", 50, 2, 1, 50, 1e-3),
        ("ml-1m", "large-", 50, 8, 2, 25, 1e-3),
        ("ml-20m", "", 256, 2, 4, 64, 4e-3),
        ("ml-20m", "large-", 256, 8, 8, 32, 4e-3),
    ],
)
def test_sizes_are_those_of_the_papers(name, data, large, width, blocks, heads, value, rate):
    config = load_config(os.path.join(CONFIGS, data, f"{name}-sampled-softmax-n128-{large}final.yaml"))
    model = config.model
    assert model.encoder == name.replace("-", "_")
    assert (model.embedding_dim, model.num_blocks, model.num_heads) == (width, blocks, heads)
    if not name.startswith("sasrec"):
        assert model.value_dim == value
    if name in ("fuxi-alpha", "hstu"):
        assert model.qk_dim == value
    if name == "fuxi-beta":
        assert model.ffn_multiply == {("ml-1m", ""): 1, ("ml-1m", "large-"): 1, ("ml-20m", ""): 4}.get((data, large), 3)
    assert config.optimizer.learning_rate == rate and tuple(config.optimizer.betas) == (0.9, 0.98)
    assert (config.loss.negatives, config.loss.num_negatives, config.loss.temperature) == ("per_token", 128, 0.05)
    assert (config.data.split, config.data.max_sequence_length, config.padded_length) == ("leave_one_out", 200, 211)
    assert config.trainer.max_epochs == 101


ABLATIONS = os.path.join(CONFIGS, "ml-1m", "ablations")
CHANGES = {
    "fuxi-beta-semantic": dict(channels=["positional", "temporal", "semantic"]),
    "fuxi-beta-no-temporal": dict(channels=["positional"]),
    "fuxi-beta-no-positional": dict(channels=["temporal"]),
    "fuxi-beta-single-stage": dict(ffn_multiply=0),
    **{f"fuxi-beta-{form}": dict(bias_function=form) for form in get_args(BiasFunction)},
    "fuxi-alpha-functional": dict(encoder="fuxi_alpha", channels=["positional", "temporal", "semantic"]),
}


def test_there_is_an_ablation_for_every_change():
    assert {os.path.splitext(name)[0] for name in os.listdir(ABLATIONS)} == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_is_the_base_run_but_for_what_its_name_says(name):
    """Everything else the same, so that a difference in results is the change's; and the tower can be built."""
    base = load_config(os.path.join(CONFIGS, "ml-1m", "fuxi-beta-sampled-softmax-n128-final.yaml"))
    ablation = load_config(os.path.join(ABLATIONS, f"{name}.yaml"))
    assert ablation == replace(base, model=replace(base.model, **CHANGES[name]))
    build_encoder(ablation.model, padded_length=ablation.padded_length)
