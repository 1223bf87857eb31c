"""What is written for TensorBoard is what it shows, whatever the clocks of the hosts that a run goes on."""

import time

import pytest

from fuxi_torchrec.run.tensorboard import ScalarWriter


def curve(folder):
    """Steps and values of "loss", read as TensorBoard does: its files in the order of their names, what was given up
    hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


@pytest.mark.parametrize("offset", [0, 3600, -3600])
def test_a_run_that_goes_on_at_a_host_whose_clock_is_an_hour_off_has_its_curve(tmp_path, monkeypatch, offset):
    first = ScalarWriter(str(tmp_path), 0, pytest.fail)
    for step in (1, 2, 3):
        first.add({"loss": 10.0 + step}, step)
    first.close()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + offset)
    again = ScalarWriter(str(tmp_path), 2, pytest.fail)  # the third step was not saved
    for step in (3, 4):
        again.add({"loss": 20.0 + step}, step)
    again.close()
    assert curve(tmp_path) == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
