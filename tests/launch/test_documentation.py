"""docs/launch.md: every command is one that submits, and what it shows is what is submitted."""

import pytest
from torchx.schedulers import slurm_scheduler

from tests.helpers.dryrun import documented, dryrun, normalised, shown

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("scheduler, heading", [("slurm", "16 nodes on Slurm"), ("kubernetes", "16 nodes on Kubernetes")])
def test_the_request_that_is_shown_is_the_one_that_is_submitted(here, capsys, monkeypatch, scheduler, heading):
    monkeypatch.setattr(slurm_scheduler, "version", lambda: (24, 11))
    command = next(line for line in documented(scheduler) if "--nnodes 16" in line)
    words = normalised(dryrun(command, capsys)[1])
    for piece in shown(heading):
        places = [i for i in range(len(words)) if words[i : i + len(piece)] == piece]
        assert places, " ".join(piece)
        words = words[places[0] + len(piece) :]


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes", None])
def test_every_command_submits(here, capsys, scheduler):
    commands = documented(scheduler)
    assert len(commands) == (4 if scheduler == "slurm" else 2)
    for command in commands:
        answer, _ = dryrun(command, capsys)
        (role,) = answer["app"]["roles"]
        least = f"{role['min_replicas']}:" if role["min_replicas"] else ""
        assert f"--nnodes {least}{role['num_replicas']} " in role["args"][1] and " --resume " in role["args"][1]
    assert not (here / "runs").exists()
