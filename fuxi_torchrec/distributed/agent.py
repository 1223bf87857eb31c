"""What torchrun, whose agent started this process, was told."""

import os
import re
from typing import List, Optional

from fuxi_torchrec.errors import LostProcess


def check_all_nodes_met() -> None:
    """Checks that torchrun has not gone on without a node that it was told of.

    It does where the hosts' clocks differ by more than 15 seconds: its agents tell each other the time as a sign of life,
    and the one whose clock is ahead takes the others for dead. Raises LostProcess.
    """
    met, wanted = os.environ.get("GROUP_WORLD_SIZE"), _least_nodes(_agent_command())
    if met is not None and wanted is not None and int(met) < wanted:
        raise LostProcess(
            f"{met} of {wanted} nodes met, and torchrun goes on without the others; compare the hosts' clocks (date): they "
            "may differ by 15 seconds at most"
        )


def _agent_command() -> List[str]:
    """The words that this process's parent was started with; none where the system does not tell."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().split("\0")
    except OSError:
        return []


def _least_nodes(words: List[str]) -> Optional[int]:
    """The MIN of torchrun's --nnodes MIN or MIN:MAX; None where nothing says so."""
    told = re.search(r"\0--?nnodes[=\0](\d+)", "\0".join(words))
    return int(told[1]) if told else None
