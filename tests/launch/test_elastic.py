"""`--nnodes 1:2`: a node of two is lost and comes back, and the training goes on by itself with those that are there."""

import json
import time

import pytest

from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.splits import windows
from tests.helpers.elastic import Job, free_port, users_by_epoch

EPOCHS = 4
# 38 steps an epoch on two processes, 75 on one; users in buffers of a rank's own.
SMALL = (
    *("--data.max_sequence_length", 20, "--data.batch_size", 2, "--data.shuffle_buffer", 20, "--table.sharding", "row_wise"),
    *("--model.embedding_dim", 8, "--model.value_dim", 8, "--loss.num_negatives", 10, "--trainer.device", "cpu"),
    *("--trainer.log_every_steps", 1, "--evaluation.every_epochs", 2, "--trainer.max_epochs", EPOCHS),
    *("--trainer.checkpoint_every_steps", 5),
)
# Instead of a node that is silent for 15 s, and a last call of 30.
SOON = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


def until(condition, job, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and None in [node.poll() for node in job.nodes.values()], job.said()
        time.sleep(0.05)


def trained(job, size, count):
    """Whether the last start of the workers has this size, and has made that many steps."""
    found = job.stretches()
    return bool(found) and found[-1].size == size and len(found[-1].steps) >= count


# A minute, and ten as it is submitted: then it waits for a silent node and for more nodes as long as docs/elastic.md says. On a
# real Slurm (make slurm, which .ci/run calls) the same is in test_elastic_slurm.py.
@pytest.mark.slow
@pytest.mark.parametrize("processes, timeouts", [(1, SOON), (2, "")])
def test_a_lost_node_is_gone_on_without_and_joins_again_and_every_user_counts_once(
    small_dataset, tmp_path, processes, timeouts
):
    place = {"nnodes": "1:2", "nproc_per_node": processes, "cpu": processes, "max_restarts": 1}
    job = Job(tmp_path, small_dataset, *SMALL, port=free_port(), timeouts=timeouts, **place)
    try:
        job.start(0)
        job.start(1)
        until(lambda: trained(job, 2 * processes, 8), job)
        job.kill(1)
        until(lambda: trained(job, processes, 3), job)
        job.start(1)
        until(lambda: trained(job, 2 * processes, 3), job)
        job.hurry()
        assert [node.wait(240) for node in job.nodes.values()] == [0, 0], job.said()
    finally:
        job.end()
    found = job.stretches()
    assert [stretch.size for stretch in found] == [2 * processes, processes, 2 * processes]
    # The lost node costs the steps since the last checkpoint; the one that joins costs none.
    assert max(found[0].steps) - min(found[1].steps) < 5 and min(found[2].steps) == max(found[1].steps) + 1
    epochs, trainable = users_by_epoch(found), users(small_dataset)
    assert sorted(epochs) == list(range(EPOCHS))
    assert all(set(seen) == trainable and set(seen.values()) == {1} for seen in epochs.values())
    lines = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, max(found[2].steps) + 1))
    assert [line["epoch"] for line in lines if "split" in line][:2] == [2, 4]


def users(folder):
    dataset = SequenceDataset(folder)
    groups = (windows(dataset.read(group), DataConfig(), "train") for group in dataset.row_groups)
    return {user for found in groups for user in found.user_ids_U.tolist()}
