"""What a user types arrives as it was typed: TorchX, Slurm, Kubernetes and bash each replace what follows a dollar."""

import json
import os
import shlex
import subprocess
import sys
from string import Template

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torchx.runner import get_runner

from launch import components
from launch.environment import PLAIN, quoted
from launch.jobs import application
from launch.place import Place
from tests.helpers.dryrun import refused
from tests.helpers.expansion import expand, started_as

pytestmark = pytest.mark.thorough

WORDS = [
    "$(HOME)", "$$(HOME)", "$$", "$", "$$$", "a$", "$((1 + 1))", "$(NAME", "${app_id}", "$${app_id}", "${replica_id}",
    "$rank0_env", "$SLURM_JOB_ID", "`id`", "it's", 'a "b"', "$é", "ü$ß", "-", "a,b;c=d", "two\nlines", "\\n", "*", "%j",
    "{app_id}", "'${app_id}'",
]  # fmt: skip
VALUES = {f"TYPED_{i}": word for i, word in enumerate([*WORDS, "mlx5_0,mlx5_1", "b=c", "/plain:path", ""])}
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
SRUN = """#!{python}
# Starts one task as srun does: options, then the command; variables of --export are parted at commas.
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    option, _, value = words.pop(0).partition("=")
    if option == "--export":
        os.environ.update(pair.split("=", 1) if "=" in pair else (pair, "") for pair in value.split(",") if pair != "ALL")
os.execvp(words[0], words)
"""


@pytest.fixture
def app():
    return application("run", Place(env=VALUES).role("train", "exec " + quoted([sys.executable, "-c", SHOW, *WORDS])))


def dryrun(app, scheduler, **cfg):
    with get_runner() as runner:
        return runner.dryrun(app, scheduler, cfg)


def started(command, environment, cwd):
    given = {**os.environ, "NAME": "wrong", "SLURM_JOB_ID": "7", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=cwd, check=True, timeout=60)
    words, variables = json.loads(done.stdout)
    assert words == WORDS
    assert {name: value for name, value in variables.items() if name.startswith("TYPED_")} == VALUES


def test_on_kubernetes(here, app):
    job = yaml.safe_load(str(dryrun(app, "kubernetes", queue="q", validate_spec=False)))
    command, environment = started_as(job["spec"]["tasks"][0]["template"]["spec"]["containers"][0])
    started(command, environment, here)


def test_on_slurm(here, app, monkeypatch):
    (here / "srun").write_text(SRUN.format(python=sys.executable))
    (here / "srun").chmod(0o755)
    script = dryrun(app, "slurm").request.materialize().replace('echo "job exited', ': "job exited')
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    started(["bash", "-c", script], {}, here)


def test_on_this_machine(here, app):
    ((_, (replica,)),) = dryrun(app, "local_cwd").request.role_params.items()
    started(replica.args, {**replica.env, "PATH": os.environ["PATH"]}, here)  # which the scheduler adds when it starts one


ANY = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
PIECES = st.sampled_from(["$", "$$", "$(HOME)", "${app_id}", "(", ")", "{", "'", '"', "\\", "HOME", " "]) | ANY


@given(st.lists(st.lists(PIECES).map("".join), min_size=1))
def test_any_words_pass_through_all_that_replaces(words):
    """Neither TorchX nor the kubelet finds anything to replace, and bash takes the quotation away."""
    text = quoted(words)
    values = {"app_id": "job", "HOME": "wrong", "": "wrong"}
    assert Template(text).safe_substitute(values) == text and "${app_id}" not in text
    assert expand(text, values) == text and shlex.split(text) == words


def test_what_this_project_writes_for_bash_is_nothing_that_kubernetes_replaces(here):
    """is_host=$((0 == 0)) and the address of the first node."""
    app = components.train("--data.path", "data/ml-1m", config="configs/smoke/fuxi-beta.yaml", nnodes=2)
    job = yaml.safe_load(str(dryrun(app, "kubernetes", queue="q", validate_spec=False)))
    for task in job["spec"]["tasks"]:
        (container,) = task["template"]["spec"]["containers"]
        command, environment = started_as(container)
        assert command == container["command"] and "$((" in command[2]
        assert environment == {item["name"]: item["value"] for item in container["env"]}


def test_plain_values_are_variables_of_the_job_that_the_scheduler_shows(here):
    role = Place(env={"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5_0,mlx5_1"}).role("train", "exec x")
    assert role.env["NCCL_DEBUG"] == "INFO" and "NCCL_IB_HCA" not in role.env
    assert role.args[1] == "export NCCL_IB_HCA=mlx5_0,mlx5_1; exec x" and not PLAIN.fullmatch("a,b")


@pytest.mark.parametrize(
    "pairs, says",
    [
        ("A=b=c", "`b` cannot be split into `val<delim>key`"),
        ("A", "at least one `key=value` pair"),
        ("A=b=", "ends with ="),
        ("TOKEN=abc==", "ends with ="),
        ("A=x,B=", "ends with ="),
        ("A B=c", "'A B' is no variable's name"),
    ],
)
def test_pairs_that_torchx_would_misread_are_refused_with_the_right_way(here, capsys, pairs, says):
    words = ("--env", pairs, "synthetic", "--users", "9", "--items", "9", "--events-per-user", "9", "--output", "x")
    said = refused(("--dryrun", "launch/components.py:prepare", *words), capsys)
    assert says in said and "--env" in said and "'A=\"b=c\"'" in said


def test_the_right_way_is_one(here):
    from torchx.util.types import to_dict

    assert to_dict("""A="b=c",T='abc==',E='',H=mlx5_0,mlx5_1""") == {
        "A": "b=c", "T": "abc==", "E": "", "H": "mlx5_0,mlx5_1"
    }  # fmt: skip
