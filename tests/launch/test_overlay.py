"""What a user's file adds to a pod: laid over the job's own pods, and refused in one line where no pod could have it."""

import re

import kubernetes_validate
import pytest
import yaml

from fuxi_torchrec.errors import UserError
from launch.place import Place
from tests.helpers.dryrun import ROOT, dryrun, refused

IMAGE = "registry.example.com/fuxi-torchrec:0.1"
TRAIN = (
    f'torchx run -s kubernetes --workspace "" -cfg queue=q,namespace=ml launch/components.py:train --nnodes 2 --image {IMAGE} '
    "--config configs/smoke/fuxi-beta.yaml --mounts type=volume,src=training,dst=/data --output /data/run "
    "--metadata kubernetes=pod.yaml -- --data.path /data/ml-1m"
)
PAGE = (ROOT / "docs" / "kubernetes.md").read_text().partition("\n## How do I set other fields of the pods?\n")[2]
DOCUMENTED = re.findall(r"```yaml\n(.*?)```", PAGE.partition("\n## ")[0], re.DOTALL)


def pods(text, here, capsys):
    """The pod templates of a job of two nodes with this file, each as an API server would take it."""
    (here / "pod.yaml").write_text(text)
    manifest = yaml.safe_load(dryrun(TRAIN, capsys)[1])
    templates = [task["template"] for task in manifest["spec"]["tasks"]]
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "pod"}}
        kubernetes_validate.validate(pod, "1.34", strict=True)
    return templates


def test_the_page_shows_five_files():
    assert len(DOCUMENTED) == 5


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(DOCUMENTED)))
def test_a_documented_file_is_in_every_pod(here, capsys, number):
    wanted = yaml.safe_load(DOCUMENTED[number])
    wanted = wanted.get("V1Pod", wanted)
    for template in pods(DOCUMENTED[number], here, capsys):
        spec = template["spec"]
        (container,) = spec["containers"]
        assert container["command"][0] == "bash" and {"name": "mount-0"}.items() <= spec["volumes"][1].items()
        assert spec["terminationGracePeriodSeconds"] == wanted["spec"].get("terminationGracePeriodSeconds", 120)
        for key, value in wanted["spec"].items():
            if key == "__join__:containers:image":
                assert value[0].items() <= container.items()
            elif key == "__join__:volumes:name":
                assert value[0] == spec["volumes"][0]
            elif key.startswith("__del__"):
                assert key.rpartition(":")[2] not in spec
            else:
                assert spec[key.removeprefix("__put__:")] == value
        assert wanted.get("metadata", {}).get("labels", {}).items() <= template["metadata"]["labels"].items()


SAME = "spec:\n  nodeSelector: {pool: a}\n  hostNetwork: true\n"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "text",
    [
        SAME,
        "V1Pod:\n  " + SAME.replace("\n", "\n  "),
        "apiVersion: v1\nkind: Pod\n" + SAME,
        '{"spec": {"nodeSelector": {"pool": "a"}, "hostNetwork": true}}',
    ],
)
def test_every_form_of_a_file_says_the_same(here, capsys, text):
    for template in pods(text, here, capsys):
        spec = template["spec"]
        assert (spec["nodeSelector"], spec["hostNetwork"]) == ({"pool": "a"}, True)
        assert spec["terminationGracePeriodSeconds"] == 120


@pytest.mark.thorough
def test_lists_are_added_to_or_replaced_as_the_file_says(here, capsys):
    added = "spec:\n  volumes:\n  - {name: scratch, emptyDir: {}}\n"
    assert [v["name"] for v in pods(added, here, capsys)[0]["spec"]["volumes"]] == ["dshm", "mount-0", "scratch"]
    claim = "{name: mount-0, persistentVolumeClaim: {claimName: training}}"
    for key in ("__put__:volumes:", "volumes: !!python/tuple"):  # TorchX's operator, and its older tag
        text = f"spec:\n  {key}\n  - {{name: dshm, emptyDir: {{}}}}\n  - {claim}\n"
        assert pods(text, here, capsys)[1]["spec"]["volumes"][0] == {"name": "dshm", "emptyDir": {}}


JOINED = f"spec:\n  __join__:containers:image:\n  - image: {IMAGE}\n    "
FAULTS = {
    "a field no pod has": (
        "spec:\n  nodeSelecter: {a: b}\n", "spec.nodeSelecter: there is no such field; did you mean nodeSelector?"),
    "a field as Python writes it": ("spec:\n  node_selector: {a: b}\n", "did you mean nodeSelector?"),
    "a field far from any": ("spec:\n  xyz: 1\n", "spec.xyz: there is no such field"),
    "a top that no pod has": ("sepc: {}\n", "sepc: there is no such field; did you mean spec?"),
    "a field within a list": ("spec:\n  tolerations: [{key: a}, {operater: b}]\n", "spec.tolerations[1].operater: "),
    "a field within an operator": (JOINED + "imagePullPolice: Always\n", "spec.containers[0].imagePullPolice: "),
    "an operator on no field": ("spec:\n  __del__:nodeSelecter:\n", "spec.nodeSelecter: there is no such field"),
    "no such operator": ("spec:\n  __add__:volumes: []\n", "__add__:volumes: there is no such operator"),
    "a join by nothing": ("spec:\n  __join__:containers: []\n", "there is no such operator"),
    "an operator in a list": (JOINED + "__put__:env: []\n", "write env plainly"),
    "an operator on what is not there": ("spec:\n  affinity: {__put__:podAffinity: {}}\n", "write podAffinity plainly"),
    "a field twice": ("spec:\n  volumes: []\n  __put__:volumes: []\n", "spec.volumes: stands there twice"),
    "a key twice": ("spec: {}\nspec: {}\n", "spec stands there twice"),
    "a word for a mapping": ("spec:\n  nodeSelector: gpu\n", "spec.nodeSelector: must hold keys and values, not 'gpu'"),
    "a mapping for a list": ("spec:\n  tolerations: {key: a}\n", "spec.tolerations: must be a list"),
    "a number for a text": ("spec:\n  nodeSelector: {a: 1}\n", "spec.nodeSelector.a: must be text, in quotes, not 1"),
    "a text for a number": ("spec:\n  priority: high\n", "spec.priority: must be a whole number, not 'high'"),
    "a truth for a number": ("spec:\n  priority: true\n", "spec.priority: must be a whole number, not True"),
    "a text for a truth": ("spec:\n  hostNetwork: 'yes'\n", "spec.hostNetwork: must be true or false"),
    "no value": ("spec:\n  nodeSelector:\n", "spec.nodeSelector: has no value"),
    "a key that is no text": ("spec:\n  1: a\n", "spec.1: a key must be text"),
    "both forms at once": ("V1Pod: {}\nspec: {}\n", "spec: must stand within V1Pod"),
    "an empty V1Pod": ("V1Pod:\n", "the file has no value"),
    "a status": ("status: {phase: Running}\n", "status: it is the cluster's to write"),
    "another kind": ("kind: Deployment\nspec: {}\n", "kind: must be Pod"),
    "a list": ("- spec\n", "and here is list"),
    "nothing": ("", "and here is nothing"),
    "no YAML": ("spec: [\n", "not YAML"),
    "no text": (b"\xff\xfe\x00", "not YAML"),
    "two documents": ("spec: {}\n---\nspec: {}\n", "not YAML"),
    "another image": ("spec:\n  __join__:containers:image: [{image: other}]\n", "the job has no such image; its own is"),
    "a join by name": ("spec:\n  __join__:containers:name: [{name: train-0, tty: true}]\n", "write __join__:containers:image"),
    "a container twice": ("spec:\n  containers: [{name: train-0, image: i}]\n", "train-0 is there already"),
    "a volume twice": ("spec:\n  volumes: [{name: dshm, emptyDir: {}}]\n", "change it by __join__:volumes:name"),
    "no container": ("spec:\n  __put__:containers: [{name: a, image: b}]\n", "takes the job's own container away"),
    "no containers": ("spec:\n  __del__:containers:\n", "takes away what every pod needs"),
    "no spec": ("__put__:spec: {nodeSelector: {}}\n", "takes away what every pod needs"),
    "no labels": ("__del__:metadata:\n", "metadata.labels: takes away what every pod needs"),
    "another command": (JOINED + "command: [sleep]\n", "command: takes the job's own words away"),
    "another environment": (JOINED + "env: [{name: A, value: b}]\n", "NCCL_DEBUG away; add variables by --env"),
    "other mounts": (JOINED + "volumeMounts: [{name: dshm, mountPath: /dev/shm}]\n", "takes the job's own /data away"),
    "other limits": (JOINED + "resources: {limits: {memory: 1Gi}}\n", "takes the job's own cpu away"),
    "volumes that mounts need": ("spec:\n  __put__:volumes: []\n", "dshm is missing, which /dev/shm needs"),
    "a mount of no volume": (
        "spec:\n  initContainers: [{name: a, image: b, volumeMounts: [{name: c, mountPath: /c}]}]\n", "c is missing"),
    "what must be there": ("spec:\n  volumes: [{emptyDir: {}}]\n", "spec.volumes[2].name: is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_no_pod_can_have_is_one_line_with_its_place(tmp_path, fault):
    text, says = FAULTS[fault]
    path = tmp_path / "pod.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as told:
        mounts = ["type=volume", "src=training", "dst=/data"]
        Place(nnodes=2, image=IMAGE, mounts=mounts, metadata={"kubernetes": f"file://{path}"}).role("train", "true")
    assert says in str(told.value) and str(told.value).startswith(str(path)) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "metadata, says",
    [
        ("kubernetes=file:///none.yaml", "/none.yaml: cannot be read (No such file"),
        ("kubernetes=/", "/: cannot be read (Is a directory)"),
        ("kubernetes=s3://bucket/pod.yaml", "s3://bucket/pod.yaml: read from files only"),
        ("volcano=file:///pod.yaml", "no scheduler reads volcano; write kubernetes="),
        ("kubernetes=pod.yaml,mesos=x", "no scheduler reads mesos"),
    ],
)
def test_metadata_that_nobody_reads_is_refused(here, capsys, metadata, says):
    (here / "pod.yaml").write_text(SAME)
    words = ("prepare", "--metadata", metadata, "synthetic", "--output", "x")
    assert says in refused(("--dryrun", f"launch/components.py:{words[0]}", *words[1:]), capsys)


def test_paths_mean_the_folder_that_is_submitted_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pod.yaml").write_text(SAME)
    for path in ("pod.yaml", "./pod.yaml", str(tmp_path / "pod.yaml"), f"file://{tmp_path}/pod.yaml", "file://pod.yaml"):
        assert Place(metadata={"kubernetes": path}).overlay.pod == yaml.safe_load(SAME)
