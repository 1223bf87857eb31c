"""A trace of a few training steps, for Perfetto, chrome://tracing or TensorBoard's profiler plugin."""

import os
from typing import Callable

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fuxi_torchrec.files import file_aside
from fuxi_torchrec.run.folder import RunFolder

SKIPPED_STEPS = 5
"""Steps of a process before the first recorded one: allocators and caches settle in them."""
RECORDED_STEPS = 5
TRACE_FILE = "steps.pt.trace.json"  # the ending that TensorBoard's plugin looks for


class StepProfile:
    """Records the steps after the first few of this process, with the ranges of `stages`, once.

    Args:
        run: whose profile/ folder takes the trace.
        report: is given a line on where the trace is.
    """

    def __init__(self, run: RunFolder, report: Callable[[str], None]):
        self.path, self.report, self.written = os.path.join(run.profile, TRACE_FILE), report, False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=RECORDED_STEPS, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        """Counts a step; to be called after every one."""
        if not self.written:
            self._profile.step()

    def close(self) -> None:
        """Stops recording at the end of the run, which may come before all steps are recorded."""
        self._profile.stop()
        if not self.written:
            self.report(f"no profile: the run ended before its step {SKIPPED_STEPS + 1}")

    def _write(self, recorded: profile) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with file_aside(self.path) as aside:
            recorded.export_chrome_trace(aside)
        self.written = True
        self.report(f"profile of {RECORDED_STEPS} steps: {self.path} (https://ui.perfetto.dev opens it)")
