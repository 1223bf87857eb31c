"""`torchx run --dryrun` of a command line, in this process."""

import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
from torchx.cli.main import main

ROOT = Path(__file__).parents[2]
DOCS = "\n".join((ROOT / "docs" / name).read_text() for name in ("launch.md", "kubernetes.md", "elastic.md"))


def documented(scheduler):
    """The commands of the pages about launching that submit to a scheduler."""
    lines = [line.strip() for line in DOCS.splitlines() if line.startswith("torchx run ") and "[" not in line]
    return [line for line in lines if (f"-s {scheduler}" in line if scheduler else " -s " not in line)]


def dryrun(command, capsys, *options):
    """What `command` would submit: TorchX's JSON object with app and request, and the request as it is printed."""
    words = shlex.split(command)[2:]
    if "-s" not in words:
        words = ["-s", "local_cwd", *words]
    if "kubernetes" in words:
        place = words.index("-cfg") + 1
        words[place] += ",validate_spec=False"  # no cluster here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Slurm is not on the PATH, and Volcano's retries of 2020
        capsys.readouterr()
        main(["run", "--dryrun", "--json", *options, *words])
        answer = json.loads(capsys.readouterr().out)
        main(["run", "--dryrun", *options, *words])
        return answer, capsys.readouterr().out.partition("=== SCHEDULER REQUEST ===\n")[2]


def normalised(request):
    """A printed request's words, with what differs from call to call named as docs/launch.md does."""
    names = [(sys.executable, "PYTHON"), (os.getcwd(), "HERE"), (r"SESSION_ID(=|\s+value: )[-0-9a-f]{36}", r"SESSION_ID\1…")]
    names += [(r"(?<=ml-20m-16-)[a-z0-9]{8,16}", "ID")]
    for found, name in names:
        request = re.sub(found, name, request)
    return request.split()


def shown(after):
    """The first block behind a heading of the documentation that shows a request, in the pieces between its "…" lines."""
    text = DOCS.rpartition(f"\n## {after}\n")[2]
    block = next(block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if not block.startswith(("torchx", "make")))
    return [piece.split() for piece in re.split(r"^ *…$", block, flags=re.MULTILINE)]


def refused(words, capsys):
    """The one line by which `torchx run` ends, before anything is submitted."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, words)])
    said = [line for line in capsys.readouterr().err.splitlines() if not re.match(r".*torchx.* INFO ", line)]
    assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    return said[0]
