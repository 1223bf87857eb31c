"""The command line in processes of its own: under torchrun, alone, or as ranks that nobody watches."""

import os
import signal
import socket
import subprocess
import sys
import time

from tests.helpers.command_line import ROOT, SMOKE

# Small enough that a start costs more than the training: 150 users, 8 steps an epoch on two processes.
SMALL = (
    *("--data.max_sequence_length", "20", "--data.batch_size", "16", "--data.shuffle_buffer", "20"),
    *("--model.embedding_dim", "8", "--model.value_dim", "8", "--loss.num_negatives", "10"),
    *("--trainer.device", "cpu", "--trainer.log_every_steps", "1", "--evaluation.every_epochs", "1"),
    *("--trainer.max_epochs", "4", "--trainer.checkpoint_every_steps", "2"),
)
# A step that takes a moment, so that a signal sent in the middle of the run meets it there.
SLOWLY = """
import os, sys, time
from fuxi_torchrec.training import Trainer
step = Trainer.step
def slow(self, batch):
    time.sleep(float(os.environ.get("SLOW", 0)))
    return step(self, batch)
Trainer.step = slow
"""
MAIN = "from fuxi_torchrec.cli import main\nsys.exit(main())\n"


class Launch:
    """torchrun (or one process) training in the background, its workers' process ids, and its end.

    torchrun: more words for it; host: of tests/helpers/network.py.
    """

    def __init__(
        self, folder, data, output, *options, processes=2, restarts=0, before="", slow=0.0, config=SMOKE, torchrun=(), host=None
    ):
        self.output, self.script = output, folder / f"main-{time.monotonic_ns()}.py"
        self.script.write_text(SLOWLY + before + MAIN)
        agent = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
        words = [*agent, "--monitor-interval", "0.1", *torchrun] if processes else []
        words += [self.script, "train", config, "--data.path", data, "--output", output, *SMALL, *options]
        environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "SLOW": str(slow)}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        environment.update(host.environment if host else {})
        self.errors = folder / f"{self.script.stem}.err"
        with open(self.errors, "w") as errors:
            command = [*(host.enter if host else ()), sys.executable, *map(str, words)]
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
            )

    def workers(self):
        children = open(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read().split()
        return [int(child) for child in children]

    def wait(self, timeout=120):
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def complaints(self):
        return [line for line in self.errors.read_text().splitlines() if line.startswith("error: ")]

    def until(self, condition, timeout=90):
        """Waits for condition() to be true while the job runs; whether it became so."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False


class Ranks:
    """The command line as ranks of one world without torchrun, as a cluster's scheduler starts them: nobody ends one for
    the sake of another.

    hosts: one a rank, of tests/helpers/network.py; environments: more variables, a mapping a rank; program: the whole of
    what they run, instead of the command line.
    """

    def __init__(
        self, folder, data, output, *options, size=2, before="", slow=0.0, hosts=None, environments=None, program=None
    ):
        script = folder / "main.py"
        script.write_text(program or SLOWLY + before + MAIN)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = hosts[0].address if hosts else "127.0.0.1"
        place = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        words = [sys.executable, script, "train", SMOKE, "--data.path", data, "--output", output, *SMALL, *options]
        self.errors, self.processes = [folder / f"rank-{rank}.err" for rank in range(size)], []
        for rank, errors in enumerate(self.errors):
            more = {**place, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "SLOW": slow}
            more.update(hosts[rank].environment if hosts else {}, **(environments[rank] if environments else {}))
            environment = {**os.environ, **{name: str(value) for name, value in more.items()}}
            command = list(map(str, (*(hosts[rank].enter if hosts else ()), *words)))
            with open(errors, "w") as file:
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment, cwd=ROOT)
            self.processes.append(process)

    def wait(self, timeout=60):
        """Every rank's exit code."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def complaints(self):
        """Every rank's error lines."""
        return [
            [line for line in errors.read_text().splitlines() if line.startswith("error: ")] for errors in self.errors
        ]
