"""Jobs on a cluster with Volcano: refused, accepted, trained alike, healed, cancelled, resumed. `make kubernetes`.

docs/kubernetes.md says how to name the cluster, and which rights it takes.
"""

import json
import os
import re
import shlex

import pytest
from kubernetes.client.rest import ApiException

from tests.helpers.dryrun import documented
from tests.helpers.kubernetes_cluster import Cluster, until, words

pytestmark = pytest.mark.kubernetes
CONFIG = "configs/smoke/fuxi-beta.yaml"
NO_IMAGE = "registry.invalid/fuxi-torchrec:none"
# A table cut over both processes, 150 users in steps of 8.
SMALL = (
    *("--data.max_sequence_length", "20", "--data.batch_size", "4", "--data.shuffle_buffer", "20"),
    *("--model.embedding_dim", "8", "--model.value_dim", "8", "--loss.num_negatives", "10"),
    *("--table.sharding", "row_wise", "--trainer.device", "cpu", "--trainer.log_every_steps", "1"),
    *("--evaluation.every_epochs", "2", "--trainer.max_epochs", "6"),
)
# Slower, so that a pod can be deleted while the job is at work; it changes no loss.
SLOWLY = ("--trainer.checkpoint_every_steps", "1")
OFTEN = ("--trainer.checkpoint_every_steps", "4")
# Two processes with a core each, on one node or on two, where another job may hold a port of the node.
TOGETHER = ("--nproc_per_node", "2", "--cpu", "2", "--memMB", "4000")
PORT = str(20000 + os.getpid() % 10000)
APART = ("--nnodes", "2", "--nproc_per_node", "1", "--cpu", "1", "--memMB", "3000", "--rdzv_port", PORT)


@pytest.fixture(scope="module")
def cluster():
    reached = Cluster()
    yield reached
    reached.clean()


@pytest.fixture(scope="module")
def place(cluster):
    """The options that put a component into FUXI_IMAGE with the claim FUXI_CLAIM at /data."""
    image, claim = os.environ.get("FUXI_IMAGE"), os.environ.get("FUXI_CLAIM")
    if not image or not claim:
        pytest.skip("FUXI_IMAGE and FUXI_CLAIM name no image and no claim that many pods may write")
    yield ("--image", image, "--mounts", f"type=volume,src={claim},dst=/data")
    cluster.clean()
    cluster.alone(image, claim, "rm", "-rf", f"/data/{cluster.prefix}")


@pytest.fixture(scope="module")
def data(cluster, place):
    """The folder of a data set that a job has prepared on the claim."""
    folder = f"/data/{cluster.prefix}/{cluster.prefix}-data"
    numbers = ("--users", "150", "--items", "60", "--events-per-user", "20", "--output", folder)
    handle = cluster.submit("prepare", "--cpu", "1", "--memMB", "3000", *place, "--", "synthetic", *numbers)
    assert cluster.wait(handle) == "SUCCEEDED", cluster.said(handle)
    return folder


@pytest.fixture(scope="module")
def train(cluster, place, data):
    """Submits a training into a run folder of this name; gives its handle."""

    def submit(name, *options, more=OFTEN):
        run = f"/data/{cluster.prefix}/{cluster.prefix}-{name}"
        arguments = ("--config", CONFIG, *place, "--output", run, *options, "--", "--data.path", data, *SMALL, *more)
        return cluster.submit("train", *arguments)

    return submit


@pytest.fixture(scope="module")
def lines(cluster, place):
    """Reads (step, loss) of every training line, and the final metrics, of the run of this name."""

    def read(name):
        run = f"/data/{cluster.prefix}/{cluster.prefix}-{name}"
        text = cluster.alone(place[1], os.environ["FUXI_CLAIM"], "cat", f"{run}/metrics.jsonl")
        found = [json.loads(line) for line in text.splitlines() if line]
        losses = {line["step"]: line["loss"] for line in found if "loss" in line}
        return losses, [{**line, "seconds": 0} for line in found if line.get("checkpoint") == "best"]

    return read


@pytest.fixture(scope="module")
def undisturbed(cluster, train, lines):
    """The metrics of the same training by two processes of one pod."""
    handle = train("together", *TOGETHER)
    assert cluster.wait(handle) == "SUCCEEDED", cluster.said(handle)
    found = lines("together")
    assert len(found[0]) > 50 and len(found[1]) == 1
    return found


def waiting(cluster, name):
    """The arguments of a training whose pods wait for ever, for an image and a claim that are not there."""
    output = ("--output", f"/data/{cluster.prefix}-{name}", "--", "--data.path", "/data/none")
    return ("--config", CONFIG, "--image", NO_IMAGE, *APART, "--mounts", "type=volume,src=none,dst=/data", *output)


def step_of(cluster, handle):
    """The last step that one of the job's pods has printed."""
    said = "".join(cluster.log(pod.metadata.name) for pod in cluster.pods_of(handle))
    return max(map(int, re.findall(r"\bstep (\d+) ", said)), default=0)


@pytest.mark.parametrize("command", documented("kubernetes"))
def test_the_server_takes_every_documented_job_whole(cluster, command):
    arguments = shlex.split(command)[2:]
    place = arguments.index("-cfg") + 1
    given = dict(item.split("=", 1) for item in arguments[place].split(","))
    here = {**given, "queue": cluster.queue, "namespace": cluster.namespace}
    arguments[place] = ",".join(f"{key}={value}" for key, value in here.items())
    try:
        assert cluster.accepts(cluster.request(*arguments)) == []
    except ApiException as error:
        pytest.fail(words(error))


def test_a_wrong_namespace_or_queue_is_told_in_the_servers_words(cluster):
    job = ("launch/components.py:train", *waiting(cluster, "refused"))
    said = cluster.refused(*cluster.options(namespace=f"{cluster.prefix}-nowhere"), *job)
    # Without the right to look, the server says that much.
    assert f'namespaces "{cluster.prefix}-nowhere" not found' in said or f'in the namespace "{cluster.prefix}-nowhere"' in said
    said = cluster.refused(*cluster.options(queue=f"{cluster.prefix}-nobody"), *job)
    assert not cluster.jobs() or said is None
    if said is None:
        pytest.skip("this cluster's Volcano takes jobs of any queue: its admission is not installed")
    assert f"{cluster.prefix}-nobody" in said


def test_a_job_is_seen_cancelled_and_deleted(cluster):
    handle = cluster.submit("train", *waiting(cluster, "waits"))
    assert cluster.listed(handle)
    assert until(lambda: cluster.status(handle) == "PENDING", seconds=120), cluster.said(handle)
    cluster.torchx("cancel", handle)
    assert until(lambda: cluster.status(handle) == "CANCELLED", seconds=120), cluster.said(handle)
    assert until(lambda: not cluster.pods_of(handle), seconds=300), cluster.said(handle)
    assert cluster.listed(handle)
    cluster.torchx("delete", handle)
    assert until(lambda: not cluster.listed(handle), seconds=120)


def test_two_nodes_train_as_two_processes_of_one_pod_do(cluster, train, lines, undisturbed):
    handle = train("apart", *APART)
    assert cluster.wait(handle) == "SUCCEEDED", cluster.said(handle)
    assert lines("apart") == undisturbed
    assert "step 1 " in "".join(cluster.torchx("log", f"{handle}/train/{number}") for number in (0, 1))


def test_a_job_goes_on_after_one_of_its_pods_was_deleted(cluster, train, lines, undisturbed):
    handle = train("deleted", *APART, more=SLOWLY)
    assert until(lambda: step_of(cluster, handle) >= 6), cluster.said(handle)
    second = next(pod for pod in cluster.pods_of(handle) if "-train-1-" in pod.metadata.name)
    cluster.pods.delete_namespaced_pod(second.metadata.name, cluster.namespace)
    assert cluster.wait(handle) == "SUCCEEDED", cluster.said(handle)
    assert cluster.job(handle)["status"]["retryCount"] == 1
    assert second.metadata.uid not in [pod.metadata.uid for pod in cluster.pods_of(handle)]
    assert lines("deleted") == undisturbed


def test_a_cancelled_job_goes_on_by_the_same_command(cluster, train, lines, undisturbed):
    handle = train("cancelled", *APART, more=SLOWLY)
    assert until(lambda: step_of(cluster, handle) >= 6), cluster.said(handle)
    cluster.torchx("cancel", handle)
    assert until(lambda: cluster.status(handle) == "CANCELLED", seconds=120), cluster.said(handle)
    assert until(lambda: not [pod for pod in cluster.pods_of(handle) if pod.status.phase == "Running"]), cluster.said(handle)
    stopped, _ = lines("cancelled")
    assert 0 < len(stopped) < len(undisturbed[0])
    again = train("cancelled", *APART, more=SLOWLY)
    assert again != handle
    assert cluster.wait(again) == "SUCCEEDED", cluster.said(again)
    assert lines("cancelled") == undisturbed
