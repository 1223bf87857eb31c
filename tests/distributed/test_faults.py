"""A run that survives, with real processes: kills, signals, hangs and other world sizes."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.helpers.launches import Launch, Ranks

pytestmark = pytest.mark.thorough

# The loaded model is the one of $SAVED.
COMPARED = """
import torch
from fuxi_torchrec.checkpoint import Checkpoints
read = Checkpoints._read
def compared(self, name, model, optimizer):
    found = read(self, name, model, optimizer)
    saved = torch.load(os.environ["SAVED"])["model"]
    if optimizer is not None:
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
        print("the same model", file=sys.stderr)
    return found
Checkpoints._read = compared
"""


def kill_one(launch, moment, chance):
    """kill -9 of a worker, once `moment` has come. Returns the file of metrics then."""
    came = launch.until(lambda: moment() and len(launch.workers()) == 2)
    assert came, f"{launch.errors.read_text()}\ntorchrun's exit code: {launch.process.poll()}"
    os.kill(chance.choice(launch.workers()), signal.SIGKILL)
    return inode(launch.output)


def inode(output):
    return os.stat(output / "metrics.jsonl").st_ino


def lines(output):
    path = output / "metrics.jsonl"
    found = []
    for text in open(path) if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            pass  # being written
    return found


def losses(output):
    return [(line["step"], line["loss"]) for line in lines(output) if "loss" in line]


def evaluations(output):
    dropped = ("seconds",)
    return [{key: line[key] for key in line if key not in dropped} for line in lines(output) if "split" in line]


def step_of(output):
    return max([step for step, _ in losses(output)], default=0)


def unfinished(output):
    """Whether a checkpoint is being written."""
    folder = output / "checkpoints"
    names = [name for name in os.listdir(folder) if name.startswith("step-")] if folder.exists() else []
    return any(not (folder / name / "complete.json").exists() for name in names)


# Replicated tables, and tables cut by rows whose ids are exchanged ahead.
TABLES = {"replicated": (), "row_wise": ("--table.sharding", "row_wise", "--trainer.train_pipeline", "sparse_dist")}


@pytest.fixture(scope="module")
def undisturbed_of(small_dataset, tmp_path_factory):
    """The undisturbed run of one of TABLES, trained when it is first asked for."""
    runs = {}

    def run(table):
        if table not in runs:
            folder = tmp_path_factory.mktemp(table)
            launch = Launch(folder, small_dataset, folder / "run", "--trainer.keep_checkpoints", "100", *TABLES[table])
            assert launch.wait() == 0, launch.errors.read_text()
            runs[table] = folder / "run"
        return runs[table]

    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_of):
    return undisturbed_of("replicated")


def check_same(output, undisturbed):
    assert losses(output) == losses(undisturbed)
    assert evaluations(output) == evaluations(undisturbed)


def survive(kills, folder, data, undisturbed, chance, options):
    """One run of two processes through `kills`: "training", "saving" or "evaluation" each, spread over its steps."""
    steps = len(losses(undisturbed))
    ends = [line["step"] for line in evaluations(undisturbed)]
    launch = Launch(folder, data, folder / "run", *options, restarts=len(kills) + 2, slow=0.05)
    before = None  # the file of metrics at the last kill: resuming writes another
    for number, kill in enumerate(kills):
        step = (number + 1) * (steps - 6) // (len(kills) + 1)

        def moment(kill=kill, step=step, before=before):
            return is_at(kill, step, launch.output, ends) and inode(launch.output) != before

        before = kill_one(launch, moment, chance)
    assert launch.wait(300) == 0, launch.errors.read_text()
    check_same(folder / "run", undisturbed)


def is_at(kill, step, output, ends):
    """Whether the run is at a moment to be killed at, at `step` or later."""
    if step_of(output) < step:
        return False
    if kill == "evaluation":  # an epoch's last step is logged, its evaluation is not
        last = lines(output)[-1]
        return "loss" in last and last["step"] in ends
    return kill == "training" or unfinished(output)


# A table of each kind takes two minutes. One kill -9 in a job of torchrun's is in tests/launch/test_elastic.py, and resuming to
# the bit in tests/sharding.
@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_three_kills_do_not_change_the_run(small_dataset, undisturbed_of, tmp_path, table):
    kills = ["training", "saving", "evaluation"]
    survive(kills, tmp_path, small_dataset, undisturbed_of(table), random.Random(1), TABLES[table])
    plans = list((tmp_path / "run" / "checkpoints").glob("*/sharding_plan.json"))
    assert plans and all(json.loads(plan.read_text())["tables"]["item"]["sharding"] == table for plan in plans)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_twenty_kills_do_not_change_the_run(small_dataset, undisturbed_of, tmp_path, table):
    chance = random.Random(2)
    kills = [chance.choice(["training", "saving", "evaluation"]) for _ in range(20)]
    survive(kills, tmp_path, small_dataset, undisturbed_of(table), chance, TABLES[table])


def test_sigterm_to_torchrun_saves_and_one_process_goes_on(small_dataset, undisturbed, tmp_path):
    run, rarely = tmp_path / "run", ("--trainer.checkpoint_every_steps", "1000")
    launch = Launch(tmp_path, small_dataset, run, *rarely, slow=0.1)
    assert launch.until(lambda: step_of(run) >= 11)
    os.kill(launch.process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert launch.wait() == 1  # torchrun's own, whatever its workers' is
    assert time.monotonic() - started < 20
    assert "stopped by SIGTERM" in launch.errors.read_text() and not launch.complaints()
    saved = json.load(open(run / "checkpoints" / "index.json"))["last"]
    assert saved == f"step-{step_of(run):08d}"
    before = losses(run)
    assert before == losses(undisturbed)[: len(before)]
    again = Launch(tmp_path, small_dataset, run, *rarely, "--resume", processes=0)
    assert again.wait() == 0, again.errors.read_text()
    assert losses(run)[: len(before)] == before and evaluations(run)[-2]["epoch"] == 4


def test_sigterm_to_one_worker_saves_on_all_and_torchrun_restarts_the_run(small_dataset, undisturbed, tmp_path):
    run = tmp_path / "run"
    options = ("--trainer.checkpoint_every_steps", "1000", "--trainer.async_checkpoint", "true")
    launch = Launch(tmp_path, small_dataset, run, *options, slow=0.1, restarts=1)
    assert launch.until(lambda: step_of(run) >= 5)
    os.kill(launch.workers()[1], signal.SIGTERM)
    assert launch.wait() == 0, launch.errors.read_text()
    assert "stopped by SIGTERM" in launch.errors.read_text() and not launch.complaints()
    check_same(run, undisturbed)


def test_sigterm_to_one_rank_of_a_cluster_saves_and_ends_all_with_its_code(small_dataset, undisturbed, tmp_path):
    run = tmp_path / "run"
    ranks = Ranks(tmp_path, small_dataset, run, "--trainer.checkpoint_every_steps", "1000", slow=0.1)
    while step_of(run) < 3:
        assert None in [process.poll() for process in ranks.processes], ranks.complaints()
        time.sleep(0.01)
    ranks.processes[1].terminate()
    assert ranks.wait() == [128 + signal.SIGTERM] * 2 and ranks.complaints() == [[], []]
    assert json.loads((run / "checkpoints" / "index.json").read_text())["last"] == f"step-{step_of(run):08d}"
    assert losses(run) == losses(undisturbed)[: step_of(run)]


@pytest.mark.parametrize("processes", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_another_world_size_gets_the_same_model_and_goes_on(
    small_dataset, undisturbed, tmp_path, monkeypatch, processes
):
    """From the middle of an epoch; tests/test_loader.py shows that its users are still seen once each."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name > "step-00000012":
            shutil.rmtree(folder)
    dcp_to_torch_save(str(run / "checkpoints" / "step-00000012"), str(tmp_path / "saved.pt"))
    monkeypatch.setenv("SAVED", str(tmp_path / "saved.pt"))
    launch = Launch(
        tmp_path, small_dataset, run, "--resume", "--trainer.max_epochs", "2", processes=processes, before=COMPARED
    )
    assert launch.wait() == 0, launch.errors.read_text()
    assert launch.errors.read_text().count("the same model") == max(processes, 1)
    assert losses(run)[:12] == losses(undisturbed)[:12]
    assert [line["epoch"] for line in evaluations(run)] == [1, 2, evaluations(run)[-1]["epoch"]]


def test_a_hanging_worker_is_noticed_and_named(small_dataset, tmp_path):
    run = tmp_path / "run"
    launch = Launch(tmp_path, small_dataset, run, "--trainer.timeout_minutes", "0.05", slow=0.1)
    assert launch.until(lambda: step_of(run) >= 3)
    stuck = max(launch.workers())  # rank 1, started last
    os.kill(stuck, signal.SIGSTOP)
    found = launch.until(launch.complaints, 30)
    os.kill(stuck, signal.SIGKILL)  # torchrun would, half a minute later
    assert launch.wait() != 0
    assert found and re.search("rank 1 on .* died, hangs", launch.complaints()[0]), launch.errors.read_text()
