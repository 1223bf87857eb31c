"""The image: what the Dockerfile takes from this folder, and what `make image` tells the program that builds it."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from torchx.workspace.api import walk_workspace

from fuxi_torchrec import __version__
from tests.helpers.dryrun import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COPIED = [
    word for words in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE) for word in words.split()
]
NEVER = [".git", ".venv", ".venv-docs", "data", "runs", "jobs", "slurm-1", "tests", "docs", ".env", "checkpoint.pt"]


def left_out(path):
    """Whether .dockerignore keeps a path out: the last line that fits a path or one of its parents decides."""
    parents = [str(p) for p in (Path(path), *Path(path).parents)][:-1]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [part for p in parents for part in ({p, Path(p).name} if "**/" in line else {p})]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(name, pattern) for name in names):
            out = not line.startswith("!")
    return out


def make_image(folder, *arguments, engines=()):
    """Runs `make image` where these engines are all that there are; returns it and what they were called with.

    An engine is a script that answers `version` with the exit code given, and notes everything else.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sed").symlink_to(shutil.which("sed"))
    for name, code in dict(engines).items():
        (folder / name).write_text(
            f'#!/bin/sh\n[ "$1" = version ] && exit {code}\nfor word in {name} "$@"; do echo "$word" >> {folder}/calls; done\n'
        )
        (folder / name).chmod(0o755)
    done = subprocess.run(
        [shutil.which("make"), "--no-print-directory", "image", f"PYTHON={sys.executable}", *arguments],
        cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_what_the_dockerfile_copies_exists_and_is_in_the_context():
    assert {"fuxi_torchrec", "launch", "data_pipelines", "configs", "requirements", "setup.py"} <= set(COPIED)
    assert [name for name in COPIED if not (ROOT / name).exists() or left_out(name)] == []


@pytest.mark.parametrize("name", [*NEVER, "launch/__pycache__", "fuxi_torchrec/ops/native/__pycache__/cache.pyc"])
def test_the_context_leaves_out(name):
    assert left_out(name)


def test_the_context_has_the_kernels_sources():
    sources = [path.relative_to(ROOT) for path in (ROOT / "fuxi_torchrec/ops/native").glob("*.[ch]")]
    assert sources and not any(map(left_out, sources))


def test_torchx_takes_the_same_context_for_its_own_image(tmp_path):
    """It reads .dockerignore by rules of its own."""
    for name in (*NEVER, *COPIED):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").touch()
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    walked = walk_workspace(fsspec.filesystem("file"), str(tmp_path), ".dockerignore")
    assert {Path(folder).name for folder, _, files in walked if files} == set(COPIED)


def test_the_image_runs_as_a_number_of_group_0_with_a_home_that_this_group_writes():
    assert re.findall(r"^USER (.+)$", DOCKERFILE, flags=re.MULTILINE) == ["1000:0"]
    assert "--gid 0" in DOCKERFILE and "chmod 770 /home/fuxi" in DOCKERFILE and "HOME=/home/fuxi" in DOCKERFILE


@pytest.mark.parametrize("engine", ["docker", "podman", "buildah"])
def test_make_image_builds_with(engine, tmp_path):
    done, call = make_image(tmp_path / "bin", engines=[(engine, 0)])
    assert (done.returncode, done.stderr) == (0, "")
    assert call == [engine, "build", "--tag", f"fuxi-torchrec:{__version__}", "--build-arg", "DEVICE=cuda", "."]


def test_make_image_hands_its_variables_on(tmp_path):
    given = [
        "IMAGE=registry.example.com/a:1",
        "DEVICE=cpu",
        "TORCH_INDEX=https://example.com/cpu",
        "EXTRAS=boto3 awscrt",
    ]
    done, call = make_image(
        tmp_path / "bin", *given, "BASE=debian:12", "ENGINE_ARGS=--no-cache --network host", engines=[("podman", 0)]
    )
    assert (done.returncode, done.stderr) == (0, "")
    arguments = ["DEVICE=cpu", "TORCH_INDEX=https://example.com/cpu", "EXTRAS=boto3 awscrt", "BASE=debian:12"]
    assert call == [
        *("podman", "build", "--tag", "registry.example.com/a:1"),
        *(word for argument in arguments for word in ("--build-arg", argument)),
        *("--no-cache", "--network", "host", "."),
    ]


def test_make_image_takes_the_next_engine_where_dockers_daemon_does_not_answer(tmp_path):
    done, call = make_image(tmp_path / "bin", engines=[("docker", 1), ("buildah", 0)])
    assert (done.returncode, call[:2]) == (0, ["buildah", "build"])


def test_make_image_takes_the_engine_that_it_is_told(tmp_path):
    done, call = make_image(tmp_path / "bin", "ENGINE=buildah", engines=[("docker", 0), ("buildah", 0)])
    assert (done.returncode, call[:2]) == (0, ["buildah", "build"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [],
            "error: docker podman buildah: nothing here that can build an image (docker needs its daemon); install one",
        ),
        (["ENGINE=nerdctl"], "error: nerdctl: nothing here that can build an image"),
        (["DEVICE=tpu"], "error: DEVICE=tpu: must be cpu or cuda"),
    ],
)
def test_make_image_says_in_one_line_what_is_wrong(arguments, line, tmp_path):
    done, call = make_image(tmp_path / "bin", *arguments, engines=[("docker", 1)])
    said, makes_own = done.stderr.splitlines()
    assert (done.returncode, call) == (2, []) and said.startswith(line) and makes_own.startswith("make: ***")


def test_make_image_fails_where_the_build_fails(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text("#!/bin/sh\n[ $1 = version ]\n")
    (folder / "docker").chmod(0o755)
    assert make_image(folder)[0].returncode == 2
