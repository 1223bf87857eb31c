"""What goes to Kubernetes: Volcano jobs of the documented examples, against the schemas of pods and of Volcano's Job."""

import copy
import subprocess
import sysconfig
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helpers.dryrun import ROOT, documented, dryrun

pytestmark = pytest.mark.thorough

KUBERNETES = "1.34"
NAME = {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 0}
EVENTS = ["*", "PodPending", "PodRunning", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "TaskFailed"]
ACTIONS = ["AbortJob", "RestartJob", "RestartTask", "RestartPod", "TerminateJob", "CompleteJob", "ResumeJob"]
POLICIES = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["event", "action"],
        "properties": {"event": {"enum": EVENTS}, "action": {"enum": ACTIONS}, "timeout": {"type": "string"}},
    },
}
# The fields of a Volcano job that the API server takes, as its resource definition (batch.volcano.sh/v1alpha1) has them; a
# pod's are kubernetes_validate's.
VOLCANO_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "batch.volcano.sh/v1alpha1"},
        "kind": {"const": "Job"},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": NAME}},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["schedulerName", "queue", "tasks"],
            "properties": {
                "schedulerName": {"const": "volcano"},
                "queue": NAME,
                "priorityClassName": NAME,
                "minAvailable": COUNT,
                "maxRetry": COUNT,
                "ttlSecondsAfterFinished": COUNT,
                "policies": POLICIES,
                "plugins": {"additionalProperties": {"type": "array", "items": {"type": "string"}}},
                "tasks": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "replicas", "template"],
                        "properties": {
                            "name": NAME,
                            "replicas": COUNT,
                            "minAvailable": COUNT,
                            "maxRetry": COUNT,
                            "policies": POLICIES,
                            "template": {"type": "object", "required": ["metadata", "spec"]},
                        },
                    },
                },
            },
        },
    },
}
EXAMPLES = documented("kubernetes")
PREPARE = (
    'torchx run -s kubernetes --workspace "" -cfg queue=research,namespace=ml launch/components.py:prepare -h cpu --image i:1 '
    "--mounts type=volume,src=training,dst=/data synthetic --users 100 --items 50 --events-per-user 20 --output /data/made"
)
EVALUATE = (
    'torchx run -s kubernetes --workspace "" -cfg queue=research,namespace=ml launch/components.py:evaluate --run /data/runs/a '
    "-h h100x8 --image i:1 --mounts type=volume,src=training,dst=/data --max_retries 0"
)


def check(manifest):
    """Raises where an API server with Volcano would refuse the manifest."""
    jsonschema.validate(manifest, VOLCANO_JOB)
    for task in manifest["spec"]["tasks"]:
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(task["template"])}
        pod["metadata"]["name"] = f"{manifest['metadata']['name']}-{task['name']}-0"
        jsonschema.validate(pod["metadata"]["name"], NAME)
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        for container in pod["spec"]["containers"]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            names = [mount["name"] for mount in container["volumeMounts"]]
            volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
            assert len(set(paths)) == len(paths) and sorted(names) == sorted(volumes) == sorted(set(volumes))


@pytest.mark.parametrize("command", [*EXAMPLES, PREPARE, EVALUATE], ids=["claim", "bucket", "prepare", "evaluate"])
def test_an_api_server_would_take_it(here, capsys, command):
    check(yaml.safe_load(dryrun(command, capsys)[1]))


def test_a_wrong_field_a_wrong_name_and_a_second_mount_are_noticed(here, capsys):
    manifest = yaml.safe_load(dryrun(EXAMPLES[0], capsys)[1])
    task = manifest["spec"]["tasks"][0]
    container = task["template"]["spec"]["containers"][0]
    for place, key, value in (
        (manifest["spec"], "maxRetries", 1),
        (task, "name", "Train_0"),
        (container, "imagePullPolice", "Always"),
        (container["volumeMounts"][1], "mountPath", "/dev/shm"),
    ):
        before = place.get(key)
        place[key] = value
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)):
            check(manifest)
        place.pop(key) if before is None else place.update({key: before})
    check(manifest)


def test_sixteen_nodes_are_sixteen_pods_that_meet_at_the_first(here, capsys):
    manifest = yaml.safe_load(dryrun(EXAMPLES[0], capsys)[1])
    tasks = manifest["spec"]["tasks"]
    assert [task["name"] for task in tasks] == [f"train-{node}" for node in range(16)]
    assert manifest["spec"]["queue"] == "research" and manifest["spec"]["maxRetry"] == 2
    for node, task in enumerate(tasks):
        assert task["replicas"] == 1 and {"event": "PodFailed", "action": "RestartJob"} in task["policies"]
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        # Volcano's plugin svc names the pods of a task in a variable of all the others; the first one is its own host.
        address = "TORCHX_RANK0_HOST:=localhost" if node == 0 else "VC_TRAIN_0_HOSTS:=localhost"
        script = container["command"][2]
        assert f'"${{{address}}}:29500"' in script and f"is_host=$(({node} == 0))" in script
        assert "--nnodes 16 --nproc-per-node 8" in script and script.startswith("exec python ")
        assert manifest["spec"]["plugins"].keys() == {"svc", "env"}
        assert container["ports"] == [{"containerPort": 29500, "name": "c10d"}]
        limits = container["resources"]["limits"]
        assert limits == {"cpu": "96000m", "memory": "960000M", "nvidia.com/gpu": "8", "rdma/ib": "8"}
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert environment["OMP_NUM_THREADS"] == "12" and environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        assert volumes[mounts["/data"]] == {"persistentVolumeClaim": {"claimName": "training"}}
        assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory"}} and len(volumes) == 2
        assert pod["terminationGracePeriodSeconds"] == 120 and pod["restartPolicy"] == "Never"


def test_the_dockerfile_has_no_lint():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
