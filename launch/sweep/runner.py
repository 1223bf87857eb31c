"""Many runs as jobs of one scheduler, a few at a time: what sweeps and the reproduced tables are made by.

How far each run has come is read from its own folder, so the same call goes on after everything was killed: a finished run
is never repeated, one that was cut off resumes from its checkpoint.
"""

import fcntl
import json
import logging
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject, write_aside
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.outcome import OUTCOME_FILE, read_outcome
from launch import jobs
from launch.images import check_image_given
from launch.place import Place
from launch.sweep.orphans import MARK, stop_orphans
from launch.sweep.plan import SweepPlan
from launch.sweep.table import live_view, result_row, write_results

if TYPE_CHECKING:
    from torchx.runner import Runner

JOBS_FILE, LOCK_FILE = "jobs.json", "lock"
LOCAL = ("local_cwd",)
POLL_SECONDS = {True: 0.5, False: 5.0}  # local, elsewhere
OVER = ("finished", "failed")


@dataclass
class Job:
    """State of a run: status is waiting, running, finished or failed; handle is TorchX's, of the last attempt."""

    status: str = "waiting"
    reason: str = ""
    handle: str = ""
    attempts: int = 0


@dataclass(frozen=True)
class Ended:
    """How a plan ended: its runs, and the exit code (0 all finished, 1 some failed, 128 + n stopped by signal n)."""

    jobs: Dict[str, Job]
    code: int


class Sweep:
    """A plan that is being run in its folder: jobs.json (what was submitted), the run folders, logs/, results.parquet
    and .csv.

    Args:
        plan: what is to be run.
        folder: the sweep's.
        place: where a run goes and on how much.
        scheduler, cfg: TorchX's.
        concurrency: most runs at a time.
        runner: a torchx Runner.
    """

    def __init__(self, plan: SweepPlan, folder: str, place: Place, scheduler: str, cfg: JsonObject,
                 concurrency: int, runner: "Runner"):  # fmt: skip
        self.plan, self.folder, self.place, self.runner = plan, os.path.abspath(folder), place, runner
        self.scheduler, self.cfg, self.concurrency = scheduler, cfg, concurrency
        self.is_local = scheduler in LOCAL
        if self.is_local:
            self.cfg = {"log_dir": os.path.join(self.folder, "logs"), **cfg}
        self.runs = {run.name: run for run in plan.runs}
        self.jobs = {name: Job(**job) for name, job in self._read_jobs().items() if name in self.runs}
        self.jobs = {name: self.jobs.get(name, Job()) for name in self.runs}
        self.slots: Dict[str, int] = {}  # of running jobs, 0 … concurrency − 1
        self.results: Dict[str, JsonObject] = {}  # of runs that are over
        self.messages: List[str] = []

    def run(self, retry_failed: bool, show: Callable[[Optional[str]], None]) -> None:
        """Runs what is left, and returns when every run is over."""
        self._take_up(retry_failed)
        while True:
            for name in self._with("running"):
                self._look_at(name)
            for name in self._with("waiting")[: self.concurrency - len(self._with("running"))]:
                self._submit(name)
            self._report(show)
            if not self._with("running", "waiting"):
                return
            time.sleep(POLL_SECONDS[self.is_local])

    def rows(self) -> List[JsonObject]:
        """Returns the results table, a row a run, in the sweep's order."""
        rows = []
        for name, job in self.jobs.items():
            about = {"run": name, "status": job.status, "reason": job.reason, "attempts": job.attempts}
            about.update(self.runs[name].varied)
            rows.append({**about, **self.results.get(name, {}), "folder": self.path(name), "handle": job.handle})
        return rows

    @property
    def failed(self) -> List[str]:
        """Names of the runs that failed."""
        return self._with("failed")

    def path(self, name: str) -> str:
        """Returns the run's folder."""
        return os.path.join(self.folder, self.plan.runs_folder, name)

    def put_back(self) -> None:
        """Sets runs of this machine that ended with the sweep itself to waiting again, not failed."""
        for name in self._with("running") if self.is_local else []:
            self.jobs[name].status = "waiting"
        self._save()

    def _take_up(self, retry_failed: bool) -> None:
        """Finds out how far each run has come, whoever ran it."""
        for name, job in self.jobs.items():
            if job.status == "running" and not job.handle.startswith(LOCAL):
                self._look_at(name)  # still there on its scheduler, or ended meanwhile
            elif self._is_finished(name):
                self._settle(name, "finished")
            elif job.status != "failed" or retry_failed:
                job.status, job.reason = "waiting", ""
            else:
                self._settle(name, "failed", job.reason)
        stop_orphans([self.path(name) for name in self._with("waiting")])
        self._save()

    def _is_finished(self, name: str) -> bool:
        if (read_outcome(self.path(name)) or {}).get("status") != "finished":
            return False
        least = self.runs[name].least_epochs
        return least == 0 or RunFolder.open(self.path(name)).config().trainer.max_epochs >= least

    def _submit(self, name: str) -> None:
        job, run = self.jobs[name], self.runs[name]
        try:
            app = jobs.train(run.config, run.overrides, self.path(name), True, self._place(name))
        except UserError as error:  # such as a data set that is too small
            return self._settle(name, "failed", str(error))
        with suppress(FileNotFoundError):
            os.remove(os.path.join(self.path(name), OUTCOME_FILE))  # an earlier attempt's
        job.handle = self.runner.run(app, self.scheduler, self.cfg)
        job.status, job.attempts = "running", job.attempts + 1
        self.messages.append(f"{name}: started, {job.handle}")
        self._save()

    def _place(self, name: str) -> Place:
        """On this machine, runs beside each other get a share of the cores and GPUs of their own."""
        environment = dict(self.place.env or {})
        if not self.is_local:
            return self.place
        environment[MARK] = self.path(name)
        taken = [self.slots[other] for other in self._with("running")]
        slot = self.slots[name] = min(set(range(self.concurrency)) - set(taken))
        gpus = self.place.resource.gpu
        if gpus and "CUDA_VISIBLE_DEVICES" not in environment:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(slot * gpus + gpu) for gpu in range(gpus))
        cores = 0 if self.place.h else max(1, (os.cpu_count() or 1) // self.concurrency)
        return replace(self.place, cpu=self.place.cpu or cores, env=environment)

    def _look_at(self, name: str) -> None:
        job = self.jobs[name]
        status = self.runner.status(job.handle)
        if status is not None and not status.is_terminal():
            return
        if self._is_finished(name):
            self._settle(name, "finished")
        elif status is None:  # forgotten by its scheduler
            job.status = "waiting"
        else:
            reason = (read_outcome(self.path(name)) or {}).get("reason")
            self._settle(name, "failed", reason or _why(status))

    def _settle(self, name: str, status: str, reason: str = "") -> None:
        job = self.jobs[name]
        job.status, job.reason = status, reason
        self.results[name] = result_row(self.path(name))
        self.messages.append(f"{name}: {status}" + (f": {reason}" if reason else ""))
        self._save()

    def _with(self, *statuses: str) -> List[str]:
        return [name for name, job in self.jobs.items() if job.status in statuses]

    def _report(self, show: Callable[[Optional[str]], None]) -> None:
        if self.messages:
            write_results(self.folder, self.rows())
        over = len(self._with(*OVER))
        for message in self.messages:
            show(f"[{over}/{len(self.jobs)}] {message}")
        if not self.messages:
            show(None)
        self.messages.clear()

    def _read_jobs(self) -> JsonObject:
        try:
            with open(os.path.join(self.folder, JOBS_FILE), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return {}

    def _save(self) -> None:
        jobs_ = {name: asdict(job) for name, job in self.jobs.items()}
        write_aside(os.path.join(self.folder, JOBS_FILE), json.dumps(jobs_, indent=1) + "\n")


def _why(status: Any) -> str:
    """The reason of an ended job that left none itself: what TorchX knows, and where to look."""
    said = status.msg
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        said = json.loads(status.structured_error_msg)["message"]
        said = said["message"] if isinstance(said, dict) else said
    words = " ".join(str(said).split()).replace("<NONE>", "")[:200]
    where = f"; see {status.ui_url}" if status.ui_url else ""
    return f"{status.state.name.lower()} without an outcome: {words or 'killed, or never started'}{where}"


def prepare_missing(sweep: Sweep) -> None:
    """Makes the sweep's data sets that are not there, one after the other, as jobs of the same scheduler."""
    for folder, arguments in sweep.plan.prepare.items():
        if os.path.exists(os.path.join(folder, "dataset.json")):
            continue
        print(f"{folder}: preparing", file=sys.stderr, flush=True)
        app = jobs.prepare(arguments, replace(sweep.place, nnodes=1, nproc_per_node=1, gpu=0))
        status = sweep.runner.wait(sweep.runner.run(app, sweep.scheduler, sweep.cfg), wait_interval=0.5)
        if status is None or status.state.name != "SUCCEEDED":
            raise UserError(f"prepare: {folder}: not made; see {sweep.cfg.get('log_dir', 'the logs of the job')}")


@contextmanager
def only_one(folder: str) -> Iterator[None]:
    """Holds the sweep folder's lock. Raises UserError where another process runs a sweep in this folder."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, LOCK_FILE), "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {folder}: cannot be written ({error.strerror}); name another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another sweep is running in this folder; stop it, or name another --output") from None
        yield


def run_plan(
    plan: SweepPlan, folder: str, place: Place, scheduler: str, cfg: str, concurrency: int, retry_failed: bool
) -> Ended:
    """Runs a plan to its end, as the only process in its folder, with a live table or lines on standard error.

    Args:
        plan, folder, place, scheduler, concurrency: as of `Sweep`.
        cfg: the scheduler's options, as torchx run's -cfg: key=value,….
        retry_failed: take failed runs up again.

    Raises:
        UserError: another process is at work in the folder, or an option that the scheduler does not have.
    """
    logging.getLogger("torchx").setLevel(logging.ERROR)  # its news are of every job; ours are enough
    from torchx.runner import get_runner
    from torchx.schedulers.local_scheduler import SignalException

    check_image_given(place.image, scheduler)
    with only_one(folder), get_runner() as runner:
        sweep = Sweep(plan, folder, place, scheduler, _scheduler_options(runner, scheduler, cfg), concurrency, runner)
        try:
            prepare_missing(sweep)
            with live_view(sweep.rows, folder) as show:
                sweep.run(retry_failed, show)
        except (KeyboardInterrupt, SignalException) as stopped:
            sweep.put_back()
            print("stopped; the same command goes on", file=sys.stderr)
            return Ended(sweep.jobs, 128 + getattr(stopped, "sigval", 2))
    return Ended(sweep.jobs, 1 if sweep.failed else 0)


def _scheduler_options(runner: Any, scheduler: str, text: str) -> JsonObject:
    known = runner.scheduler_backends()
    if scheduler not in known:
        raise UserError(f"--scheduler: {scheduler} is none of {', '.join(known)}")
    names = {name for name, _ in runner.scheduler_run_opts(scheduler)}
    for pair in filter(None, text.split(",")):
        name = pair.split("=", 1)[0]
        if name not in names and "=" in pair:
            raise UserError(f"--cfg: {scheduler} has no option {name}; it has {', '.join(sorted(names))}")
    return dict(runner.cfg_from_str(scheduler, text)) if text else {}
