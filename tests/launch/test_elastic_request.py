"""What an elastic job asks of Slurm: an array of one-node jobs, and what its script does in each case."""

import os
import subprocess

import pytest
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest
from torchx.specs import AppState, macros

from launch import components
from launch.slurm import ArrayRequest, create_scheduler
from tests.helpers.command_line import SMOKE


def request(nnodes, monkeypatch, **cfg):
    monkeypatch.setattr("torchx.schedulers.slurm_scheduler.version", lambda: (24, 11))
    app = components.train("--data.path", "data/ml-1m", config=SMOKE, nnodes=nnodes, h="h100x8", output="it's")
    app.roles[0].env["TORCHX_JOB_ID"] = f"slurm://test/{macros.app_id}"  # as TorchX's runner does
    return create_scheduler("test").submit_dryrun(app, {"partition": "gpu", **cfg}).request


def test_a_range_of_nodes_is_an_array_and_one_number_is_what_torchx_makes_of_it(here, monkeypatch):
    made = request("2:16", monkeypatch, qos="low")
    assert isinstance(made, ArrayRequest)
    options = next(line for line in made.materialize().splitlines() if line.startswith("#SBATCH")).split()
    assert {"--array=0-15", "--nodes=1", "--requeue", "--partition=gpu", "--qos=low", "--gpus-per-node=8"} <= set(options)
    assert "--nnodes 2:16 " in made.materialize() and "hetjob" not in made.materialize()
    assert type(request(16, monkeypatch)) is type(request("16", monkeypatch)) is SlurmBatchRequest


@pytest.fixture
def element(here, monkeypatch, tmp_path):
    """run(number, squeue, srun, restarts) -> the commands that an element of the array 12 gives Slurm, and its exit code.
    squeue: what it says of element 0, time after time; srun: its exit code."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "script").write_text(request("1:2", monkeypatch).materialize())

    def run(number, squeue=(), srun=0, restarts=0):
        (tmp_path / "said").write_text("")
        (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in squeue))
        told = f'echo "$(basename "$0") $* at $FIRST_NODE" >> {tmp_path}/said'
        answer = f"head -n 1 {tmp_path}/answers; sed -i 1d {tmp_path}/answers"
        bodies = {"squeue": answer, "sleep": "", "srun": f"{told}; exit {srun}", "scontrol": told, "scancel": told}
        for name, body in bodies.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        names = {"SLURM_ARRAY_JOB_ID": 12, "SLURM_ARRAY_TASK_ID": number, "SLURM_JOB_ID": 12 + (1 - number)}
        names.update(SLURMD_NODENAME=f"n{number}", SLURM_RESTART_COUNT=restarts, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        done = subprocess.run(["bash", tmp_path / "script"], env=environment, timeout=60, check=False)
        return (tmp_path / "said").read_text().splitlines(), done.returncode

    return run


def test_elements_meet_where_element_0_runs(element):
    (srun, _), code = element(0)
    assert srun.startswith("srun ") and srun.endswith(" at n0") and code == 0
    assert "--rdzv-id 12 " in srun and "$(($SLURM_ARRAY_TASK_ID == 0))" in srun and "TORCHX_JOB_ID=slurm://test/12" in srun
    (srun, _), code = element(1, squeue=["PENDING", "", "COMPLETING n3", "RUNNING n7"])
    assert srun.startswith("srun ") and srun.endswith(" at n7") and code == 0


def test_an_element_that_comes_after_the_end_does_nothing(element):
    assert element(1, squeue=["COMPLETED n7"]) == ([], 0)


def test_an_element_that_waits_in_vain_or_fails_is_requeued_alone_as_often_as_asked(element):
    assert element(1) == (["scontrol requeue 12_1 at "], 1)
    for number in (0, 1):  # one of them has the array's own number as its job's
        said, code = element(number, squeue=["RUNNING n7"], srun=3)
        assert said[1].startswith(f"scontrol requeue 12_{number} ") and len(said) == 2 and code == 3
    said, code = element(1, squeue=["RUNNING n7"], srun=3, restarts=1)
    assert len(said) == 1 and code == 3


def test_whoever_ends_first_cancels_elements_that_wait_for_a_node(element):
    said, code = element(1, squeue=["RUNNING n7"])
    assert said[1].startswith("scancel --state=PENDING 12 ") and code == 0


STATES = {
    "RUNNING": ({0: "RUNNING", 1: "PENDING"}, AppState.RUNNING),
    "waiting": ({0: "REQUEUED", 1: "PENDING"}, AppState.PENDING),
    "over": ({0: "COMPLETED", 1: "CANCELLED by 0"}, AppState.SUCCEEDED),
    "cancelled": ({0: "CANCELLED by 0", 1: "CANCELLED"}, AppState.CANCELLED),
    "failed": ({0: "FAILED", 1: "FAILED"}, AppState.FAILED),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("accounting", [True, False])
def test_the_state_of_a_job_is_that_of_its_elements_together(monkeypatch, case, accounting):
    states, together = STATES[case]

    def said(command):
        if command[0] == "sacct":
            return [f"12_{index}|{state}" for index, state in states.items()] if accounting else []
        kept = [] if accounting else states  # squeue forgets jobs that are over
        return ["train"] if "%j" in command else [f"12_{index}|{states[index]}" for index in kept]

    monkeypatch.setattr("launch.slurm._lines", said)
    found = create_scheduler("test").describe("12")
    assert found.state == together
    assert [replica.id for replica in found.roles_statuses[0].replicas] == sorted(states)
