"""The steps in turn as processes of this machine: a laptop's chain, and what the pod of a chain on Kubernetes runs."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Dict, Iterator, List, NoReturn, Optional

from torchx.specs import AppDef, Role, macros

from fuxi_torchrec.errors import UserError
from launch.chain.steps import Step, left_to_do
from launch.environment import GRACE_SECONDS
from launch.sweep.orphans import MARK, orphans, stop_orphans

INSTEAD = "this machine is one node; take --nproc_per_node, or submit to a cluster"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_here(steps: List[Step]) -> int:
    """Runs the steps that are not done, one after the other. Returns 0, or the exit code of the first that fails: its
    own, or 128 + n where signal n ended it. Raises UserError for a step that cannot run, before the first one starts."""
    with _ending_between_steps():
        for step, kept in left_to_do(steps):
            if kept is None:
                refuse_several_nodes(step, step.app(), INSTEAD)
        return _in_turn(steps)


def _in_turn(steps: List[Step]) -> int:
    for step in steps:
        step.after = []  # they are done by now
        kept = step.kept()
        print(f"{step.name}: {kept or 'starts'}", flush=True)
        code = 0 if kept else Process(step.app()).run(step.place.env)
        if code:
            print(f"{step.name}: ended with exit code {code}; the same command goes on from here", file=sys.stderr)
            return code
    return 0


def show_here(steps: List[Step]) -> int:
    """Prints the commands that `run_here` would run. Returns 0. Raises UserError as it does."""
    for step, kept in left_to_do(steps):
        app = None if kept else step.app()
        if app is not None:
            refuse_several_nodes(step, app, INSTEAD)
        print(f"{step.name}: {kept or Process(app).role.args[-1].removeprefix('exec ')}")
    return 0


def refuse_several_nodes(step: Step, app: AppDef, instead: str) -> None:
    """Raises UserError for a step of several nodes; instead: what to do."""
    if app.roles[0].num_replicas > 1:
        raise UserError(f"{step.name}: --nnodes {step.options['nnodes']}: {instead}")


@contextmanager
def _ending_between_steps() -> Iterator[None]:
    """Ends the program at a signal that meets no step: the first process of a pod would not hear it otherwise."""

    def end(number: int, frame: Optional[FrameType]) -> NoReturn:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Process:
    """A job's only replica as a process of this machine, which gets this one's signals."""

    def __init__(self, app: AppDef):
        self.id = f"{app.name}-{secrets.token_hex(4)}"
        values = macros.Values(img_root=os.getcwd(), app_id=self.id, replica_id="0", rank0_env="TORCHX_RANK0_HOST")
        self.role: Role = values.apply(app.roles[0])
        self.signal = 0
        self.deadline = float("inf")
        self.process: Optional[subprocess.Popen] = None

    def run(self, given: Optional[Dict[str, str]]) -> int:
        """Runs to the end. given: environment by --env; else what is set here goes before a job's defaults, as a pod's
        environment does. Returns the exit code."""
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            with tempfile.TemporaryDirectory() as folder:
                error_file = os.path.join(folder, "error.json")
                mine = {**os.environ, "TORCHELASTIC_ERROR_FILE": error_file, MARK: self.id}
                environment = {**self.role.env, **mine, **(given or {})}
                # Its own session: a terminal's Ctrl-C comes once, from here.
                self.process = subprocess.Popen(
                    [self.role.entrypoint, *self.role.args], env=environment, start_new_session=True
                )
                if self.signal:  # it came before there was a process
                    self._pass_on(self.signal, None)
                code = self._code(self._wait(), error_file)
                stop_orphans([self.id])  # workers whose torchrun was killed
                return code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> int:
        assert self.process is not None
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(1.0)
            if time.monotonic() > self.deadline:
                self._kill()

    def _pass_on(self, number: int, frame: Optional[FrameType]) -> None:
        """The first signal lets the step save and end; the second one ends it at once."""
        again, self.signal = bool(self.signal) and frame is not None, number
        if self.process is None:
            return
        if again:
            return self._kill()
        self.deadline = time.monotonic() + GRACE_SECONDS
        self.process.send_signal(number)

    def _kill(self) -> None:
        for process in orphans([self.id]):  # torchrun's workers are in groups of their own
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _code(self, code: int, error_file: str) -> int:
        if self.signal:
            return 128 + self.signal
        return 128 - code if code < 0 else code and (_cause(error_file) or code)


def _cause(error_file: str) -> int:
    """The exit code of the worker for whose sake torchrun ended, which itself says 1; 0 where it is not known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open(error_file, encoding="utf-8") as file:
            told: Any = json.load(file)["message"]["errorCode"]
        return told if isinstance(told, int) and told > 0 else 128 - told if isinstance(told, int) else 0
    return 0
