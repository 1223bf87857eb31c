"""docs/kubernetes.md without TorchX: the rights that are enough, the request as a file, manifests for other controllers."""

import copy
import re
import shlex
import subprocess

import kubernetes_validate
import pytest
import yaml
from torchx.runner import get_runner

from launch import components
from tests.helpers.api_server import ApiServer
from tests.helpers.dryrun import ROOT, dryrun
from tests.helpers.kubectl import torchx, use
from tests.launch.test_manifests import EXAMPLES, KUBERNETES, PREPARE, check

pytestmark = pytest.mark.thorough

TEXT = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = [made for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) for made in yaml.safe_load_all(block)]
OBJECTS = {made["kind"]: made for made in BLOCKS if "kind" in made}  # parts of pods are test_overlay.py's
VERBS = {"POST": "create", "PUT": "update", "DELETE": "delete", "GET": "get"}


def test_the_rights_are_enough_for_every_command_and_each_is_asked_for(here, monkeypatch, capsys):
    """But pods' list and watch, which kubectl wants."""
    kubernetes_validate.validate(OBJECTS["Role"], KUBERNETES, strict=True)
    allowed = {(verb, part) for rule in OBJECTS["Role"]["rules"] for part in rule["resources"] for verb in rule["verbs"]}
    with ApiServer() as server:
        use(server, monkeypatch, here)
        assert torchx(capsys, *shlex.split(PREPARE)[1:])[0] == 0
        ((_, name),) = server.jobs
        server.jobs["ml", name]["status"] = {
            "state": {"phase": "Running"}, "taskStatusCount": {"prepare-0": {"phase": {"Running": 1}}}
        }  # fmt: skip
        server.pods["ml", f"{name}-prepare-0-0"] = "a line\n"
        handle = f"kubernetes://torchx/ml:{name}"
        assert "a line" in torchx(capsys, "log", f"{handle}/prepare/0")[1]
        for words in (["status", handle], ["list", "-s", "kubernetes"], ["cancel", handle], ["delete", handle]):
            assert torchx(capsys, *words)[0] == 0
    needed = set()
    for method, path, _ in server.asked:
        names = path.split("/namespaces/")[1].split("/")[1:]  # jobs, jobs/NAME, jobs/NAME/status
        verb = "list" if method == "GET" and len(names) == 1 else VERBS[method]
        needed.add((verb, "/".join([names[0], *names[2:]])))
    spare = {(verb, part) for verb in ("list", "watch") for part in ("pods", "pods/log")}
    assert needed <= allowed and allowed - needed <= spare, (needed, allowed)


def test_the_printed_request_is_a_file_that_kubectl_could_create(here, capsys):
    (command,) = re.findall(r"\| (sed .*) > job\.yaml", TEXT)
    printed = "=== APPLICATION ===\n{}\n\n=== SCHEDULER REQUEST ===\n" + dryrun(EXAMPLES[0], capsys)[1]
    text = subprocess.run(command, shell=True, input=printed, capture_output=True, text=True, check=True).stdout
    job = yaml.safe_load(text)
    more = yaml.safe_load(re.search(r"```\n(  ttlSecondsAfterFinished.*?)```", TEXT, re.DOTALL)[1])
    job["spec"].update(more)
    check(job)
    assert job["metadata"]["namespace"] == "ml" and more.keys() == {"ttlSecondsAfterFinished", "policies"}


def command_and_pod(nodes, run):
    """What the component makes of the manifests' training, for the last node."""
    more = ("--table.sharding", "row_wise", "--model.embedding_dim", "256") if nodes > 1 else ()
    (config,) = {word for word in shlex.split(EXAMPLES[0]) if word.startswith("configs/")}
    app = components.train(
        "--data.path", "/data/ml-20m", *more, config=config, nnodes=nodes, h="h100x8",
        image="registry.example.com/fuxi-torchrec:0.1", mounts=["type=volume", "src=training", "dst=/data"],
        output=f"/data/runs/{run}", devices={"rdma/ib": "8"} if nodes > 1 else None,
    )  # fmt: skip
    with get_runner() as runner:
        job = yaml.safe_load(str(runner.dryrun(app, "kubernetes", {"queue": "q", "validate_spec": False})))
    pod = job["spec"]["tasks"][-1]["template"]["spec"]
    return pod["containers"][0]["command"][2], pod, job["metadata"]["name"]


def trained_by(kind):
    """The Kubernetes Job (its spec) that a manifest makes, and the host of its first pod."""
    if kind == "Job":
        return copy.deepcopy(OBJECTS[kind]["spec"]), None
    holder = OBJECTS[kind if kind == "JobSet" else "TrainingRuntime"]
    (replicated,) = (holder["spec"] if kind == "JobSet" else holder["spec"]["template"]["spec"])["replicatedJobs"]
    spec = copy.deepcopy(replicated["template"]["spec"])
    if kind == "TrainJob":
        trainer, reference = OBJECTS[kind]["spec"]["trainer"], OBJECTS[kind]["spec"]["runtimeRef"]
        assert (reference["kind"], reference["name"]) == ("TrainingRuntime", holder["metadata"]["name"])
        assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        spec["template"]["spec"]["containers"][0]["command"] = trainer["command"]
        spec["completions"] = spec["parallelism"] = trainer["numNodes"]
    name = OBJECTS[kind]["metadata"]["name"]
    return spec, f"{name}-{replicated['name']}-0-0.{name}"


@pytest.mark.parametrize("kind, nodes, run", [("Job", 1, "ml-20m"), ("JobSet", 16, "ml-20m-16"), ("TrainJob", 16, "ml-20m-16")])
def test_a_plain_manifest_is_valid_and_holds_the_components_command_and_pod(here, kind, nodes, run):
    spec, host = trained_by(kind)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": run}, "spec": spec}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    command, pod, unique = command_and_pod(nodes, run)
    command = command.replace(f"--rdzv-id {unique}", '--rdzv-id "$JOB_UID"')
    if nodes > 1:
        assert spec["completions"] == spec["parallelism"] == nodes
        command = command.replace('"${VC_TRAIN_0_HOSTS:=localhost}:29500"', f"{host}:29500")
        command = command.replace(f"is_host=$(({nodes - 1} == 0))", "is_host=$((JOB_COMPLETION_INDEX == 0))")
    mine, (container,), (made,) = spec["template"]["spec"], spec["template"]["spec"]["containers"], pod["containers"]
    assert container["command"] == ["bash", "-c", command] and container["image"] == made["image"]
    for key in ("restartPolicy", "terminationGracePeriodSeconds"):
        assert mine[key] == pod[key]
    given = {item["name"]: item.get("value") for item in container["env"]}
    assert given.pop("JOB_UID", "") is None
    assert given == {item["name"]: item["value"] for item in made["env"] if not item["name"].startswith("TORCHX_")}
    amounts = {kind: {name: str(n) for name, n in made["resources"][kind].items()} for kind in ("limits", "requests")}
    amounts["limits"]["cpu"] = "96"
    assert {kind: {name: str(n) for name, n in container["resources"][kind].items()} for kind in amounts} == amounts
    assert volumes(mine) == volumes(pod)


def volumes(pod):
    """What lies where, whatever the volumes are called."""
    lies = {volume["name"]: {key: value for key, value in volume.items() if key != "name"} for volume in pod["volumes"]}
    return {mount["mountPath"]: lies[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
