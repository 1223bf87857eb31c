"""`torchx run -s local_cwd` with real processes: what Ctrl-C leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.dryrun import ROOT
from tests.helpers.launches import SMALL
from tests.helpers.training_runs import killed_before_its_first_save

pytestmark = pytest.mark.thorough

MARK = b"FUXI_TEST_OF_CTRL_C=1"


def alive():
    """Processes that `torchx run` of this test started, itself included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if MARK in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # somebody else's, or gone by now
            continue
    return found


def until(condition, process, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.args
        time.sleep(0.02)


def test_ctrl_c_saves_and_leaves_no_process_and_the_same_line_with_resume_goes_on(tmp_path, small_dataset):
    """In the folder of a run that was killed before its first save, which begins again."""
    run = tmp_path / "run"
    killed_before_its_first_save(run, small_dataset)
    words = ["--config", "configs/smoke/fuxi-beta.yaml", "--nproc_per_node", "1", "--output", run, "--resume", "True", "--"]
    # Nothing but the signal saves. TorchX takes no option twice.
    settings = dict(zip(SMALL[::2], SMALL[1::2]))
    for name in ("trainer.max_epochs", "trainer.checkpoint_every_steps", "trainer.checkpoint_every_epochs"):
        settings[f"--{name}"] = 100000
    settings["--evaluation.every_epochs"] = 100000
    words += ["--data.path", small_dataset, *(word for pair in settings.items() for word in pair)]
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", "launch/components.py:train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict([MARK.decode().split("=")])}
    with open(tmp_path / "err", "w+") as errors:
        # A terminal's Ctrl-C reaches the whole group in its foreground.
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            metrics = run / "metrics.jsonl"
            until(lambda: metrics.read_text().count("\n") > 4, process, 90)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
            assert alive() == []
        finally:
            for left in alive():
                os.kill(left, signal.SIGKILL)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    last = steps[-1]
    assert json.loads((run / "checkpoints" / "index.json").read_text())["last"] == f"step-{last:08d}"
    said = (tmp_path / "err").read_text()
    assert said.splitlines()[-1].startswith("stopped; ") and "--resume True" in said and "Traceback" not in said

    resumed = [*command, "--trainer.max_steps", last + 3]
    subprocess.run(list(map(str, resumed)), cwd=ROOT, env=environment, check=True, timeout=120, capture_output=True)
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
    assert steps == list(range(1, last + 4))
