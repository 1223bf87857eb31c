"""Jobs on a real Slurm of two nodes: trained alike, healed, cancelled, resumed. `make slurm`."""

import json
import re
import sys

import pytest

from tests.helpers.elastic import free_port
from tests.helpers.slurm import ROOT, Slurm, until

pytestmark = pytest.mark.slurm
TRAIN = f"{ROOT}/launch/components.py:train"
CONFIG = f"{ROOT}/configs/smoke/fuxi-beta.yaml"
# A table cut over four processes; 150 users make 10 steps an epoch, so that a kill meets the middle of something.
SMALL = (
    *("--data.max_sequence_length", "20", "--data.batch_size", "4", "--data.shuffle_buffer", "20"),
    *("--model.embedding_dim", "8", "--model.value_dim", "8", "--loss.num_negatives", "10"),
    *("--table.sharding", "row_wise", "--trainer.device", "cpu", "--trainer.log_every_steps", "1"),
    *("--evaluation.every_epochs", "4", "--trainer.max_epochs", "12"),
)
# Slower, so that `torchx cancel`, which takes seconds to start, finds the job at work; it changes no loss.
SLOWLY = ("--trainer.checkpoint_every_steps", "1")
OFTEN = ("--trainer.checkpoint_every_steps", "4")
NODES = ("--nnodes", "2", "--nproc_per_node", "2", "--cpu", "2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def undisturbed(slurm, small_dataset):
    """The run of the same config on four processes of this machine."""
    run = slurm.folder / "local"
    words = ("--config", CONFIG, "--nproc_per_node", "4", "--output", run, "--", "--data.path", small_dataset, *SMALL, *OFTEN)
    slurm.torchx("run", "-s", "local_cwd", TRAIN, *words, timeout=400)
    return run


def submit(slurm, data, run, *options, more=OFTEN):
    """A training job's handle; `more` are keys of the config."""
    words = ("--config", CONFIG, *NODES, "--output", run, *options, "--", "--data.path", data, *SMALL, *more)
    return slurm.torchx("run", "-s", "slurm", TRAIN, *words).split()[-1]


def lines(run):
    """(step, loss) of every training line, and the final metrics."""
    file = run / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    losses = {line["step"]: line["loss"] for line in found if "loss" in line}
    final = [{**line, "seconds": 0} for line in found if line.get("checkpoint") == "best"]
    return losses, final


def step_of(run):
    return max(lines(run)[0], default=0)


def test_a_mistake_is_one_line_and_takes_no_node(slurm, small_dataset):
    output = ("--output", slurm.folder / "refused", "--", "--data.path", small_dataset, *SMALL)
    for words, says in (
        (("-cfg", "partition=gpus", TRAIN, "--config", CONFIG, *NODES, *output), "no such partition; there are main"),
        ((TRAIN, "--config", CONFIG, *NODES, *output, "--trainer.max_epoch", "3"), "trainer.max_epoch"),
    ):
        done = slurm.torchx("run", "-s", "slurm", *words, check=False)
        said = [line for line in done.stderr.splitlines() if " INFO " not in line]
        assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: ") and says in said[0], done
    assert slurm.run("squeue", "--noheader", "--states", "all") == slurm.run("sacct", "--noheader", "--allusers") == ""
    assert not (slurm.folder / "refused").exists()


def test_two_nodes_train_as_four_processes_of_one_machine_do(slurm, small_dataset, undisturbed):
    run = slurm.folder / "two-nodes"
    handle = submit(slurm, small_dataset, run)
    assert slurm.wait(handle) == "SUCCEEDED", slurm.said()
    assert lines(run) == lines(undisturbed)
    assert len(lines(run)[0]) > 50 and len(lines(run)[1]) == 1
    assert "step 1 " in slurm.torchx("log", f"{handle}/train")  # of all nodes: which of them has rank 0 is torchrun's choice


def test_the_script_for_sbatch_in_the_documentation_trains_alike(slurm, small_dataset, undisturbed):
    run, text = slurm.folder / "sbatch", (ROOT / "docs" / "launch.md").read_text()
    script = re.search(r"```\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)[1]
    options = f'"--data.path {small_dataset} {" ".join((*SMALL, *OFTEN))}"'
    places = {"processes": 2, "port": free_port(), "python": sys.executable, "config": CONFIG, "output": run}
    for name, value in {**places, "options": options}.items():
        script, count = re.subn(rf"^{name}=.*$", f"{name}={value}", script, flags=re.MULTILINE)
        assert count == 1
    (slurm.folder / "train.sbatch").write_text(script)
    job = slurm.run("sbatch", "--parsable", "--partition=main", "--cpus-per-task=2", "--mem=1000", "train.sbatch").strip()
    slurm.wait(job)
    assert slurm.run("sacct", "-nXo", "State", "--jobs", job).split() == ["COMPLETED"], slurm.said()
    assert lines(run) == lines(undisturbed)


def test_the_smallest_job_ends_well(slurm, small_dataset):
    """One node, and one of the GPUs that it pretends to have."""
    run, small = slurm.folder / "first", dict(zip(SMALL[::2], SMALL[1::2]))
    keys = {**small, "--trainer.max_epochs": "1"}
    words = ("--config", CONFIG, "--gpu", "1", "--cpu", "8", "--output", run, "--", "--data.path", small_dataset)
    handle = slurm.torchx("run", "-s", "slurm", TRAIN, *words, *(word for pair in keys.items() for word in pair)).split()[-1]
    assert slurm.wait(handle) == "SUCCEEDED", slurm.said()
    assert len(lines(run)[1]) == 1


def test_a_job_outlives_its_workers_its_node_and_its_cancellation(slurm, small_dataset, undisturbed):
    run = slurm.folder / "disturbed"
    handle = submit(slurm, small_dataset, run, more=SLOWLY)
    # kill -9 of a worker: torchrun starts all of them again, in the same job.
    assert until(lambda: step_of(run) >= 6), slurm.said()
    assert slurm.status(handle) == "RUNNING"
    workers = slurm.workers(handle)
    assert sorted(values["RANK"] for values in workers.values()) == ["0", "1", "2", "3"]
    assert {values["SLURMD_NODENAME"] for values in workers.values()} == {"n1", "n2"}
    slurm.kill([next(pid for pid, values in workers.items() if values["RANK"] == "3")])
    assert until(lambda: not set(workers) & set(slurm.workers(handle))), slurm.said()
    restarted = step_of(run)
    assert until(lambda: step_of(run) >= restarted + 10), slurm.said()
    assert slurm.run("squeue", "--noheader", "--format", "%r", "--jobs", handle.rpartition("/")[2]).split() == ["None"] * 2
    # kill -9 of all that a node runs: the step fails, and the job is queued again.
    slurm.kill(slurm.processes(handle, "n2"))
    requeued = step_of(run)
    counts = lambda: {values.get("SLURM_RESTART_COUNT") for values in slurm.workers(handle).values()}  # noqa: E731
    assert until(lambda: counts() == {"1"}), slurm.said()
    assert until(lambda: step_of(run) >= requeued + 10), slurm.said()
    # torchx cancel: Slurm sends SIGTERM, and every process saves.
    slurm.torchx("cancel", handle)
    assert slurm.wait(handle) == "CANCELLED", slurm.said()
    saved = json.loads((run / "checkpoints" / "index.json").read_text())
    assert step_of(run) < 120
    # Submitted again it goes on, and ends where the undisturbed run did.
    again = submit(slurm, small_dataset, run, "--resume", "True")
    assert slurm.wait(again) == "SUCCEEDED", slurm.said()
    assert lines(run) == lines(undisturbed), saved
