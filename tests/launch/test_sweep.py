"""Sweeps: what a file asks for, mistakes before anything starts, and, with real processes, a sweep that is killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest

from fuxi_torchrec import cli
from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.splits import windows
from fuxi_torchrec.profiling.flops import training_flops
from fuxi_torchrec.run.outcome import read_outcome
from launch.sweep import __main__ as sweep
from launch.sweep.orphans import MARK, orphans, stop_orphans
from launch.sweep.plan import read_plan
from launch.sweep.runner import only_one
from tests.helpers.command_line import ROOT, SMOKE
from tests.helpers.sweeps import SMALL, write_sweep
from tests.helpers.training_runs import killed_before_its_first_save

pytestmark = pytest.mark.thorough

SWEEPS = {"scaling-law": 36, "scaling-law-floor": 20, "encoders": 36, "ml-1m-tuning": 9}


def test_every_sweep_that_is_delivered_has_its_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {f"{name}.yaml" for name in SWEEPS} == set(os.listdir("configs/sweeps"))
    for name, runs in SWEEPS.items():
        assert len(read_plan(f"configs/sweeps/{name}.yaml").runs) == runs


def start(path, output, *options):
    command = [sys.executable, "-m", "launch.sweep", path, "--output", str(output), *options]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end_of(process, timeout=180):
    """Its standard error; a sweep that hangs is ended, and its runs with it."""
    try:
        return process.communicate(timeout=timeout)[1]
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()


def table(output):
    return {row["run"]: row for row in pq.read_table(output / "results.parquet").to_pylist()}


def steps(run):
    with open(os.path.join(run, "metrics.jsonl")) as file:
        return [line["step"] for line in map(json.loads, file) if "loss" in line]


def until(condition, timeout=90):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_every_combination_of_the_grids_once(tmp_path):
    grids = [
        {"dial": [1, 3], "model.channels": [["positional"], None]},
        {"dial": 3, "model.channels": None},
        {"optimizer.learning_rate": 0.1, "trainer.seed": 7},
    ]
    plan = read_plan(write_sweep(tmp_path, seeds=[0, 1], width_per_block=8, grid=grids))
    assert len(plan.runs) == 2 * 2 * 2 + 1
    biggest = next(run for run in plan.runs if run.varied.get("dial") == 3 and run.varied["model.channels"] is None)
    config = load_config(biggest.config, biggest.overrides)
    assert (config.model.num_blocks, config.model.embedding_dim, config.model.value_dim) == (3, 24, 24)
    assert biggest.name.startswith("dial-3_channels-null_seed-0")


def test_a_runs_name_tells_everything_that_it_is(tmp_path):
    """A run that finished under other settings is another run."""
    seeds = {"trainer.seed": [0, 1]}
    grids = (seeds, seeds, {**seeds, "data.split": "leave_two_out"})
    names = [{run.name for run in read_plan(write_sweep(tmp_path, grid=grid)).runs} for grid in grids]
    assert names[0] == names[1] and not names[0] & names[2]


WRONG = {
    "model.num_block": "unknown key model.num_block; did you mean model.num_blocks?",
    "modle.num_blocks": "unknown key modle; did you mean model?",
    "trainer": "trainer is a section",
    "model.num_blocks": "model.num_blocks: 0 must be at least 1",
    "dial": "width_per_block: None must be a whole number above 0",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_key_is_one_line_before_anything_starts(tmp_path, capsys, key):
    path = write_sweep(tmp_path, grid={"trainer.seed": [0, 1], key: [1, 0]})
    assert sweep.main([path, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and path in said and WRONG[key] in said
    assert not (tmp_path / "out").exists()


def test_a_wrong_type_and_a_wrong_scheduler_are_one_line(tmp_path, capsys):
    path = write_sweep(tmp_path, grid={"trainer.max_epochs": ["many"]})
    with pytest.raises(SystemExit) as stopped:
        sweep.main([path, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    path = write_sweep(tmp_path, grid={"trainer.seed": 0})
    for option, value in (("--scheduler", "slurp"), ("--cfg", "logdir=x"), ("--nnodes", "0")):
        assert sweep.main([path, "--output", str(tmp_path / "out"), option, value]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and option in said and value.split("=")[0] in said


def test_one_sweep_at_a_time_in_a_folder(tmp_path, capsys):
    path = write_sweep(tmp_path, grid={"trainer.seed": 0})
    with only_one(str(tmp_path / "out")):
        assert sweep.main([path, "--output", str(tmp_path / "out")]) == 2
    assert "another sweep is running" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_nothing(small_dataset, tmp_path):
    """One run is over, one is being trained, one has no data set when SIGKILL comes; then the same command again. The one
    that is being trained had been killed before its first save, and began again."""
    later, output = tmp_path / "later", tmp_path / "out"
    grid = [
        {"data.path": small_dataset},
        {"data.path": small_dataset, "trainer.max_epochs": 60, "trainer.checkpoint_every_epochs": 5},
        {"data.path": str(later)},
    ]
    path = write_sweep(tmp_path, grid=grid)
    short, long, missing = (str(output / "runs" / run.name) for run in read_plan(path).runs)
    killed_before_its_first_save(long, small_dataset)
    process = start(path, output, "--concurrency", "2", "--cpu", "1")
    until(lambda: read_outcome(short) and os.path.exists(os.path.join(long, "checkpoints", "index.json")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = os.stat(os.path.join(short, "outcome.json")).st_mtime_ns

    process = start(path, output, "--cpu", "1")
    said = end_of(process)
    assert process.returncode == 1 and not orphans([short, long])
    rows = table(output)
    assert [rows[os.path.basename(run)]["status"] for run in (short, long, missing)] == ["finished", "finished", "failed"]
    assert f"failed: {os.path.basename(missing)}: {later}: no data set here" in said
    assert os.stat(os.path.join(short, "outcome.json")).st_mtime_ns == before
    assert rows[os.path.basename(short)]["attempts"] == 1
    done = steps(long)
    assert done == list(range(1, len(done) + 1)) and done[-1] == read_outcome(long)["step"]

    shutil.copytree(small_dataset, later)
    process = start(path, output, "--cpu", "1", "--retry-failed")
    end_of(process)
    assert process.returncode == 0
    after = table(output)
    assert after[os.path.basename(missing)]["status"] == "finished"
    assert after[os.path.basename(long)] == rows[os.path.basename(long)]
    with open(output / "results.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == list(after)


def test_what_a_killed_sweep_left_running_is_stopped(tmp_path):
    """SIGTERM, and no process of another folder."""
    environment = {**os.environ, MARK: str(tmp_path / "mine")}
    mine = subprocess.Popen(["sleep", "60"], env=environment)
    other = subprocess.Popen(["sleep", "60"], env={**environment, MARK: str(tmp_path / "mine-too")})
    try:
        until(lambda: orphans([str(tmp_path / "mine")]))
        assert list(orphans([str(tmp_path / "mine")])) == [mine.pid]
        stop_orphans_of(mine, tmp_path / "mine")
        assert mine.returncode == -signal.SIGTERM and other.poll() is None
    finally:
        mine.kill()
        other.kill()


def stop_orphans_of(process, folder):
    """A child that nobody waits for would stay in /proc; an orphan's parent is init, which does."""
    waiting = threading.Thread(target=process.wait)
    waiting.start()
    stop_orphans([str(folder)])
    waiting.join(10)


def train(data, output, *options, **settings):
    settings = {"data.path": data, **SMALL, **settings}
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return cli.main(["train", SMOKE, "--output", str(output), *options, *words])


def test_a_run_tells_how_it_ended(small_dataset, tmp_path, capsys):
    diverging = {"optimizer.learning_rate": 1e30, "trainer.max_epochs": 3}
    assert train(small_dataset, tmp_path / "diverged", **diverging) == 2
    outcome = read_outcome(str(tmp_path / "diverged"))
    assert outcome["status"] == "failed" and "the loss is not finite" in outcome["reason"]
    assert f"error: {outcome['reason']}" in capsys.readouterr().err
    # A refused second start leaves the outcome as it was.
    assert train(small_dataset, tmp_path / "diverged") == 2
    assert read_outcome(str(tmp_path / "diverged")) == outcome


def test_tokens_and_flops_are_those_of_the_users_lengths(small_dataset, tmp_path):
    """Two epochs of all users, counted through a resume as well."""
    output = tmp_path / "run"
    assert train(small_dataset, output, **{"trainer.max_epochs": 1}) == 0
    assert train(small_dataset, output, "--resume", **{"trainer.max_epochs": 2}) == 0
    config = load_config(str(output / "config.yaml"))
    dataset = SequenceDataset(small_dataset)
    lengths = []
    for group in dataset.row_groups:
        users = windows(dataset.read(group), config.data, "train")
        lengths += (users.stop_U - users.start_U - 1).tolist()
    outcome = read_outcome(str(output))
    assert outcome["tokens"] == 2 * sum(lengths)
    assert outcome["flops"] == 2 * training_flops(config.model, lengths, config.loss.num_negatives)
