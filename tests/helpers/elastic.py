"""The nodes of an elastic job as processes of this machine, and which users each of its steps trained on."""

import json
import os
import signal
import socket
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torchx.specs import macros

from launch import components
from tests.helpers.command_line import ROOT, SMOKE

# Every step leaves a line with its users. Until the file "hurry" is there a start's first steps take a moment, and the later
# ones longer, so that the run does not end before a node is back.
RECORDED = """
import json, os, sys, time
from fuxi_torchrec.training import Trainer
from fuxi_torchrec.cli import main
step, folder, made = Trainer.step, os.environ["RECORDS"], []
file = open(f"{folder}/{time.time():.3f}-{os.getpid()}.jsonl", "w", buffering=1)
def recorded(self, batch):
    if not os.path.exists(f"{folder}/hurry"):
        time.sleep(0.1 if len(made) < 12 else 1.0)
    done = step(self, batch)
    if not done.totals.tokens:  # none: the epoch had ended
        return done
    made.append(batch.cursor.step)
    place = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    cursor = {"step": batch.cursor.step, "epoch": batch.cursor.epoch}
    file.write(json.dumps({**place, **cursor, "users": batch.user_ids_B.tolist()}) + chr(10))
    return done
Trainer.step = recorded
sys.exit(main())
"""


@dataclass
class Stretch:
    """What one start of the workers trained: its size, and its users of every step, as {step: (epoch, users)}."""

    size: int
    steps: dict


class Job:
    """The nodes of a training; node N is `bash -c` of what a scheduler would run there."""

    def __init__(self, folder, data, *overrides, port, timeouts="", **place):
        self.folder, self.records, self.run = folder, folder / "records", folder / "run"
        self.records.mkdir()
        (folder / "main.py").write_text(RECORDED)
        words = ("--data.path", str(data), *map(str, overrides))
        app = components.train(*words, config=SMOKE, output=str(self.run), rdzv_port=port, **place)
        (self.role,) = app.roles
        self.script = self.role.args[1].replace("-m fuxi_torchrec train", f"{folder}/main.py train")
        self.script = self.script.replace("last_call_timeout=30", timeouts or "last_call_timeout=30")
        self.nodes = {}

    def start(self, node):
        values = macros.Values(img_root="", app_id=f"job-{self.folder.name}", replica_id=str(node), rank0_env="FIRST")
        with open(self.folder / f"node-{node}.err", "a") as errors:
            environment = {**os.environ, **self.role.env, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
            environment.update(RECORDS=str(self.records), NODE=f"{self.folder.name}-{node}", FIRST="127.0.0.1")
            self.nodes[node] = subprocess.Popen(
                ["bash", "-c", values.substitute(self.script)], stdout=subprocess.DEVNULL, stderr=errors, env=environment,
                cwd=ROOT, start_new_session=True,
            )

    def kill(self, node):
        """kill -9 of everything that runs on a node, again until nothing is left."""
        mark = f"NODE={self.folder.name}-{node}".encode()
        while found := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in _environment(pid)]:
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.nodes[node].poll()  # collects it

    def end(self):
        for node in self.nodes:
            self.kill(node)

    def hurry(self):
        (self.records / "hurry").touch()

    def stretches(self):
        """Every start of the workers that made a step, in their order."""
        return stretches(self.records)

    def said(self):
        return "\n".join(f"== {file.name}\n{file.read_text()[-6000:]}" for file in sorted(self.folder.glob("node-*.err")))


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _environment(pid):
    try:
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return values if b"Z" not in Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2][:3] else []
    except OSError:  # gone by now
        return []


def stretches(records):
    """Reads what the workers of RECORDED left in a folder."""
    found = {}
    for file in sorted(records.glob("*.jsonl"), key=lambda file: float(file.name.partition("-")[0])):
        for text in file.read_text().splitlines():
            if not text.endswith("}"):
                continue  # being written
            line = json.loads(text)
            stretch = found.setdefault(line["MASTER_PORT"], Stretch(line["WORLD_SIZE"], {}))
            stretch.steps.setdefault(line["step"], (line["epoch"], []))[1].extend(line["users"])
    return list(found.values())


def users_by_epoch(found):
    """How often each user counted, as {epoch: {user: times}}: of steps that were made again, the last time alone."""
    kept = {}
    for stretch in found:
        kept = {step: of_step for step, of_step in kept.items() if step < min(stretch.steps)}
        kept.update(stretch.steps)
    epochs = {}
    for epoch, users in kept.values():
        epochs.setdefault(epoch, Counter()).update(users)
    return epochs
