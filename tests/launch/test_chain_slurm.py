"""Chains on a real Slurm of two nodes: each job starts after the one before it, and none waits for what has failed."""

import sys

import pytest

from tests.helpers.chains import lines, write_chain
from tests.helpers.slurm import Slurm, until

pytestmark = pytest.mark.slurm
TWO_NODES = "--nnodes 2 --cpu 1"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.down()


def chain(slurm, path, check=True):
    """What `python -m launch.chain -s slurm` says, and the jobs that it has submitted, as {step: handle}."""
    done = slurm.run(sys.executable, "-m", "launch.chain", "-s", "slurm", path, check=False, timeout=120)
    assert not check or done.returncode == 0, done
    words = [line.split() for line in done.stdout.splitlines()]
    return done, {pair[0]: pair[1] for pair in words if len(pair) == 2 and pair[1].startswith("slurm://")}


def states(slurm, handles):
    """Every job's state as Slurm's accounting has it, of all parts of a job of several nodes."""
    jobs = ",".join(handle.rpartition("/")[2] for handle in handles.values())
    said = slurm.run("sacct", "--noheader", "--allocations", "--parsable2", "--format", "JobName,State", "--jobs", jobs)
    return {line.split("|")[0]: line.split("|")[1].split()[0] for line in said.splitlines()}


def test_a_chain_over_two_nodes_comes_to_its_end_and_nothing_is_left_to_do(slurm):
    path = write_chain(slurm.folder, before=TWO_NODES)
    _, handles = chain(slurm, path)
    assert list(handles) == ["prepare", "train", "evaluate"]
    again, _ = chain(slurm, path, check=False)
    assert again.returncode == 75 and "nothing was submitted" in again.stderr and len(again.stderr.splitlines()) == 1
    assert slurm.wait(handles["evaluate"], timeout=500) == "SUCCEEDED", slurm.said()
    assert set(states(slurm, handles).values()) == {"COMPLETED"}
    assert set(states(slurm, handles)) == {"prepare-0", "train-0", "train-1", "evaluate-0"}
    losses, evaluations = lines(slurm.folder / "runs" / "made")
    assert len(losses) > 4 and len(evaluations) == 1
    again, more = chain(slurm, path)
    assert more == {} and again.stdout.splitlines()[-1] == "nothing is left to do"


def test_a_chain_whose_prepare_fails_leaves_no_job_behind(slurm):
    (slurm.folder / "log.csv").write_text("user,item,time\n1,2,not a number\n")
    events = "events --source log.csv --user-column user --item-column item --time-column time --output data/none"
    path = write_chain(slurm.folder, prepare=events, before=TWO_NODES, run="runs/none")
    _, handles = chain(slurm, path)
    assert until(lambda: not slurm.run("squeue", "--noheader", "--states", "PENDING,RUNNING").strip(), 120), slurm.said()
    found = states(slurm, handles)
    assert found.pop("prepare-0") == "FAILED" and set(found.values()) == {"CANCELLED"}, found
    assert lines(slurm.folder / "runs" / "none") == ([], [])
