"""Jobs on one run folder, as real processes: one trains, others wait, end by a line, or go on when their turn comes."""

import json
import os
import signal

import pytest

from tests.helpers.launches import Launch
from tests.helpers.training_runs import losses

pytestmark = pytest.mark.thorough

IMPATIENT = "from fuxi_torchrec.run import lock\nlock.PATIENCE = 0.5\n"
STUCK = """
fast = Trainer.step
def stuck(self, batch):
    time.sleep(600 if self.state.step == 3 else 0)
    return fast(self, batch)
Trainer.step = stuck
"""
RUN = ("--resume", "--trainer.max_epochs", "1")


def test_two_jobs_on_one_run_folder_do_not_mix(small_dataset, tmp_path):
    run = tmp_path / "run"
    first = Launch(tmp_path, small_dataset, run, *RUN, processes=0, before=STUCK)
    assert first.until(lambda: len(losses(run)) >= 3)
    second = Launch(tmp_path, small_dataset, run, *RUN, processes=0, before=IMPATIENT)
    third = Launch(tmp_path, small_dataset, run, *RUN, processes=0)
    assert second.wait() == 75
    assert second.complaints() == [f"error: {run}: still in use by process {first.process.pid} on {os.uname().nodename} "
                                   "after 0 s; stop it, or try later"]  # fmt: skip
    assert third.until(lambda: "waiting for it to end" in third.errors.read_text())
    assert not (run / "outcome.json").exists() and first.process.poll() is None
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert third.wait() == 0, third.errors.read_text()
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(1, len(steps) + 1))  # none twice, none missing
    assert json.loads((run / "outcome.json").read_text())["status"] == "finished" and not (run / "lock").exists()
