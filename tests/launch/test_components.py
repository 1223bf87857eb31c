"""Components: what they ask of a scheduler, and mistakes, which are one line before anything is submitted."""

import subprocess

import pytest
from torchx.specs.file_linter import get_fn_docstring, validate

from launch import components, environment
from launch.hosts import HOSTS
from launch.place import Place
from tests.helpers.dryrun import ROOT, refused

TRAIN = "launch/components.py:train"
SMOKE = ("--config", "configs/smoke/fuxi-beta.yaml")
DATA = ("--", "--data.path", "data/ml-1m")
MOUNTED = ("--", "--data.path", "/data/ml-1m")
ROW_WISE = (*DATA, "--table.sharding", "row_wise")


@pytest.mark.parametrize("name", ["train", "evaluate", "prepare", "sweep"])
def test_every_argument_is_documented_and_of_a_type_that_torchx_reads(name):
    assert validate(str(ROOT / "launch" / "components.py"), name) == []
    _, told = get_fn_docstring(getattr(components, name))
    assert all(text.strip() for text in told.values()), told


def test_a_job_asks_for_what_its_host_has_and_shares_the_cores_out(here):
    for name, host in HOSTS.items():
        (role,) = components.train("--data.path", "data/ml-1m", config=SMOKE[1], h=name).roles
        assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (host.cpu, host.gpu, host.memMB)
        processes = max(host.gpu, 1)
        assert f"--nproc-per-node {processes} " in role.args[1]
        assert role.env["OMP_NUM_THREADS"] == str(host.cpu // processes)
    (role,) = components.train("--data.path", "data/ml-1m", config=SMOKE[1], h="h100x8", gpu=2, cpu=10, memMB=5).roles
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB, role.env["OMP_NUM_THREADS"]) == (10, 2, 5, "5")
    assert Place(h="gpu.small").resource.gpu == 1  # TorchX's own names
    assert components.train("--data.path", "data/ml-1m", config=SMOKE[1], env={"NCCL_DEBUG": "INFO"}).roles[0].env[
        "NCCL_DEBUG"
    ] == "INFO"


def test_the_run_folder_is_decided_at_submission_and_paths_hold_anywhere(here):
    first = components.train("--data.path=data/ml-1m", "--trainer.checkpoint_folder", "kept", config=SMOKE[1])
    script = first.roles[0].args[1]
    assert f"--output {here}/runs/fuxi-beta-2" in script and " --resume " in script
    assert f"--data.path {here}/data/ml-1m" in script and f"--trainer.checkpoint_folder {here}/kept" in script
    assert script.count("--data.path") == 1
    address = components.train("--data.path", "data/ml-1m", "--trainer.checkpoint_folder", "s3://b/c", config=SMOKE[1])
    assert "--trainer.checkpoint_folder s3://b/c" in address.roles[0].args[1]
    for name in ("a.csv", "b.csv"):
        (here / name).touch()
    (role,) = components.prepare("events", "--source", "a.csv", f"{here}/b.csv", "--output", "made", *EVENTS).roles
    assert f"--source {here}/a.csv {here}/b.csv --output {here}/made" in role.args[1]


EVENTS = ("--user-column", "u", "--item-column", "i", "--time-column", "t")


def test_words_reach_the_job_as_they_were_typed(here):
    """Dollars are TorchX's macros and bash's variables; neither may touch a value."""
    name = "a $HOME ${app_id} 'b'"
    script = components.train("--data.path", "data/ml-1m", config=SMOKE[1], output=name).roles[0].args[1]
    from torchx.specs import macros

    values = macros.Values(img_root="", app_id="job", replica_id="0", rank0_env="HOST")
    script = values.substitute(script).replace("exec ", "printf '%s\\n' ", 1)
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[printed.index("--output") + 1] == f"{here}/{name}"
    assert printed[printed.index("--rdzv-id") + 1] == "job"


MISTAKES = {
    "no such config": (("--config", "configs/none.yaml"), "configs/none.yaml: cannot read"),
    "a key that does not exist": ((*SMOKE, *DATA, "--model.width", "3"), "model.width"),
    "values that do not fit": ((*SMOKE, *ROW_WISE, "--table.optimizer", "adamw"), "table.optimizer: adamw"),
    "an optimizer for CUDA": ((*SMOKE, *ROW_WISE, "--table.optimizer", "adam", "--trainer.device", "cpu"), "no fused adam"),
    "no data set": (SMOKE, "data.path"),
    "not a data set": ((*SMOKE, "--", "--data.path", "configs"), "no data set here"),
    "too many processes for the data": ((*SMOKE, "--nnodes", "100000", *DATA), "too few for 100000 processes"),
    "more processes than GPUs": ((*SMOKE, "-h", "h100x8", "--nproc_per_node", "9", *DATA), "more than the 8 GPUs of -h h100x8"),
    "no GPU for cuda": ((*SMOKE, "-h", "cpu", *DATA, "--trainer.device", "cuda"), "no GPU is asked for"),
    "no such host": ((*SMOKE, "-h", "tpu", *DATA), "-h tpu: no such host"),
    "an unwritable run folder": ((*SMOKE, "--output", "/proc/run", *DATA), "/proc/run: cannot be written"),
    "a file as run folder": ((*SMOKE, "--output", ".torchxconfig/run", *DATA), "cannot be written"),
    "a bucket as run folder": ((*SMOKE, "--output", "s3://b/run", *DATA), "checkpoint_folder"),
    "a run that is there": ((*SMOKE, "--output", "there", *DATA), "a run is already here"),
    "a mount that is none": ((*SMOKE, "--mounts", "dst=/data", *DATA), "--mounts"),
    "shared memory twice": ((*SMOKE, "--mounts", "type=bind,src=/a,dst=/dev/shm", *DATA), "/dev/shm"),
    "a folder mounted twice": ((*SMOKE, "--mounts", "type=bind,src=/a,dst=/d,type=bind,src=/b,dst=/d", *DATA), "mounted twice"),
    "a run folder lost with its container": ((*SMOKE, "--image", "i", "--output", "/tmp/run", *MOUNTED), "would be lost"),
    "no run folder in an image": ((*SMOKE, "--image", "i", *MOUNTED), "--output: name a full path inside the image"),
    "no node": ((*SMOKE, "--nnodes", "0", *DATA), "--nnodes"),
    "no number of nodes": ((*SMOKE, "--nnodes", "two", *DATA), "write 4, or MIN:MAX"),
    "the most nodes first": ((*SMOKE, "--nnodes", "2:1", *DATA), "write 1:2"),
    "as few as no node": ((*SMOKE, "--nnodes", "0:2", *DATA), "at least 1"),
    "too many processes at the most": ((*SMOKE, "--nnodes", "1:100000", *DATA), "too few for 100000 processes"),
    "a state that fits one number of nodes": (
        (*SMOKE, "--nnodes", "1:2", *DATA, "--table.sharding", "column_wise"), "rowwise_adagrad keeps a number",
    ),
    "no port": ((*SMOKE, "--rdzv_port", "99999", *DATA), "--rdzv_port"),
    "devices that are not counted": ((*SMOKE, "--devices", "rdma/ib=all", *DATA), "--devices"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_submitted(here, capsys, mistake):
    (here / "there").mkdir()
    (here / "there" / "config.yaml").write_text("{}")
    words, says = MISTAKES[mistake]
    assert says in refused(("--dryrun", TRAIN, *words), capsys)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (("-s", "slurm", "-cfg", "priority=9", TRAIN), "Unknown run option `priority`"),
        (("-s", "slurm", "-cfg", "time", TRAIN), "`time` does not have"),
        (("-s", "kubernetes", TRAIN), "queue, must be provided"),
        (("-s", "slurm", TRAIN, *SMOKE, *DATA), "no Slurm here"),
    ],
)
def test_a_mistake_in_the_schedulers_options_too(here, capsys, monkeypatch, words, says):
    monkeypatch.setenv("PATH", "/nowhere")
    assert says in refused(words, capsys)


def test_other_components_tell_their_mistakes_alike(here, capsys):
    for words, says in (
        (("evaluate", "--run", "none"), "no run here"),
        (("evaluate", "--run", "none", "--nnodes", "1:2"), "an evaluation does not go on with other nodes"),
        (("prepare", "parquet"), "name a pipeline first"),
        (("prepare", "synthetic", "--output", "x"), "required: --users"),
        (("sweep", "--config", "none.yaml"), "no such sweep"),
    ):
        assert says in refused(("--dryrun", f"launch/components.py:{words[0]}", *words[1:]), capsys)


def test_pods_get_longer_to_save_than_torchrun_gives_its_workers():
    assert environment.GRACE_SECONDS > environment.SAVE_SECONDS >= 30
