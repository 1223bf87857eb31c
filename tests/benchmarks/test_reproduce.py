"""The reproduced table: runs that are done are left alone, others go on, and the page says what their records say."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml

from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce import step_seconds
from benchmarks.reproduce.page import page, read_steps
from benchmarks.reproduce.plots import time_map
from benchmarks.reproduce.records import Record, channel_weights, read_records
from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout
from tests.helpers.command_line import ROOT
from tests.helpers.training_runs import killed_before_its_first_save

pytestmark = pytest.mark.thorough

SMALL = {
    "data": {"max_sequence_length": 10, "batch_size": 64},
    "model": {"embedding_dim": 8, "value_dim": 8, "num_blocks": 1},
    "loss": {"num_negatives": 8},
    "trainer": {"device": "cpu", "log_every_steps": 1},
}


def record(model, values, seed=0, max_epochs=None, finished=True, split="leave_one_out"):
    metrics = {name: 0.5 for name in ("ndcg@50", "hr@10", "hr@50", "mrr")}
    lines = [
        {"split": "test", "step": 10 * epoch, "epoch": epoch, "ndcg@10": value, **metrics}
        for epoch, value in enumerate(values, 1)
    ]
    if split == "leave_two_out":
        best = {**lines[1], "checkpoint": "best"}
        lines = [{**line, "split": "validation"} for line in lines] + [{**best, "split": "validation"}, best]
    dataset = {"name": "ml-1m", "users": 6040, "items": 3706, "events": 1000209, "catalogue": "rated"}
    return Record(model, seed, split, max_epochs or len(values), finished, dataset, 200_000, 1000, [], lines)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two small configs."""
    published = tmp_path / "configs" / "ml-1m"
    os.makedirs(published / "ablations")
    for name, model in (("fuxi-beta-sampled-softmax-n128-final", "fuxi_beta"), ("ablations/fuxi-beta-exp", "fuxi_beta")):
        form = "exp" if "exp" in name else "pow"
        values = {**SMALL, "model": {**SMALL["model"], "encoder": model, "bias_function": form}}
        (published / f"{name}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    return tmp_path


@pytest.mark.slow
def test_one_command_runs_the_table_goes_on_with_it_and_rebuilds_its_page(here, small_dataset, capsys):
    words = ["ml-1m", "--data-path", small_dataset, "--seeds", "0"]
    metrics = here / "runs" / "reproduce" / "ml-1m" / "fuxi-beta" / "seed-0" / "metrics.jsonl"
    killed_before_its_first_save(metrics.parent, small_dataset, max_sequence_length=10)
    one_epoch = reproduce.parse([*words, "--epochs", "1", "--jobs", "2"])
    assert reproduce.run_all(one_epoch) == 0
    assert "fuxi-beta/seed-0: finished" in capsys.readouterr().err
    first = metrics.read_text()
    assert [json.loads(line)["step"] for line in first.splitlines()][:3] == [1, 2, 3] and "99.0" not in first

    # the same again: nothing is run; one epoch more: the run goes on, what it has stays
    assert reproduce.run_all(one_epoch) == 0
    assert "started" not in capsys.readouterr().err and metrics.read_text() == first
    assert reproduce.main([*words, "--epochs", "2", "--models", "fuxi-beta"]) == 0
    epochs = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in epochs if "split" in line and "checkpoint" not in line] == [1, 2]
    assert metrics.read_text().startswith(first[: first.index('"checkpoint"')].rsplit("\n", 1)[0])

    # page and plots, from the records alone
    results = here / "docs" / "results"
    assert (results / "ml-1m" / "fuxi-beta-seed-0.jsonl").read_text() == metrics.read_text()
    shutil.rmtree(here / "runs")
    before = (results / "ml-1m.md").read_text()
    assert reproduce.main(["ml-1m", "--page-only"]) == 0
    assert (results / "ml-1m.md").read_text() == before
    for name in ("time-functions", "lags", "epochs"):
        assert f"ml-1m/{name}.png" in before and (results / "ml-1m" / f"{name}.png").stat().st_size > 1000
    assert "## 2 epochs" in before and "## 1 epochs" in before
    assert all(f"| *{name}* |" in before for name in ("popularity", "markov", "item-knn"))
    one, two = read_records(str(results / "ml-1m"))
    assert (one.model, one.blocks[0]["temporal"]["kind"]) == ("fuxi-beta", "pow")
    assert (two.model, two.blocks[0]["temporal"]["kind"]) == ("fuxi-beta-exp", "exp")


def test_step_times_are_of_real_training_steps_and_become_the_pages_ratios(here, small_dataset, monkeypatch, capsys):
    models = reproduce.configs_of("ml-1m")
    words = ["model_step_time", small_dataset, *models.values(), "--steps", "3", "--output", "steps.json"]
    monkeypatch.setattr("sys.argv", words)
    step_seconds.main()
    seconds = json.loads((here / "steps.json").read_text())["seconds"]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
    medians = read_steps("steps.json", models)
    assert set(medians) == {"fuxi-beta", "fuxi-beta-exp"} and read_steps("nowhere.json", models) == {}
    assert medians["fuxi-beta"] == sorted(seconds[models["fuxi-beta"]])[1]


@pytest.mark.parametrize(
    "words, says",
    [
        (["ml-1m"], "data/ml-1m: ml-1m is not prepared here; run 'fuxi-torchrec prepare movielens"),
        (["ml-1m", "--models", "bert"], "--models: bert is none of fuxi-beta, fuxi-beta-exp"),
        (["ml-1m", "--page-only"], "no results yet"),
    ],
)
def test_a_mistake_gets_one_line(here, capsys, words, says):
    assert reproduce.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_ml_20m_is_the_same_command(capsys, monkeypatch):
    assert reproduce.main(["ml-20m", "--data-path", "nowhere"]) == 2
    assert "nowhere: ml-20m is not prepared here" in capsys.readouterr().err
    assert "hstu-large" in reproduce.configs_of("ml-20m")


def test_every_config_is_a_row_of_the_table():
    models = reproduce.configs_of("ml-1m")
    assert list(models)[0] == "fuxi-beta" and set(reproduce.SAME) | set(reproduce.SAME.values()) <= set(models)
    assert len(models) == len(set(models.values())) == 14 + 13 + 1  # published, ablations, tuned


def test_the_page_compares_only_equal_epochs_and_says_how_the_best_was_chosen():
    records = [
        record("fuxi-beta", [0.1, 0.3, 0.2, 0.4]),
        record("fuxi-beta", [0.1, 0.5, 0.2, 0.4], seed=1),
        record("hstu", [0.1, 0.2]),
        record("sasrec", [0.1, 0.1, 0.35], max_epochs=4, finished=False),
        record("fuxi-beta", [0.3, 0.2], split="leave_two_out"),
    ]
    floor = {"leave_one_out": {"test": {"popularity": {**records[0].lines[0], "ndcg@10": 0.15}}}}
    text = page("ml-1m", records, floor, {"fuxi-beta": 2.0, "hstu": 3.0}, {"Curves": "epochs.png"}, "## What is odd\nNothing.")
    four, two = text.index("## 4 epochs"), text.index("## 2 epochs")
    assert four < two
    rows = [line for line in text[two:].splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| FuXi-β | 0.4000 (0.3000, 0.5000) |") and "| 2, 2 |" in rows[2]
    assert rows[3].startswith("| HSTU | 0.2000 |") and rows[3].endswith("| 1.50 |") and "| 0.1720 |" in rows[3]
    assert "| HSTU | 3.000 | 1.50 |" in text
    assert rows[4].startswith("| *popularity* | 0.1500 |") and rows[5].startswith("| SASRec | 0.1000 |")
    assert "| HSTU |" not in text[four:two] and "0.4500 (0.4000, 0.5000)" in text[four:two]
    assert "was best *on test*" in text and "**The last epoch** (4)" in text
    assert "sasrec-seed-0 (3 of 4 epochs)" in text
    assert "| FuXi-β, seed 0 | 2 | 2 | 0.2000 | 0.2000 |" in text[text.index("## Chosen on validation") :]
    assert text.index("## What is odd") < text.index("![Curves](ml-1m/epochs.png)")


@pytest.mark.parametrize("form", ["pow", "exp", "log", "linear", "sin", "mixed", "nn", "zero"])
def test_a_recorded_time_function_is_the_encoders_own(form):
    """The value 1 of a single event comes out as f of the gap to what follows."""
    encoder = build_encoder(ModelConfig(bias_function=form, num_blocks=1, channels=["temporal"]), padded_length=4).double()
    recorded = json.loads(json.dumps(channel_weights(encoder)))[0]["temporal"]
    gaps_G = np.array([1.0, 60, 86_400, 10_000_000])
    expected_G = time_map(recorded, gaps_G)
    for gap, expected in zip((1, 60, 86_400, 10_000_000), expected_G):
        past, future = torch.tensor([10**9]), torch.tensor([10**9 + gap])
        context = encoder.batch_context(past, future, JaggedLayout.from_lengths([1]))
        mixed = encoder.blocks[0].mix_channels(torch.ones(1, 1, 1, dtype=torch.float64), context)
        assert mixed.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert gaps_G.tolist() == [1.0, 60, 86_400, 10_000_000]  # its caller's own, which it must leave alone
