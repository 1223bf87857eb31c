"""Real processes for tests: started once, then given jobs as worlds of different sizes (importing torchrec takes longer
than most jobs)."""

import multiprocessing
import os
import socket
import traceback
from contextlib import contextmanager
from multiprocessing.connection import wait

TIMEOUT = 180  # seconds without a result that are taken for a hang; a loaded machine is slow


@contextmanager
def worker_processes(count):
    """Yields run(job, world_size, *arguments) -> each rank's result. A job is a module-level function (world, *arguments);
    it runs on world_size of the processes inside a process group of their own."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    whole = [True]  # until a job fails: its other ranks may still be at work, and their results to come

    def run(job, world_size, *arguments):
        assert whole[0], "not run: an earlier job failed, and left these processes out of step"
        whole[0] = False
        results = _run(pipes, job, world_size, arguments)
        whole[0] = True
        return results

    try:
        yield run
    finally:
        for process in processes:
            process.kill()


def _run(pipes, job, world_size, arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world_size):
        pipes[rank].send((job, rank, world_size, port, arguments))
    results, waiting = [None] * world_size, set(range(world_size))
    while waiting:
        ready = wait([pipes[rank] for rank in waiting], TIMEOUT)
        assert ready, f"ranks {sorted(waiting)} of {world_size} hang in {job.__name__}"
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            done, results[rank] = pipes[rank].recv()
            assert done, f"rank {rank} of {world_size}, {job.__name__}:\n{results[rank]}"
            waiting.remove(rank)
    return results


def _work(pipe):
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from torchrec.distributed import collective_utils

    from fuxi_torchrec.distributed.world import start_world

    torch.set_num_threads(1)
    # torchrec broadcasts this flag in a process's first world only: worlds of newcomers and others would wait for ever.
    collective_utils._INITIALIZED = True
    while True:
        job, rank, world_size, port, arguments = pipe.recv()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        try:
            with start_world("cpu") as world:
                pipe.send((True, job(world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
