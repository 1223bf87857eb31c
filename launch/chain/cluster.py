"""A chain's submission with the checks of `torchx run`, and with the same lines where a scheduler refuses."""

import argparse
import sys
from typing import List

from torchx.cli.cmd_run import CmdRun
from torchx.runner import config, get_runner

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from launch import torchx_run
from launch.chain.pod import submit_pod
from launch.chain.slurm import SlurmChain
from launch.chain.steps import Step


class ChainRun(CmdRun):
    """TorchX's command with a chain in the place of a component."""

    def __init__(self, steps: List[Step]):
        super().__init__()
        self.steps = steps

    def run(self, args: argparse.Namespace) -> None:
        """Submits the chain, or with --dryrun shows what would be submitted; ends the program with its exit code."""
        try:
            raise SystemExit(self._submit(args))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.code) from None

    def _submit(self, args: argparse.Namespace) -> int:
        with get_runner() as runner:
            cfg: JsonObject = runner.scheduler_run_opts(args.scheduler).cfg_from_str(args.scheduler_args)
            config.apply(scheduler=args.scheduler, cfg=cfg)
            if args.scheduler == "kubernetes":
                return submit_pod(self.steps, runner, cfg, args.workspace, args.dryrun)
            chain = SlurmChain(self.steps, runner, cfg, args.workspace)
            return chain.show() if args.dryrun else chain.submit()


class Submission(torchx_run.Run, ChainRun):
    """A chain's command behind the checks of `torchx run`: by the order of these two, what they let pass comes to ChainRun."""

    def submit(self, args: argparse.Namespace) -> int:
        """Checks and submits. Returns the exit code."""
        try:
            self.run(args)
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0
