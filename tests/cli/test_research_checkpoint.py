"""Checkpoints of the research code, in and out by the command line: the same numbers, and one line for every mistake."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from fuxi_torchrec.cli.main import main
from fuxi_torchrec.cli.research_checkpoint import TABLE_NAME
from tests.helpers.command_line import mistake
from tests.helpers.golden import FILES, load

pytestmark = pytest.mark.thorough

BUFFER = "module._hstu._attn_mask"


def golden(name):
    """(config, parameters) of a file made by the research code."""
    config, _, params = load(next(path for path in FILES if path.stem == name))
    return config, params


def write_config(path, config, **changes):
    model = {
        "encoder": config["model"],
        "qk_dim": config.get("qk_dim", config["embedding_dim"]),
        "value_dim": config.get("value_dim", config["embedding_dim"]),
        "bias_function": config.get("bias_function", "pow"),
        **{key: config[key] for key in ("embedding_dim", "num_blocks", "num_heads", "padded_length")},
        "ffn_multiply": config.get("ffn_multiply", 1),
        **changes,
    }
    length = min(10, config["padded_length"])
    values = {"data": {"max_sequence_length": length}, "model": model, "trainer": {"device": "cpu"}}
    path.write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """Makes a data set of so many items, whose source ids are 1 … items or have gaps."""
    from data_pipelines.events import prepare_events

    def make(items, gap=1):
        folder = tmp_path_factory.mktemp("data")
        random = np.random.default_rng(0)
        events = [(user, item, 10**9 + 60 * n) for n, (user, item) in enumerate((n % 7, n) for n in range(items))]
        events += [(user, int(random.integers(items)), 2 * 10**9 + user) for user in range(7)]
        rows = "".join(f"{user},{gap * item + 1},{time}\n" for user, item, time in events)
        (folder / "log.csv").write_text("user,item,time\n" + rows)
        prepare_events([str(folder / "log.csv")], "user", "item", "time", str(folder / "data"))
        return str(folder / "data")

    return make


def save(path, params, wrapped=True):
    weights = {("module." if wrapped else "") + name: torch.from_numpy(array) for name, array in params.items()}
    torch.save({"epoch": 3, "model_state_dict": {**weights, BUFFER: torch.ones(3, 3, dtype=torch.bool)}}, path)


@pytest.mark.parametrize("name", ["fuxi_beta_pow", "fuxi_alpha_h2", "hstu", "sasrec"])
def test_a_research_checkpoint_becomes_a_run_and_comes_out_again(name, data_of, tmp_path, capsys):
    config, params = golden(name)
    data = data_of(config["num_items"])
    save(tmp_path / "research.pt", params)
    write_config(tmp_path / "model.yaml", config)
    words = ["import-reference", tmp_path / "research.pt", "--config", tmp_path / "model.yaml", "--data.path", data]
    run = tmp_path / "run"
    assert main([*map(str, words), "--output", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["users"] == 7
    user = pq.read_table(f"{data}/train")["user_id"][0].as_py()
    assert main(["recommend", str(run), "--users", str(user), "--k", "3"]) == 0

    # what comes out is what went in, but for what no computation reads
    assert main(["export-reference", str(run), "--output", str(tmp_path / "out.pt")]) == 0
    out = torch.load(tmp_path / "out.pt", weights_only=True)["model_state_dict"]
    assert set(out) == set(params)
    for parameter, array in params.items():
        mine = out[parameter].numpy()
        if parameter == TABLE_NAME:
            mine, array = mine[1:], array[1:]
        elif parameter.endswith("_pos_w"):
            mine, array = mine[: len(array) // 2 + 1], array[: len(array) // 2 + 1]
        np.testing.assert_array_equal(mine, array)
    capsys.readouterr()


def test_rows_by_the_sources_own_ids(data_of, tmp_path, capsys):
    """The research code's table has a row for every id up to the largest, not for every item."""
    config, params = golden("fuxi_beta_pow")
    data = data_of(config["num_items"], gap=3)
    source = pq.read_table(f"{data}/items.parquet").sort_by("item_id")["source_id"].to_numpy()
    wide = np.random.default_rng(1).normal(size=(source.max() + 1, config["embedding_dim"])).astype(np.float32)
    save(tmp_path / "research.pt", {**params, TABLE_NAME: wide}, wrapped=False)
    write_config(tmp_path / "model.yaml", config)
    words = ["import-reference", tmp_path / "research.pt", "--config", tmp_path / "model.yaml", "--data.path", data]
    assert main([*map(str, words), "--output", str(tmp_path / "run")]) == 0
    assert main(["export-reference", str(tmp_path / "run")]) == 0
    by_source = torch.load(tmp_path / "run" / "reference.pt", weights_only=True)["model_state_dict"][TABLE_NAME].numpy()
    np.testing.assert_array_equal(by_source[source], wide[source])
    assert by_source.shape == wide.shape and not by_source[0].any()
    dense = str(tmp_path / "dense.pt")
    assert main(["export-reference", str(tmp_path / "run"), "--rows", "dense", "--output", dense]) == 0
    table = torch.load(dense, weights_only=True)["model_state_dict"][TABLE_NAME].numpy()
    np.testing.assert_array_equal(table[1:], wide[source])

    # training can go on from it
    more = ["train", tmp_path / "model.yaml", "--data.path", data, "--output", tmp_path / "run", "--resume"]
    assert main([*map(str, more), "--trainer.max_epochs", "1"]) == 0
    capsys.readouterr()


def test_mistakes_get_one_line_and_leave_no_run(data_of, tmp_path, capsys):
    config, params = golden("fuxi_beta_pow")
    data = data_of(config["num_items"])
    right, file, run = tmp_path / "model.yaml", tmp_path / "research.pt", tmp_path / "run"
    write_config(right, config)

    def says(given, config_file=right, *more):
        if given is not None:
            save(file, given)
        words = ["import-reference", file, "--config", config_file, "--data.path", data, "--output", run, *more]
        line = mistake(capsys, *words)
        assert not run.exists()
        return line

    assert "cannot read this checkpoint (No such file" in says(None)
    file.write_bytes(b"not a checkpoint at all")
    assert f"{file}: not a checkpoint of weights" in says(None)
    torch.save({"model_state_dict": {"a": os.path.join}}, file)  # code, which weights_only refuses
    assert "not a checkpoint of weights" in says(None)
    torch.save({"epoch": 3}, file)
    assert "holds no model_state_dict" in says(None)
    position = "_input_features_preproc._pos_emb.weight"
    assert f"{file}: parameter {position}: missing" in says({n: a for n, a in params.items() if n != position})
    assert "has shape" in says({**params, position: params[position][:-1]})
    assert "_nobody: not one of this model's" in says({**params, "_nobody": np.zeros(3, np.float32)})
    assert f"has {len(params[TABLE_NAME]) + 5} rows" in says(
        {**params, TABLE_NAME: np.zeros((len(params[TABLE_NAME]) + 5, config["embedding_dim"]), np.float32)}
    )
    other = tmp_path / "other.yaml"
    write_config(other, config, encoder="hstu")
    assert "holds parameters of fuxi_beta or fuxi_alpha" in says(params, other)
    write_config(other, config, encoder="flash")
    assert "model.encoder is flash" in says(params, other)
    write_config(other, config, bias_function="exp")
    assert "_rel_attn_bias._pow_a" in says(params, other)
    for words, line in (
        (["import-reference", file, "--output", run], "name the model's config"),
        (["import-reference", file, "--config", right, "--output", run], "give --data.path"),
        (["import-reference", file, "--config", right, "--data.path", data], "give --output"),
        (["import-reference", file, "--config", tmp_path / "no.yaml", "--output", run], "no.yaml: cannot read"),
        (["import-reference", file, "--config", right, "--data.path", tmp_path, "--output", run], "no data set here"),
        (["export-reference", tmp_path], "no run here"),
        (["export-reference", tmp_path, "--rows", "none"], "--rows: none"),
    ):
        assert line in mistake(capsys, *words)
    assert not run.exists()
