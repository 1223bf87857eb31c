"""`--nnodes 1:2` on a real Slurm of two nodes: a node dies, the job goes on without it, and Slurm has it join again."""

import json

import pytest

from tests.helpers.elastic import free_port
from tests.helpers.slurm import ROOT, Slurm, until

pytestmark = pytest.mark.slurm
CONFIG = f"{ROOT}/configs/smoke/fuxi-beta.yaml"
# Longer than any of these tests; a save a step makes it slow.
SMALL = (
    *("--data.max_sequence_length", "20", "--data.batch_size", "4", "--data.shuffle_buffer", "20"),
    *("--model.embedding_dim", "8", "--model.value_dim", "8", "--loss.num_negatives", "10"),
    *("--table.sharding", "row_wise", "--trainer.device", "cpu", "--trainer.log_every_steps", "1"),
    *("--evaluation.every_epochs", "1000", "--trainer.checkpoint_every_steps", "1"),
)
NODES = ("--nnodes", "1:2", "--nproc_per_node", "2", "--cpu", "2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.down()


def submit(slurm, data, run, epochs, *options):
    place = (*NODES, "--rdzv_port", free_port())  # both nodes are this machine
    words = ("--config", CONFIG, *place, "--output", run, *options, "--", "--data.path", data, *SMALL)
    words += ("--trainer.max_epochs", str(epochs))
    return slurm.torchx("run", "-s", "slurm", f"{ROOT}/launch/components.py:train", *words).split()[-1]


def steps(run):
    file = run / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [line["step"] for line in found if "loss" in line]


def width(slurm, handle):
    """The processes that train, by what each was told of their number; and Slurm's count of its node's starts."""
    names = {"WORLD_SIZE": None, "SLURMD_NODENAME": None, "SLURM_RESTART_COUNT": "0"}
    workers = slurm.workers(handle).values()
    return sorted(tuple(values.get(name, default) for name, default in names.items()) for values in workers)


def goes_on(slurm, run, count=5):
    before = max(steps(run), default=0)
    return until(lambda: max(steps(run), default=0) >= before + count, timeout=180)


def node_of(slurm, handle, element):
    return slurm.run("squeue", "-h", "-o", "%N", "--jobs", f"{handle.rpartition('/')[2]}_{element}").strip()


def test_the_loss_of_a_node_is_survived_and_slurm_has_it_join_again(slurm, small_dataset):
    run = slurm.folder / "elastic"
    handle = submit(slurm, small_dataset, run, 100000)
    both = [("4", "n1", "0")] * 2 + [("4", "n2", "0")] * 2
    assert goes_on(slurm, run) and width(slurm, handle) == both, slurm.said()
    first, other = (node_of(slurm, handle, element) for element in (0, 1))
    slurm.lose(other)
    assert until(lambda: width(slurm, handle) == [("2", first, "0")] * 2, timeout=180), slurm.said()
    assert goes_on(slurm, run), slurm.said()
    assert slurm.status(handle) == "RUNNING"
    slurm.bring_back(other)
    wanted = sorted([("4", first, "0")] * 2 + [("4", other, "1")] * 2)
    assert until(lambda: width(slurm, handle) == wanted, timeout=240), slurm.said()
    assert goes_on(slurm, run), slurm.said()
    slurm.torchx("cancel", handle)
    assert slurm.wait(handle) == "CANCELLED", slurm.said()
    made = steps(run)
    assert made == list(range(1, len(made) + 1))
    # Submitted again, to the end of the next epoch.
    epoch = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] + 1
    again = submit(slurm, small_dataset, run, epoch, "--resume", "True")
    assert slurm.wait(again) == "SUCCEEDED", slurm.said()
    made = steps(run)
    assert made == list(range(1, len(made) + 1))


def test_without_the_node_where_all_meet_all_start_again(slurm, small_dataset):
    run = slurm.folder / "first-lost"
    handle = submit(slurm, small_dataset, run, 100000)
    assert goes_on(slurm, run) and len(width(slurm, handle)) == 4, slurm.said()
    first = node_of(slurm, handle, 0)
    slurm.lose(first)
    assert until(lambda: not slurm.workers(handle), timeout=180), slurm.said()
    slurm.bring_back(first)
    wanted = [("4", "n1", "1")] * 2 + [("4", "n2", "1")] * 2
    assert until(lambda: width(slurm, handle) == wanted, timeout=240), slurm.said()
    assert goes_on(slurm, run), slurm.said()
    slurm.torchx("cancel", handle)
    slurm.wait(handle)
    made = steps(run)
    assert made == list(range(1, len(made) + 1))
