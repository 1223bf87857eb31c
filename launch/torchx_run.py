"""`torchx run` with mistakes in the scheduler's options told in one line, before anything is submitted.

TorchX finds it as an entry point (torchx.cli.cmds) of the installed package; without it the same command works, and such a
mistake ends in TorchX's traceback or sbatch's message.
"""

import argparse
import shutil
import subprocess
import sys
from typing import Optional

from torchx.cli.cmd_run import CmdRun
from torchx.runner import config, get_runner
from torchx.schedulers.local_scheduler import SignalException
from torchx.specs import InvalidRunConfigException

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject


class Run(CmdRun):
    """TorchX's own command, with checks before it and its expected errors in one line."""

    def run(self, args: argparse.Namespace) -> None:
        """Checks the scheduler's options and submits the job; ends the program with one line for a mistake."""
        try:
            if not args.stdin:
                check(args)
            super().run(args)
        except SignalException as stopped:
            # TorchX has passed it on as SIGTERM and waited (ten seconds) when this comes here.
            print("stopped; a training has saved, and goes on by the same command with --resume True", file=sys.stderr)
            raise SystemExit(128 + stopped.sigval) from None
        except Exception as error:
            message = _message(error, args.scheduler)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2) from None


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
    if args.scheduler == "slurm":
        check_slurm(chosen.get("partition"), args.dryrun)


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


def _message(error: Exception, scheduler: str) -> Optional[str]:
    """The one line for a mistake, or for a scheduler that refuses or does not answer; None for a defect."""
    module, text = type(error).__module__, " ".join(str(error).split())[:160]
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, subprocess.CalledProcessError) and error.cmd[0] == "sbatch":
        return "sbatch refused the job, for the reason above; nothing was submitted"
    if module.startswith("docker."):
        why = "which TorchX needs to build this folder into the image"
        return f"no Docker here, {why} ({text}); --workspace '' takes the image as it is"
    if module.startswith(("urllib3.", "kubernetes.")):
        return f"Kubernetes does not answer ({text}); look at kubectl config, or use --dryrun -cfg validate_spec=False,…"
    if scheduler == "kubernetes" and isinstance(error, ValueError):  # what the API server refused
        return f"{text}; nothing was submitted"
    return None
