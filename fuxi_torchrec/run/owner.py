"""Who a process is beyond its number: its machine, its start and its launch. No torch.

A process number says nothing across machines, containers or reboots, so an owner is kept with all that makes it unique.
"""

import os
import socket
from dataclasses import dataclass
from typing import List, Optional


@dataclass(frozen=True)
class Owner:
    """Identifies one process.

    Attributes:
        host, boot, namespace: its machine, that machine's boot, and its namespace of process numbers (containers of one
            machine each have their own); boot is "" where the system does not tell.
        pid, started: its number, and its start in clock ticks after the boot.
        launches: names of what started it that no two launches share: TorchX's job (Volcano's and Slurm's among them),
            torchrun's run id.
        slurm_job, slurm_restarts: the job, which several launches may share, and how often Slurm has requeued it.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    launches: List[str]
    slurm_job: str
    slurm_restarts: int

    def is_dead(self, here: "Owner") -> bool:
        """Tells whether this process has certainly ended: known only of the machine that `here` runs on."""
        return self.shares_machine(here) and _start_of(self.pid) not in (None, self.started)

    def is_restarted_as(self, other: "Owner") -> bool:
        """Tells whether `other` is a later start of this process's launch, on another machine: a launch runs once at a
        time. On one machine the process itself tells."""
        if self.shares_machine(other):
            return False
        requeued = bool(self.slurm_job) and self.slurm_job == other.slurm_job
        requeued = requeued and other.slurm_restarts > self.slurm_restarts
        return requeued or bool(set(self.launches) & set(other.launches))

    def shares_machine(self, other: "Owner") -> bool:
        """Tells whether this process runs on the machine that `here` runs on."""
        mine, others = ((owner.host, owner.boot, owner.namespace) for owner in (self, other))
        return bool(self.boot) and mine == others

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" ({self.launches[0]})" if self.launches else "")


def this_process() -> Owner:
    """Returns the process that calls."""
    environment = os.environ
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    torchrun = f"torchrun {run_id}" if run_id not in (None, "", "none") else None  # "none" is torchrun's default
    launches = [name for name in (environment.get("TORCHX_JOB_ID"), torchrun) if name]
    return Owner(
        host=socket.gethostname(),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        launches=launches,
        slurm_job=environment.get("SLURM_JOB_ID", ""),
        slurm_restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
    )


def _start_of(pid: int) -> Optional[str]:
    """Returns when a process of this machine started, "" where there is none, None where that cannot be known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass  # another user's
    # After the name in parentheses, which may hold anything: the state, and as the 20th field the start.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
