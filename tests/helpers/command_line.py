"""The command line as a user types it, in processes of its own or in this one."""

import os
import subprocess
import sys

from fuxi_torchrec.cli.main import main

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMOKE = os.path.join(ROOT, "configs", "smoke", "fuxi-beta.yaml")


def fuxi(*words, launcher=(sys.executable, "-m", "fuxi_torchrec")):
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )


def mistake(capsys, *words):
    """Runs a command that must end with code 2 and one line on standard error; returns the line."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
