"""The command line, one module a command."""

from fuxi_torchrec.cli.main import main

__all__ = ["main"]
