"""Runs a chain: `python -m launch.chain [-s SCHEDULER] [-cfg KEY=VALUE,…] [--dryrun] CHAIN.yaml [OPTION …]`, docs/chain.md."""

import argparse
import logging
import os
import sys
from typing import List, NoReturn, Optional

from fuxi_torchrec.cli.streams import run_on_streams
from fuxi_torchrec.errors import UserError
from launch.chain.plan import NAMES, read_chain, split
from launch.chain.steps import Step

SCHEDULERS = ("local_cwd", "slurm", "kubernetes")
ABOUT = "Prepares a data set, trains on it and evaluates, in turn; what is done already stays. See docs/chain.md."


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the command line. Exit codes: 0 done (on a cluster: submitted), 2 a mistake (one line), 75 the chain is under
    way already; on this machine otherwise the first failing step's, or 128 + n stopped by signal n."""
    options = _parser().parse_args(arguments)
    try:
        return _main(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    from torchx.cli.argparse_util import ArgOnceAction, torchxconfig_run

    parser = _Parser(prog="python -m launch.chain", description=ABOUT, add_help=False, allow_abbrev=False)
    option = parser.add_argument
    option("--help", action="help", help="show this and end; -h is a step's host")
    option("-s", "--scheduler", default="local_cwd", action=torchxconfig_run, help=f"one of {', '.join(SCHEDULERS)}")
    option("-cfg", "--scheduler_args", default="", action=ArgOnceAction, help="the scheduler's: see torchx runopts")
    option("--dryrun", action="store_true", help="show what would be submitted, with every check")
    option("--workspace", default=os.getcwd(), action=torchxconfig_run, help="as of torchx run; '' takes the image as it is")
    for name in NAMES:
        option(f"--{name}", help=f"words of torchx run launch/components.py:{name}, before those of the file")
    option("chain", nargs="?", help="YAML file of the chain: configs/chains/…")
    option("shared", nargs=argparse.REMAINDER, help="options of every step that takes them: -h, --image, --mounts, --env, …")
    return parser


def _main(options: argparse.Namespace) -> int:
    if options.scheduler not in SCHEDULERS:
        raise UserError(f"-s {options.scheduler}: a chain runs on one of {', '.join(SCHEDULERS)}")
    given = {name: split(f"--{name}", words) for name in NAMES if (words := getattr(options, name)) is not None}
    steps = read_chain(options.chain, given, options.shared)
    for step in steps:
        if step.place.image is not None and options.scheduler != "kubernetes":
            raise UserError(f"{step.name}: --image: of these schedulers kubernetes alone runs images; leave it out")
    if options.scheduler != "local_cwd":
        return _on_cluster(options, steps)
    if options.scheduler_args:
        raise UserError(f"-cfg {options.scheduler_args}: a chain on this machine has no such options; leave it out")
    from launch.chain.here import run_here, show_here

    return show_here(steps) if options.dryrun else run_here(steps)


def _on_cluster(options: argparse.Namespace, steps: List[Step]) -> int:
    logging.getLogger("torchx").setLevel(logging.ERROR)  # its news are of every job; ours are enough
    from launch.chain.cluster import Submission

    options.stdin, options.component_name_and_args = False, []
    return Submission(steps).submit(options)


if __name__ == "__main__":
    sys.exit(run_on_streams(main))
