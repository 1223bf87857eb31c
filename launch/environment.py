"""How processes find each other, wait for each other and are started again: everything that is set for them, and why.

docs/launch.md tells the same to users, with what is left to them (network interfaces).
"""

import re
import shlex
import sys
from typing import Dict, List, Optional

from torchx.specs import macros

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.run.lock import GRACE
from launch.hosts import Nodes

# How long the nodes of a job wait for each other, at first and after a restart (a node may still be pulling its image).
JOIN_SECONDS = 900
# How long an agent waits for the store on the first node to answer.
STORE_SECONDS = 600
# How long the nodes of an elastic job wait for more, once the least are there. About what a start of the workers takes: a
# node that comes later has them all save and start again.
LAST_CALL_SECONDS = 30
# From SIGTERM until torchrun kills its workers, who finish their step and save meanwhile. A scheduler's own patience has
# to be longer: Kubernetes is told (GRACE_SECONDS), Slurm's KillWait is the administrator's and 30 s unless changed.
GRACE_SECONDS = int(GRACE)
SAVE_SECONDS = GRACE_SECONDS - 20
# Values that every scheduler hands on as they are: Slurm's --export parts them at commas, Kubernetes and TorchX replace what
# follows a dollar.
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:./-]*")
QUOTING = "a value with = in it needs quotes: --env 'A=\"b=c\"'"


def environment(cores: Optional[int], processes: int, given: Optional[Dict[str, str]]) -> Dict[str, str]:
    """Makes the environment of a node's processes; what the user gives comes last, so far as every scheduler hands it on
    as it is (`exports` is the rest). Raises UserError for what is no name.

    Args:
        cores: of a node, where they are known.
        processes: of a node.
    """
    values = {
        # Without it torchrun's restarts are unreliable: the workers' store is then the agents' own, and keys of the last
        # round confuse the next (torch 2.13: killing rank 0 hung the job).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # What a process prints is there when it is killed.
        "PYTHONUNBUFFERED": "1",
        # NCCL's warnings name the interface or the peer that failed; it is silent otherwise.
        "NCCL_DEBUG": "WARN",
    }
    if cores is not None or processes > 1:  # one process alone takes all cores there are
        values["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // processes))
    for name in given or {}:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env: {name!r} is no variable's name; write NAME=VALUE,NAME=VALUE ({QUOTING})")
    return {**values, **{name: value for name, value in (given or {}).items() if PLAIN.fullmatch(value)}}


def exports(given: Optional[Dict[str, str]]) -> str:
    """Writes what sets the user's other variables at the head of a job's bash command, where no scheduler touches them."""
    words = [f"{name}={value}" for name, value in (given or {}).items() if not PLAIN.fullmatch(value)]
    return f"export {quoted(words)}; " if words else ""


def torchrun(nodes: Nodes, processes: int, restarts: int, port: int, python: str, module: List[str]) -> str:
    """Writes the bash command that runs a Python module on every process of a node.

    The agents meet at the first node (c10d); a single node chooses a free port itself. Which node holds the store is said
    outright: comparing host names fails where they resolve to something else, as in pods. The workers' own port
    (MASTER_PORT) is a free one that the agents choose anew at every restart.
    """
    words = [python, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(processes)]
    words += ["--max-restarts", str(restarts), "--shutdown-timeout", str(SAVE_SECONDS), "--monitor-interval", "1"]
    # Every process's output, marked with its rank, goes to the job's own.
    words += ["--tee", "3", "--role", "", "--rdzv-backend", "c10d"]
    timeouts = f"join_timeout={JOIN_SECONDS},read_timeout={STORE_SECONDS}"
    if nodes.is_elastic:
        timeouts += f",last_call_timeout={LAST_CALL_SECONDS}"
    if nodes.most == 1:
        meeting = f"--rdzv-endpoint localhost:0 --rdzv-id {macros.app_id} --rdzv-conf {timeouts}"
    else:
        first = f"$$(({macros.replica_id} == 0))"
        endpoint = f'"$${{{macros.rank0_env}:=localhost}}:{port}"'
        meeting = f"--rdzv-endpoint {endpoint} --rdzv-id {macros.app_id} --rdzv-conf {timeouts},is_host={first}"
    # exec: torchrun itself is what the scheduler signals, and a pod's first process.
    return f"exec {quoted(words)} {meeting} {quoted(['-m', *module])}"


def quoted(words: List[str]) -> str:
    """Quotes words for bash, so that nobody on the way takes a part of one for something to replace: TorchX its macros
    (${app_id}, $$), Slurm's script of TorchX's the same again, Kubernetes $(NAME) and $$.

    They know a dollar by what follows it: here it is always the end of a quotation, which bash takes away at last.
    """
    return shlex.join(words).replace("$", "$''")


def interpreter(image: Optional[str]) -> str:
    """Names the Python of a job: an image has its own; elsewhere it is the one that submits, on a file system that
    all nodes see."""
    return "python" if image else sys.executable
