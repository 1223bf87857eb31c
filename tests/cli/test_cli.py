"""The command line end to end, as a user types it: real processes, real files, and one line for every mistake."""

import json
import os
import re
import shutil
import sys
import time

import pyarrow.parquet as pq
import pytest

from fuxi_torchrec.cli.main import main
from tests.helpers.command_line import SMOKE, fuxi, mistake

pytestmark = pytest.mark.thorough

SMALL = ("--data.max_sequence_length", "20", "--trainer.max_epochs", "2", "--trainer.device", "cpu")






@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A generated MovieLens-like archive, prepared and trained on by the commands of the README."""
    folder = tmp_path_factory.mktemp("run")
    archive, data, run = folder / "ml.zip", folder / "data", folder / "run"
    size = ("--users", 200, "--items", 300, "--events-per-user", 15)
    for words in (
        ("prepare", "synthetic", "--format", "ml-1m", *size, "--output", archive),
        ("prepare", "movielens", "--source", archive, "--output", data),
        ("train", SMOKE, "--data.path", data, "--output", run, *SMALL),
    ):
        done = fuxi(*words)
        assert done.returncode == 0, done.stderr
    return data, run, done


def test_the_whole_job(finished, tmp_path):
    data, run, trained = finished
    assert "popularity" in trained.stdout and "fuxi_beta" in trained.stdout
    lines = [json.loads(line) for line in open(run / "metrics.jsonl")]
    printed = lines[-1]

    # evaluate gives the numbers of training again
    done = fuxi("evaluate", run, "--output", tmp_path / "metrics.json")
    assert done.returncode == 0, done.stderr
    again = json.load(open(tmp_path / "metrics.json"))
    ranking = [name for name in printed if "@" in name or name in ("mrr", "cross_entropy", "users")]
    assert len(ranking) == 17 and {name: again[name] for name in ranking} == {name: printed[name] for name in ranking}

    # recommend leaves seen items out and speaks the source's ids and titles
    users = pq.read_table(data / "train")["user_id"].to_pylist()[:2]
    done = fuxi("recommend", run, "--users", ",".join(map(str, users)), "--k", 5, "--output", tmp_path / "top.parquet")
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "top.parquet").to_pylist()
    histories = {row["user_id"]: set(row["item_ids"]) for row in pq.read_table(data / "train").to_pylist()}
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5] * 2
    assert all(row["title"] and row["dense_id"] not in histories[int(row["user"])] for row in rows)
    scores = [row["score"] for row in rows[:5]]
    assert scores == sorted(scores, reverse=True)

    # a history by hand, at two request times: the time is part of the question
    item = rows[0]["item_id"]
    history = f"{item}@1000000000,{rows[1]['item_id']}@1000000100"
    tops = [fuxi("recommend", run, "--history", history, "--at", at).stdout for at in (1_000_000_200, 1_100_000_000)]
    assert all("history" in top for top in tops) and tops[0] != tops[1]


def test_resume_of_a_finished_run_trains_on_when_there_is_more_to_do(finished, tmp_path):
    data, run, _ = finished
    os.system(f"cp -r {run} {tmp_path}/run")
    options = ("--data.path", data, "--output", tmp_path / "run", *SMALL, "--trainer.max_epochs", 3, "--resume")
    done = fuxi("train", SMOKE, *options)
    assert done.returncode == 0, done.stderr
    epochs = [json.loads(line).get("epoch") for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert max(epochs) == 3


def test_two_processes_train_one_model(finished, tmp_path):
    """Under torchrun: every user is evaluated once, and one process finds the same metrics in what two have saved."""
    data, _, _ = finished
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fuxi_torchrec")
    done = fuxi("train", SMOKE, "--data.path", data, "--output", tmp_path / "two", *SMALL, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(tmp_path / "two" / "metrics.jsonl")]
    assert lines[-1]["users"] == 200
    again = fuxi("evaluate", tmp_path / "two", "--output", tmp_path / "one.json")
    assert again.returncode == 0, again.stderr
    one = json.load(open(tmp_path / "one.json"))
    assert abs(one["mrr"] - lines[-1]["mrr"]) < 0.005 * lines[-1]["mrr"] + 1e-9


NEVER_SLOW = ["train", "bench", "evaluate", "recommend", "import-reference", "export-reference"]


@pytest.mark.parametrize("command", [[], ["prepare"], ["prepare", "events"], *([name] for name in NEVER_SLOW)])
def test_help_answers_at_once_without_torch(command):
    code = f"import sys; from fuxi_torchrec.cli import main\ntry: main({[*command, '--help']!r})\nexcept SystemExit: pass"
    code += "\nassert not {'torch', 'pyarrow', 'duckdb'} & set(sys.modules), 'slow imports'"
    started = time.perf_counter()
    done = fuxi(launcher=(sys.executable, "-c", code))
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    print(f"{time.perf_counter() - started:.2f} s")


def test_print_config_shows_the_resolved_config(capsys):
    assert main(["train", SMOKE, "--print-config", "--trainer.max_epochs", "7"]) == 0
    assert re.search(r"max_epochs: 7\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    "words, says",
    [
        (["evaluate", "nowhere"], "nowhere: no run here"),
        (["recommend", "nowhere", "--users", "1"], "nowhere: no run here"),
        (["train"], "name a config first"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot read"),
        (["train", SMOKE], "data.path: no data set named"),
        (["train", SMOKE, "--data.path", "nowhere"], "nowhere: no data set here"),
        (["train", SMOKE, "--trainer.nope", "3"], "--trainer.nope"),
        (["train", SMOKE, "--trainer.max_epoch", "3"], "--trainer.max_epoch"),
        (["train", SMOKE, "--trainer.max_epochs", "three"], "trainer.max_epochs"),
        (["train", SMOKE, "--model.num_heads", "0"], "model.num_heads: 0 must be at least 1"),
        (["train", SMOKE, "--model.encoder", "sasrec", "--model.num_heads", "3"], "3 heads do not divide"),
        (["train", SMOKE, "--model.padded_length", "50"], "model.padded_length: 50 is shorter"),
        (["train", SMOKE, "--model.channels", "[]"], "model.channels"),
        (["train", SMOKE, "--evaluation.split", "validation"], "has no validation split"),
        (["train", SMOKE, "--data.split", "temporal"], "data.temporal_cutoffs"),
        (["train", SMOKE, "--trainer.metric", "ndcg@11"], "trainer.metric"),
        (["nonsense"], "unknown command"),
    ],
)
def test_a_mistake_gets_one_line(capsys, words, says):
    assert says in mistake(capsys, *words)


@pytest.mark.parametrize(
    "text, says",
    [
        ("trainer:\n  nope: 3\n", "unknown key trainer.nope"),
        ("trainr:\n  max_epochs: 3\n", "unknown key trainr; did you mean trainer?"),
        ("trainer: 3\n", "trainer must hold keys and values"),
        ("trainer: [1\n", "not YAML"),
        ("trainer:\n  max_epochs: 2.5\n", "trainer.max_epochs"),
        ("trainer:\n  max_epochs: null\n", "trainer.max_epochs: null is no value"),
    ],
)
def test_a_wrong_config_file_is_named_with_its_key(capsys, tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text)
    assert says in mistake(capsys, "train", tmp_path / "bad.yaml")


def test_another_schema_version_is_refused(finished, capsys, tmp_path):
    data, run, _ = finished
    identity = json.load(open(data / "dataset.json"))
    (tmp_path / "dataset.json").write_text(json.dumps({**identity, "schema_version": 99}))
    assert "schema version 99" in mistake(capsys, "train", SMOKE, "--data.path", tmp_path)


def test_mistakes_with_a_run_get_one_line(finished, capsys, tmp_path):
    data, run, _ = finished
    assert "user '987654321' is not among" in mistake(capsys, "recommend", run, "--users", "987654321")
    assert "item '987654321' is not in the catalogue" in mistake(capsys, "recommend", run, "--history", "987654321")
    assert "'²' is not an integer" in mistake(capsys, "recommend", run, "--users", "²")
    assert "not an integer of 64 bits" in mistake(capsys, "recommend", run, "--users", "1", "--at", str(2**63))
    assert "--split validation" in mistake(capsys, "evaluate", run, "--split", "validation")
    assert "no checkpoint here" in mistake(capsys, "evaluate", run, "--checkpoint", "step-99999999")
    again = ("train", SMOKE, "--data.path", data, "--output", run, *SMALL)
    assert "a run is already here" in mistake(capsys, *again)
    before = (run / "config.yaml").read_text()
    assert "data.split is leave_one_out in this run" in mistake(
        capsys, *again, "--resume", "--data.split", "leave_two_out"
    )
    assert "model.num_blocks is 2 there and 3 here" in mistake(capsys, *again, "--resume", "--model.num_blocks", "3")
    assert (run / "config.yaml").read_text() == before
    early = ("--data.split", "temporal", "--data.temporal_cutoffs", "[1]")
    elsewhere = ("train", SMOKE, "--data.path", data, "--output", tmp_path / "run", *early)
    assert "no user has two events in the test and the train split" in mistake(capsys, *elsewhere)
    assert not (tmp_path / "run").exists()
    os.system(f"cp -r {data} {tmp_path}/data")
    part = next((tmp_path / "data" / "train").iterdir())
    part.write_bytes(part.read_bytes()[:-100])
    assert part.name in mistake(capsys, "evaluate", run, "--data.path", tmp_path / "data")


def test_a_damaged_data_set_is_noticed_before_any_work_and_by_verify_to_the_byte(finished, capsys, tmp_path):
    data, run, _ = finished
    shutil.copytree(data, tmp_path / "data")
    items = tmp_path / "data" / "items.parquet"
    there = ("--data.path", tmp_path / "data")
    commands = {
        "train": ("train", SMOKE, *there, "--output", tmp_path / "run", *SMALL),
        "evaluate": ("evaluate", run, *there),
        "recommend": ("recommend", run, "--users", "1", *there),
    }
    whole = items.read_bytes()
    items.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    for command in commands.values():
        line = mistake(capsys, *command, "--verify")
        assert f"{items}: not the file that prepare wrote (sha256" in line and "dataset.json says" in line
    items.unlink()
    for command in commands.values():
        assert f"{items}: missing" in mistake(capsys, *command)
    assert not (tmp_path / "run").exists()
