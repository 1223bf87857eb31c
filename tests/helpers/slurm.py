"""The two-node Slurm of slurm_cluster.sh for tests: its commands with time limits, and the processes of its jobs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
TORCHX = [sys.executable, "-m", "torchx.cli.main"]
CANNOT = 3  # exit code of the script where the machine is not one for it


class Slurm:
    """Up until `down`; jobs are submitted from `folder`, where their output is. $SLURM_SOFTWARE: where it is unpacked, or is
    to be; the environment's own folder, unless named."""

    def __init__(self, folder):
        self.folder, self.state = folder, folder / "slurm"
        # As an installed package registers it; the environment that tests run in may be older.
        plugin = folder / "plugin" / "fuxi_schedulers-0.dist-info"
        plugin.mkdir(parents=True)
        (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: fuxi-schedulers\nVersion: 0\n")
        (plugin / "entry_points.txt").write_text("[torchx.schedulers]\nslurm = launch.slurm:create_scheduler\n")
        self.software = software = Path(os.environ.get("SLURM_SOFTWARE") or Path(sys.prefix) / "slurm")
        self._script("install", software)
        self._script("up", software, self.state)
        path = f"{software / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.state / "slurm.conf")}
        self.environment["PYTHONPATH"] = f"{ROOT}:{plugin.parent}:{os.environ.get('PYTHONPATH', '')}"

    def _script(self, *words):
        port = 20000 + os.getpid() % 1000 * 10
        done = subprocess.run(
            [SCRIPT, *words], env={**os.environ, "SLURM_PORT": str(port)}, stdin=subprocess.DEVNULL, timeout=240,
            stdout=subprocess.DEVNULL, stderr=open(self.folder / "slurm.err", "w+"), check=False,
        )
        said = (self.folder / "slurm.err").read_text().strip()
        if done.returncode == CANNOT:
            pytest.skip(f"no Slurm here: {said}")
        assert done.returncode == 0, said

    def down(self):
        self._script("down", self.state)

    def run(self, *words, check=True, timeout=60):
        """A command's standard output, or with check=False the finished process."""
        command, where = [str(word) for word in words], {"env": self.environment, "cwd": self.folder}
        done = subprocess.run(command, **where, timeout=timeout, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout if check else done

    def torchx(self, *words, check=True, timeout=60):
        return self.run(*TORCHX, *words, check=check, timeout=timeout)

    def status(self, handle):
        """What `torchx status` says: PENDING, RUNNING, SUCCEEDED, …"""
        done = self.torchx("status", handle, check=False)
        states = [line.split()[1] for line in done.stdout.splitlines() if line.strip().startswith("State:")]
        return states[0] if states else f"no state: {done.stdout}{done.stderr}"

    def wait(self, handle, timeout=400):
        """The state in which a job ended."""
        job, end = handle.rpartition("/")[2], time.monotonic() + timeout
        while self.run("squeue", "--noheader", "--jobs", job, check=False).stdout.strip():
            assert time.monotonic() < end, self.said()
            time.sleep(0.5)
        return self.status(handle)

    def processes(self, handle, node=None):
        """The processes that a job's steps started, on one node or all, as {pid: environment}."""
        job, found = int(handle.rpartition("/")[2]), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                values = dict(item.partition("=")[::2] for item in (folder / "environ").read_text().split("\0"))
            except (OSError, UnicodeDecodeError):
                continue
            ours = values.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_STEP_ID" in values
            # The parts of a job of several nodes are numbered on from its own number.
            jobs = (int(values["SLURM_JOB_ID"]), int(values.get("SLURM_ARRAY_JOB_ID", 0))) if ours else ()
            if {job, job + 1} & set(jobs) and node in (None, values["SLURMD_NODENAME"]):
                found[int(folder.name)] = values
        return found

    def workers(self, handle):
        """The processes that train, as {pid: environment}."""
        return {pid: values for pid, values in self.processes(handle).items() if "RANK" in values}

    def kill(self, pids):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def lose(self, node):
        """kill -9 of all that runs on a node: its daemon, what watches over jobs there, and the jobs."""
        mine, found = f"SLURM_CONF={self.environment['SLURM_CONF']}", [int(self._daemon(node).read_text())]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                values = (folder / "environ").read_text().split("\0")
                parent = Path("/proc") / (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if mine in values and f"SLURMD_NODENAME={node}" in values:
                    watched = (parent / "comm").read_text().startswith("slurmstepd")
                    found[1:1] = [int(parent.name)] if watched else []
                    found.append(int(folder.name))
            except (OSError, UnicodeDecodeError):
                continue
        self.kill(found)

    def bring_back(self, node):
        """Starts a lost node's daemon."""
        self._daemon(node).unlink()
        self.run("slurmd", "-N", node, "-d", self.software / "bin" / "slurmstepd")

    def _daemon(self, node):
        return self.state / "run" / f"slurmd.{node}.pid"

    def said(self):
        """All that jobs and daemons printed, for a failed test."""
        files = [*self.folder.rglob("slurm-*.*"), *(self.state / "log").glob("slurm*")]
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(files))


def until(condition, timeout=120):
    """Waits for condition() to be true; whether it became so."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False
