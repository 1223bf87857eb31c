"""TorchX components: `torchx run -s SCHEDULER launch/components.py:train --config CONFIG …`, see docs/launch.md.

What they check, they check before anything is submitted; a mistake is one line and exit code 2. TorchX reads annotations as
typing's Optional, Dict and List alone, and the docstrings as help.
"""

import sys
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional

from torchx import specs

from fuxi_torchrec.errors import UserError
from launch import jobs
from launch.place import Place


@contextmanager
def one_line() -> Iterator[None]:
    """Ends the program with one line and exit code 2 for a mistake of the user's."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train(
    *overrides: str,
    config: str,
    output: Optional[str] = None,
    resume: bool = False,
    nnodes: str = "1",
    nproc_per_node: int = 0,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    devices: Optional[Dict[str, str]] = None,
    image: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_restarts: int = 3,
    max_retries: int = 1,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains a config on any number of nodes by torchrun, and goes on by itself after a lost worker or node.

    Args:
        overrides: keys of the config, after a double dash: -- --data.path data/ml-1m --trainer.max_epochs 20
        config: YAML file of the run, looked at here before the job is submitted; with an image it must be in there as well
        output: run folder, on storage that all nodes see; it is fixed at submission, so that a restarted or requeued job
            finds its checkpoints (default: runs/CONFIG-DATE-TIME)
        resume: True goes on with a run that is already at --output, which is refused otherwise
        nnodes: nodes, all of which the job waits for; or MIN:MAX: it trains on as many as there are, at least MIN
        nproc_per_node: processes a node; 0: as many as GPUs, or one without GPUs
        h: what a node has, by name: h100x8, a100x8, cpu, or a named resource of TorchX's
        cpu: CPU cores a node, shared out among its processes' threads; 0: as h says, or one a process
        gpu: GPUs a node; 0: as h says, or none
        memMB: memory a node, in MB; 0: as h says, or whatever the scheduler gives
        devices: further devices a node (Kubernetes): rdma/ib=8
        image: container image to run in, where the scheduler runs containers; paths are then the image's
        mounts: type=volume,src=CLAIM,dst=/data or type=bind,src=/host,dst=/data[,readonly], one after the other
        env: environment of every process: NAME=VALUE,NAME=VALUE; a value with = in it needs quotes: --env 'A="b=c"'
        metadata: for the scheduler, such as kubernetes=file:///path/to/pod-overlay.yaml
        max_restarts: times that torchrun starts all workers again after one was lost
        max_retries: times that the scheduler starts a failed job again; on Kubernetes an eviction or a drained node counts
            as well, on Slurm the loss of a node does not
        rdzv_port: port on the first node where the nodes meet; jobs that share it need one each (a single node: any free one)
    """
    with one_line():
        place = Place(
            nnodes, nproc_per_node, h, cpu, gpu, memMB, devices, image, mounts, env, metadata, max_restarts, max_retries,
            rdzv_port,
        )
        return jobs.train(config, list(overrides), output, resume, place)


def evaluate(
    *options: str,
    run: str,
    nnodes: str = "1",
    nproc_per_node: int = 0,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    devices: Optional[Dict[str, str]] = None,
    image: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_retries: int = 1,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Ranks every user's target by a run's saved model, on any number of nodes.

    Args:
        options: of 'fuxi-torchrec evaluate', after a double dash: -- --split validation --checkpoint last
        run: run folder; the metrics are added to its metrics.jsonl
        nnodes: nodes, all of which the job waits for
        nproc_per_node: processes a node; 0: as many as GPUs, or one without GPUs
        h: what a node has, by name: h100x8, a100x8, cpu, or a named resource of TorchX's
        cpu: CPU cores a node, shared out among its processes' threads; 0: as h says, or one a process
        gpu: GPUs a node; 0: as h says, or none
        memMB: memory a node, in MB; 0: as h says, or whatever the scheduler gives
        devices: further devices a node (Kubernetes): rdma/ib=8
        image: container image to run in, where the scheduler runs containers; paths are then the image's
        mounts: type=volume,src=CLAIM,dst=/data or type=bind,src=/host,dst=/data[,readonly], one after the other
        env: environment of every process: NAME=VALUE,NAME=VALUE; a value with = in it needs quotes: --env 'A="b=c"'
        metadata: for the scheduler, such as kubernetes=file:///path/to/pod-overlay.yaml
        max_retries: times that the scheduler starts a failed job again; on Kubernetes an eviction counts as well
        rdzv_port: port on the first node where the nodes meet
    """
    with one_line():
        place = Place(
            nnodes, nproc_per_node, h, cpu, gpu, memMB, devices, image, mounts, env, metadata, 0, max_retries, rdzv_port
        )
        return jobs.evaluate(run, list(options), place)


def prepare(
    *arguments: str,
    h: Optional[str] = None,
    cpu: int = 0,
    memMB: int = 0,
    image: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Runs a data pipeline as a job: one process that makes a data set folder.

    Args:
        arguments: of 'fuxi-torchrec prepare', last: events --source log.csv --user-column user … --output data/mine
        h: what the node has, by name: cpu, or a named resource of TorchX's
        cpu: CPU cores; 0: as h says, or one
        memMB: memory in MB; 0: as h says, or whatever the scheduler gives
        image: container image to run in, where the scheduler runs containers; paths are then the image's
        mounts: type=volume,src=CLAIM,dst=/data or type=bind,src=/host,dst=/data[,readonly], one after the other
        env: environment of the process: NAME=VALUE,NAME=VALUE; a value with = in it needs quotes: --env 'A="b=c"'
        metadata: for the scheduler, such as kubernetes=file:///path/to/pod-overlay.yaml
        max_retries: times that the scheduler starts a failed job again; on Kubernetes an eviction counts as well
    """
    with one_line():
        place = Place(
            h=h, cpu=cpu, memMB=memMB, image=image, mounts=mounts, env=env, metadata=metadata, max_retries=max_retries
        )
        return jobs.prepare(list(arguments), place)


def sweep(
    *options: str,
    config: str,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    image: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    env: Optional[Dict[str, str]] = None,
    metadata: Optional[Dict[str, str]] = None,
    max_retries: int = 1,
) -> specs.AppDef:
    """Runs a whole sweep as one job, its runs as processes of the job's node. Started again, it goes on where it was.

    Args:
        options: of 'python -m launch.sweep', after a double dash
        config: YAML file of the sweep: configs/sweeps/…
        h: what the node has, by name: h100x8, a100x8, cpu, or a named resource of TorchX's
        cpu: CPU cores; 0: as h says, or one a GPU, at least one
        gpu: GPUs; 0: as h says, or none
        memMB: memory in MB; 0: as h says, or whatever the scheduler gives
        image: container image to run in, where the scheduler runs containers; paths are then the image's
        mounts: type=volume,src=CLAIM,dst=/data or type=bind,src=/host,dst=/data[,readonly], one after the other
        env: environment of the processes: NAME=VALUE,NAME=VALUE; a value with = in it needs quotes: --env 'A="b=c"'
        metadata: for the scheduler, such as kubernetes=file:///path/to/pod-overlay.yaml
        max_retries: times that the scheduler starts a failed job again; on Kubernetes an eviction counts as well
    """
    with one_line():
        place = Place(
            nproc_per_node=1, h=h, cpu=cpu, gpu=gpu, memMB=memMB, image=image, mounts=mounts, env=env, metadata=metadata,
            max_retries=max_retries,
        )
        from launch.sweep.submission import sweep_app

        return sweep_app(config, list(options), place)
