"""The steps as Slurm jobs, each of which starts when the one before it has succeeded."""

import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Dict, List

from fuxi_torchrec.errors import FolderInUse, UserError
from fuxi_torchrec.files import JsonObject, write_aside
from fuxi_torchrec.paths import absolute
from launch.chain.steps import Step, left_to_do

if TYPE_CHECKING:
    from torchx.runner import Runner
    from torchx.specs import AppDryRunInfo

JOBS_FILE = "chain.json"  # in the run folder: what was submitted last, as {step: TorchX's handle}


class SlurmChain:
    """A chain that is submitted to Slurm.

    Args:
        steps: the chain's.
        runner: TorchX's.
        cfg: the scheduler's options.
        workspace: what `torchx run --workspace` takes.
    """

    def __init__(self, steps: List[Step], runner: "Runner", cfg: JsonObject, workspace: str):
        self.steps, self.runner, self.cfg, self.workspace = steps, runner, cfg, workspace
        runs = [step.options.get("output") or step.options["run"] for step in steps if step.name != "prepare"]
        self.file = os.path.join(absolute(runs[0]), JOBS_FILE) if runs else None

    def plan(self) -> "Dict[str, AppDryRunInfo]":
        """Makes the requests of the steps that are not done, as {step: request}; says which are. Raises UserError."""
        requests: Dict[str, AppDryRunInfo] = {}
        for step, kept in left_to_do(self.steps):
            if kept is not None:
                print(f"{step.name}: {kept}")
                continue
            cfg = dict(self.cfg)
            if cfg.get("job_dir"):  # TorchX makes it, and takes none that is there
                cfg["job_dir"] = os.path.join(str(cfg["job_dir"]), step.name)
            requests[step.name] = self.runner.dryrun(step.app(), "slurm", cfg=cfg, workspace=self.workspace or None)
        return requests

    def submit(self) -> int:
        """Submits what is left to do, or nothing: where a submission is refused, the earlier ones are cancelled. Returns
        the exit code. Raises UserError, and FolderInUse while an earlier submission of this chain is queued or runs."""
        self._refuse_twice()
        requests = self.plan()
        handles: Dict[str, str] = {}
        try:
            for name, request in requests.items():
                handles[name] = self.runner.schedule(_behind(request, [job_of(handle) for handle in handles.values()][-1:]))
                self._record(handles)
        except BaseException:
            for name in list(requests)[len(handles) :][:1]:
                print(f"{name}: was not submitted", file=sys.stderr)
            self._cancel(handles)
            raise
        _tell(handles)
        return 0

    def show(self) -> int:
        """Prints what `submit` would submit. Returns 0."""
        before: List[str] = []
        for name, request in self.plan().items():
            print(f"\n=== {name} ===\n{_behind(request, before)}")
            before = [f"JOB-OF-{name.upper()}"]
        return 0

    def _refuse_twice(self) -> None:
        for name, handle in self._recorded().items():
            status = self.runner.status(handle)
            if status is not None and status.state.name in ("SUBMITTED", "PENDING", "RUNNING"):
                raise FolderInUse(
                    f"{name} of this chain is {status.state.name.lower()} as {handle}; nothing was submitted; wait for it, or "
                    f"stop it by: torchx cancel {handle}"
                )

    def _recorded(self) -> Dict[str, str]:
        with suppress(OSError, ValueError):
            with open(self.file or "", encoding="utf-8") as file:
                return dict(json.load(file))
        return {}

    def _record(self, handles: Dict[str, str]) -> None:
        if self.file is None:
            return
        try:
            os.makedirs(os.path.dirname(self.file), exist_ok=True)
            write_aside(self.file, json.dumps(handles, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--output: {error.filename}: {error.strerror}; name another folder") from None

    def _cancel(self, handles: Dict[str, str]) -> None:
        for name, handle in reversed(handles.items()):
            try:
                self.runner.cancel(handle)
                print(f"{name}: {handle} was cancelled", file=sys.stderr)
            except Exception as error:
                print(f"{name}: {handle} could not be cancelled ({error}); do it by hand", file=sys.stderr)


def job_of(handle: str) -> str:
    """Returns Slurm's own number of a job."""
    return handle.rpartition("/")[2]


def _behind(request: Any, jobs: List[str]) -> Any:
    """The request, to start when these jobs have succeeded, and to be dropped when one of them has not. On the command
    line, where sbatch takes it for the whole of a job of several nodes."""
    if jobs:
        request.request.cmd += [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"]
    return request


def _tell(handles: Dict[str, str]) -> None:
    if not handles:
        print("nothing is left to do")
        return
    for name, handle in handles.items():
        print(f"{name:<9} {handle}")
    jobs, first = [job_of(handle) for handle in handles.values()], next(iter(handles.values()))
    print(f"watch     squeue --jobs {','.join(jobs)}; torchx log --tail {first}/{next(iter(handles))}")
    print(f"stop      scancel {' '.join(jobs)}")
    print("go on     the same command, after a failure or a time limit; what is done stays")
