"""A run that survives, with real processes: kills, signals, damage, other world sizes, and worlds that cannot work."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data_pipelines.events import prepare_events
from tests.conftest import write_events

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMOKE = os.path.join(ROOT, "configs", "smoke", "fuxi-beta.yaml")
# Small enough that a start costs more than the training: 150 users, 8 steps an epoch on two processes.
SMALL = (
    *("--data.max_sequence_length", "20", "--data.batch_size", "16", "--data.shuffle_buffer", "20"),
    *("--model.embedding_dim", "8", "--model.value_dim", "8", "--loss.num_negatives", "10"),
    *("--trainer.device", "cpu", "--trainer.log_every_steps", "1", "--evaluation.every_epochs", "1"),
    *("--trainer.max_epochs", "4", "--trainer.checkpoint_every_steps", "2"),
)
# A step that takes a moment, so that a signal sent in the middle of the run meets it there.
SLOWLY = """
import os, sys, time
from fuxi_torchrec.training import Trainer
step = Trainer._step
def slow(self, batch, stop):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return step(self, batch, stop)
Trainer._step = slow
"""
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
MAIN = "from fuxi_torchrec.cli import main\nsys.exit(main())\n"


class Launch:
    """torchrun (or one process) training in the background, its workers' process ids, and its end."""

    def __init__(self, folder, data, output, *options, processes=2, restarts=0, before="", slow=0.0, config=SMOKE):
        self.output, self.script = output, folder / f"main-{time.monotonic_ns()}.py"
        self.script.write_text(SLOWLY + before + MAIN)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
        words = [*torchrun, "--monitor-interval", "0.1"] if processes else []
        words += [self.script, "train", config, "--data.path", data, "--output", output, *SMALL, *options]
        environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "SLOW": str(slow)}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.errors = folder / f"{self.script.stem}.err"
        with open(self.errors, "w") as errors:
            command = [sys.executable, *map(str, words)]
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
            )

    def workers(self):
        children = open(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read().split()
        return [int(child) for child in children]

    def wait(self, timeout=120):
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def complaints(self):
        return [line for line in self.errors.read_text().splitlines() if line.startswith("error: ")]

    def until(self, condition, timeout=90):
        """Waits for condition() to be true while the job runs; whether it became so."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def kill_one(self, moment, chance):
        """kill -9 of a worker, once `moment` has come. Returns the file of metrics then."""
        assert self.until(lambda: moment() and len(self.workers()) == 2), self.errors.read_text()
        os.kill(chance.choice(self.workers()), signal.SIGKILL)
        return inode(self.output)


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


@pytest.fixture(scope="module")
def undisturbed(small_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    launch = Launch(folder, small_dataset, folder / "run", "--trainer.keep_checkpoints", "100")
    assert launch.wait() == 0, launch.errors.read_text()
    return folder / "run"


def check_same(output, undisturbed):
    assert losses(output) == losses(undisturbed)
    assert evaluations(output) == evaluations(undisturbed)


def survive(kills, folder, data, undisturbed, chance):
    """One run of two processes through `kills`: "training", "saving" or "evaluation" each, spread over its steps."""
    steps = len(losses(undisturbed))
    ends = [line["step"] for line in evaluations(undisturbed)]
    launch = Launch(folder, data, folder / "run", restarts=len(kills) + 2, slow=0.05)
    before = None  # the file of metrics at the last kill: resuming writes another
    for number, kill in enumerate(kills):
        step = (number + 1) * (steps - 6) // (len(kills) + 1)

        def moment(kill=kill, step=step, before=before):
            return is_at(kill, step, launch.output, ends) and inode(launch.output) != before

        before = launch.kill_one(moment, chance)
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


def test_three_kills_do_not_change_the_run(small_dataset, undisturbed, tmp_path):
    survive(["training", "saving", "evaluation"], tmp_path, small_dataset, undisturbed, random.Random(1))


@pytest.mark.slow
def test_twenty_kills_do_not_change_the_run(small_dataset, undisturbed, tmp_path):
    chance = random.Random(2)
    kills = [chance.choice(["training", "saving", "evaluation"]) for _ in range(20)]
    survive(kills, tmp_path, small_dataset, undisturbed, chance)


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


@pytest.mark.parametrize("processes", [0, 4])
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


@pytest.mark.parametrize(
    "before, options, says",
    [
        ("if os.environ['RANK'] == '1': sys.argv += ['--optimizer.learning_rate', '0.5']\n", (), "rank 1: optimizer"),
        ("", ("--data.path", "TINY"), "1 users are too few for 2 processes"),
        (
            "from fuxi_torchrec.dataset import SequenceDataset\nread = SequenceDataset.read\n"
            "def fail(self, group, **more):\n"
            "    if os.environ['RANK'] == '1': group = type(group)('/nowhere/part.parquet', 0, 1)\n"
            "    return read(self, group, **more)\n"
            "SequenceDataset.read = fail\n",
            (),
            "rank 1: /nowhere/part.parquet, row group 0: cannot be read",
        ),
        ("", ("--resume", "--model.num_blocks", "3"), "checkpoint of another model; model.num_blocks is 2 there"),
    ],
    ids=["another config", "too little data", "unreadable shard", "another model"],
)
def test_a_bad_world_gets_one_error_and_ends(small_dataset, undisturbed, tmp_path, before, options, says):
    if "--resume" in options:
        shutil.copytree(undisturbed, tmp_path / "run")
    if "TINY" in options:
        write_events(tmp_path / "log.csv", 1)
        prepare_events([str(tmp_path / "log.csv")], "user", "item", "time", str(tmp_path / "tiny"))
        options = ("--data.path", tmp_path / "tiny")
    launch = Launch(tmp_path, small_dataset, tmp_path / "run", *options, before=before)
    assert launch.wait(60) != 0
    complaints = launch.complaints()
    assert len(complaints) == 1 and says in complaints[0], launch.errors.read_text()
    if "--resume" in options:  # a refused start leaves the run as it was
        assert (tmp_path / "run" / "config.yaml").read_text() == (undisturbed / "config.yaml").read_text()


def test_a_hanging_worker_is_noticed_and_named(small_dataset, tmp_path):
    run = tmp_path / "run"
    launch = Launch(tmp_path, small_dataset, run, "--trainer.timeout_minutes", "0.05", slow=0.1)
    assert launch.until(lambda: step_of(run) >= 3)
    stuck = max(launch.workers())  # rank 1, started last
    os.kill(stuck, signal.SIGSTOP)
    found = launch.until(launch.complaints, 30)
    os.kill(stuck, signal.SIGKILL)  # torchrun would, half a minute later
    assert launch.wait() != 0
    assert found and "rank 1 died or hangs" in launch.complaints()[0], launch.errors.read_text()
