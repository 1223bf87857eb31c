"""`torchx run` and its sisters with mistakes told in one line; `run` tells those in the scheduler's options before anything
is submitted.

TorchX finds them as entry points (torchx.cli.cmds) of the installed package; without them the same commands work, and such
a mistake ends in TorchX's traceback or sbatch's message.
"""

import argparse
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional

from torchx.cli.cmd_cancel import CmdCancel
from torchx.cli.cmd_delete import CmdDelete
from torchx.cli.cmd_list import CmdList
from torchx.cli.cmd_log import CmdLog
from torchx.cli.cmd_run import CmdRun
from torchx.cli.cmd_status import CmdStatus
from torchx.runner import Runner, config, get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import AppDef, InvalidRunConfigException

from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject
from launch.environment import QUOTING
from launch.images import check_app


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Ends the program with one line for a UserError."""
    threads_end = threading.excepthook
    # A thread of TorchX's that reads a log raises in itself what it hands on to the main one.
    threading.excepthook = lambda end: None if issubclass(end.exc_type, UserError) else threads_end(end)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    finally:
        threading.excepthook = threads_end


class Run(CmdRun):
    """TorchX's own command, with checks before it and its expected errors in one line."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """Adds TorchX's arguments, with TorchX's own default of the scheduler."""
        super().add_arguments(subparser)
        keep_default_scheduler(subparser, "run")

    def run(self, args: argparse.Namespace) -> None:
        """Checks the scheduler's options and submits the job; ends the program with one line for a mistake."""
        try:
            with mistakes_told():
                if not args.stdin:
                    check(args)
                super().run(args)
        except SignalException as stopped:
            # TorchX has passed it on as SIGTERM and waited (ten seconds) when this comes here.
            print("stopped; a training has saved, and goes on by the same command with --resume True", file=sys.stderr)
            raise SystemExit(128 + stopped.sigval) from None
        except Exception as error:
            message = _message(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2) from None

    def _run_inner(self, runner: Runner, args: Any, json_output: bool) -> None:
        """TorchX's, with a look at the application before its image is built: only by then is its scheduler known too."""
        dryrun = runner.dryrun

        def checked(app: AppDef, scheduler: str, **options: Any) -> Any:
            check_app(app, scheduler)
            return dryrun(app, scheduler, **options)

        runner.dryrun = checked
        super()._run_inner(runner, args, json_output)


class Told:
    """Mixed into one of TorchX's own commands: its expected errors in one line."""

    def run(self, args: argparse.Namespace) -> None:
        """Runs the command."""
        with mistakes_told():
            super().run(args)  # type: ignore[misc]


class Listing(Told, CmdList):
    """TorchX's `list`."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """Adds TorchX's arguments, with TorchX's own default of the scheduler."""
        super().add_arguments(subparser)
        keep_default_scheduler(subparser, "list")


class Status(Told, CmdStatus):
    """TorchX's `status`."""


class Cancel(Told, CmdCancel):
    """TorchX's `cancel`."""


class Delete(Told, CmdDelete):
    """TorchX's `delete`."""


class Log(Told, CmdLog):
    """TorchX's `log`."""


def keep_default_scheduler(subparser: argparse.ArgumentParser, command: str) -> None:
    """Keeps TorchX's own default where no .torchxconfig names one: a scheduler that a package brings, as this one does,
    would take its place."""
    if config.get_config(prefix="cli", name=command, key="scheduler") is None:
        subparser.set_defaults(scheduler=next(iter(DEFAULT_SCHEDULER_MODULES)))


def check(args: argparse.Namespace) -> None:
    """Checks the scheduler's options. Raises UserError for those that TorchX does not know or misses, and for what is
    not there."""
    with get_runner() as runner:
        options = runner.scheduler_run_opts(args.scheduler)
    try:
        chosen: JsonObject = options.cfg_from_str(args.scheduler_args or "")
        config.apply(scheduler=args.scheduler, cfg=chosen)
        chosen = options.resolve(chosen)
    except (InvalidRunConfigException, ValueError) as error:
        text = str(error).split(" Given: ")[0].splitlines()[0].rstrip(".")
        raise UserError(f"-cfg, scheduler {args.scheduler}: {text}; see torchx runopts {args.scheduler}") from None
    check_pairs(args.component_name_and_args)
    if args.scheduler == "slurm":
        check_slurm(chosen.get("partition"), args.dryrun)


def check_pairs(words: List[str]) -> None:
    """Checks options that hold NAME=VALUE,…. Raises UserError where TorchX would drop a "=" at the end in silence."""
    words = words[: words.index("--")] if "--" in words else words
    for option, value in zip(words, words[1:]):
        if option in ("--env", "--metadata", "--devices") and value.rstrip(" ").endswith("="):
            raise UserError(f"{option}: {value}: ends with =; {QUOTING}; write an empty one as \"NAME=''\"")


def check_slurm(partition: Optional[str], dryrun: bool) -> None:
    """Checks that this Slurm can take the job. Raises UserError for a partition that it does not have, or where one
    has to be named."""
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        if dryrun:
            return
        raise UserError("no Slurm here (sbatch is not on the PATH); submit from a login node, or look with --dryrun")
    command = ["sinfo", "--noheader", "--format", "%P"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
    if said.returncode != 0:
        if dryrun:
            return
        reason = (said.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"Slurm does not answer ({reason}); nothing was submitted")
    names = said.stdout.split()
    there = ", ".join(name.rstrip("*") for name in names)
    if partition is None and not any(name.endswith("*") for name in names):
        raise UserError(f"-cfg partition: this Slurm has no default partition; name one of {there}")
    for name in (partition or "").split(","):
        if name and name not in [known.rstrip("*") for known in names]:
            raise UserError(f"-cfg partition={partition}: no such partition; there are {there}")


def _message(error: Exception) -> Optional[str]:
    """The one line for a mistake, or for a scheduler that refuses; None for a defect. Kubernetes' answers are UserErrors
    already (launch/kubernetes)."""
    module, text = type(error).__module__, one_line(error)
    if isinstance(error, subprocess.CalledProcessError) and error.cmd[0] == "sbatch":
        return "sbatch refused the job, for the reason above; nothing was submitted"
    if module.startswith("docker."):
        why = "which TorchX needs to build this folder into the image"
        return f"no Docker here, {why} ({text[:160]}); --workspace '' takes the image as it is"
    if isinstance(error, ValueError) and re.search("cannot be split into|at least one `key=value` pair", text):
        return f"--env, --metadata or --devices: {text}; write NAME=VALUE,NAME=VALUE; {QUOTING}"
    return None
