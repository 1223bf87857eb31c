"""Chains on clusters: what is submitted, to Slurm and to Kubernetes, and what is taken back when a submission fails."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torchx.schedulers import slurm_scheduler
from torchx.specs import AppDryRunInfo

from launch.chain.__main__ import main
from launch.chain.plan import read_chain, split
from launch.chain.slurm import SlurmChain
from tests.helpers.chains import lines, write_chain
from tests.helpers.dryrun import ROOT
from tests.launch.test_manifests import check

KUBERNETES = ("-s", "kubernetes", "--workspace", "", "-cfg", "queue=research,namespace=ml,validate_spec=False", "--dryrun")
IMAGE = ("--image", "registry.example.com/fuxi-torchrec:0.1", "--mounts", "type=volume,src=training,dst=/data")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_scheduler, "version", lambda: (24, 11))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.filterwarnings("ignore:Error running")
def test_slurm_starts_each_job_after_the_one_before_it_and_drops_it_if_that_fails(folder, capsys):
    path = write_chain(folder, before="--nnodes 2")
    assert main(["-s", "slurm", "-cfg", "partition=gpu", "--dryrun", str(path), "-h", "cpu"]) == 0
    requests = re.split(r"^=== (\w+) ===$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    by_step = dict(zip(requests[::2], (text.strip().splitlines() for text in requests[1::2])))
    drop = "--kill-on-invalid-dep=yes"
    assert {step: lines[0] for step, lines in by_step.items()} == {
        "prepare": "sbatch --parsable $SBATCH_SCRIPT",
        "train": f"sbatch --parsable --dependency=afterok:JOB-OF-PREPARE {drop} $SBATCH_SCRIPT",
        "evaluate": f"sbatch --parsable --dependency=afterok:JOB-OF-TRAIN {drop} $SBATCH_SCRIPT",
    }
    parts = {step: [line for line in lines if line.startswith("#SBATCH --job-name")] for step, lines in by_step.items()}
    assert [len(found) for found in parts.values()] == [1, 2, 1] and by_step["train"].count("#SBATCH hetjob") == 1
    assert all("--partition=gpu" in line and "--cpus-per-task=16" in line for found in parts.values() for line in found)
    assert sorted(path.name for path in folder.iterdir()) == ["chain.yaml", "configs"]


class Runner:
    """TorchX's, with a Slurm that refuses one of the jobs."""

    def __init__(self, refused, cancellable=True):
        self.refused, self.cancellable, self.commands, self.cancelled = refused, cancellable, [], []

    def dryrun(self, app, scheduler, cfg, workspace):
        request = slurm_scheduler.SlurmBatchRequest(["sbatch", "--parsable"], {}, None, 0)
        return AppDryRunInfo(request, repr)

    def schedule(self, info):
        self.commands.append(info.request.cmd)
        if len(self.commands) == self.refused:
            raise subprocess.CalledProcessError(1, info.request.cmd)
        return f"slurm://torchx/{10 * len(self.commands)}"

    def cancel(self, handle):
        if not self.cancellable:
            raise OSError("no answer")
        self.cancelled.append(handle)

    def status(self, handle):
        return None


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_where_a_submission_is_refused_the_earlier_ones_are_taken_back(folder, capsys, refused):
    runner = Runner(refused)
    with pytest.raises(subprocess.CalledProcessError):
        SlurmChain(read_chain(str(write_chain(folder)), {}, []), runner, {}, "").submit()
    assert runner.cancelled == [f"slurm://torchx/{10 * job}" for job in range(refused - 1, 0, -1)]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{['prepare', 'train', 'evaluate'][refused - 1]}: was not submitted" and len(said) == refused
    assert all(line.endswith("was cancelled") for line in said[1:])


def test_a_job_that_cannot_be_taken_back_is_named(folder, capsys):
    with pytest.raises(subprocess.CalledProcessError):
        SlurmChain(read_chain(str(write_chain(folder)), {}, []), Runner(2, cancellable=False), {}, "").submit()
    assert "prepare: slurm://torchx/10 could not be cancelled (no answer); do it by hand" in capsys.readouterr().err


def test_each_job_waits_for_the_number_of_the_one_before_it(folder, capsys):
    runner = Runner(0)
    assert SlurmChain(read_chain(str(write_chain(folder)), {}, []), runner, {}, "").submit() == 0
    assert [command[2:3] for command in runner.commands] == [[], ["--dependency=afterok:10"], ["--dependency=afterok:20"]]
    assert "scancel 10 20 30" in capsys.readouterr().out


def inside(manifest):
    """The arguments that the chain in the pod gets."""
    (task,) = manifest["spec"]["tasks"]
    assert task["replicas"] == 1
    (container,) = task["template"]["spec"]["containers"]
    script = container["command"][2]
    assert script.startswith("exec python -m launch.chain -s local_cwd ")
    return shlex.split(script)[4:]


def test_kubernetes_gets_one_pod_that_runs_the_steps_in_turn(folder, capsys, monkeypatch):
    """And what it runs there means the same as outside, without what is the pod's own."""
    prepare = "-h cpu synthetic --users 60 --items 40 --events-per-user 8 --output /data/made"
    path = write_chain(folder, prepare=prepare, run="/data/runs/made", before="-h h100x8 --max_restarts 5")
    assert main([*KUBERNETES, str(path), *IMAGE, "--env", "NCCL_DEBUG=INFO"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    check(manifest)
    pod = manifest["spec"]["tasks"][0]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in pod["containers"][0]["env"]
    words = dict(word.removeprefix("--").split("=", 1) for word in inside(manifest)[2:])
    steps = {step.name: step for step in read_chain(None, {name: split(name, text) for name, text in words.items()}, [])}
    outside = {step.name: step for step in read_chain(str(path), {}, list(IMAGE))}
    assert list(steps) == ["prepare", "train", "evaluate"]
    for name, step in steps.items():
        assert step.words == outside[name].words and step.place.image is None and step.place.mounts is None
        for option in ("config", "output", "run", "h", "max_restarts"):
            assert step.options.get(option) == outside[name].options.get(option)


@pytest.mark.thorough
def test_what_the_pod_runs_prepares_trains_and_evaluates_and_once_started_again_does_nothing(folder, capsys):
    """Its script as a process here, in the place of an image whose volume is this folder."""
    prepare = f"synthetic --users 60 --items 40 --events-per-user 8 --output {folder}/made"
    path = write_chain(folder, prepare=prepare, run=f"{folder}/run")
    assert main([*KUBERNETES, str(path), "--image", "i:1", "--mounts", f"type=volume,src=training,dst={folder}"]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    script = manifest["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["command"]
    where = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for kept in (0, 3):
        before = lines(folder / "run")
        command = {"env": {**os.environ, **where}, "capture_output": True, "text": True, "timeout": 500, "cwd": folder}
        done = subprocess.run(script, check=False, **command)
        assert done.returncode == 0, done
        assert sum(f"{step}: starts" in done.stdout for step in ("prepare", "train", "evaluate")) == 3 - kept
    assert lines(folder / "run") == before and len(before[1]) == 1


def test_kubernetes_refuses_what_one_pod_cannot_do(folder, capsys):
    prepare = "synthetic --users 60 --items 40 --events-per-user 8 --output /data/made"
    other = "--mounts type=volume,src=other,dst=/data"
    for before, says in (("--nnodes 2", "a chain is one pod here"), (other, "once for all")):
        path = write_chain(folder, prepare=prepare, run="/data/runs/made", before=before)
        assert main([*KUBERNETES, str(path), *IMAGE]) == 2
        assert says in capsys.readouterr().err


def documented():
    """The commands of docs/chain.md that run a chain."""
    text = (ROOT / "docs" / "chain.md").read_text()
    return [line for line in text.splitlines() if line.startswith("python -m launch.chain ") and "[" not in line]


@pytest.mark.filterwarnings("ignore:Error running")
def test_every_command_of_the_page_is_one_that_can_be_submitted(folder, capsys):
    commands = documented()
    (folder / "ml-1m.zip").touch()
    assert {word for line in commands for word in ("slurm", "kubernetes") if word in line} == {"slurm", "kubernetes"}
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)[3:]
        if "kubernetes" in words:
            words[words.index("-cfg") + 1] += ",validate_spec=False"
        assert main(["--dryrun", *words]) == 0, (command, capsys.readouterr())
        assert "evaluate" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["configs", "ml-1m.zip"]


def test_every_chain_that_is_delivered_can_be_read(folder):
    for path in (ROOT / "configs" / "chains").iterdir():
        assert [step.name for step in read_chain(str(path), {}, [])] == ["prepare", "train", "evaluate"]
