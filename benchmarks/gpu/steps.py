"""Part, where torchrec is installed: whole training steps in one process, with its process group (NCCL on a GPU).

Does a step wait for the host? Is the exchange of the next batch's ids beside the computation of this one?
"""

import collections
import json
import os
import tempfile
import time
import warnings
from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

import torch
import torch.distributed as dist

from benchmarks.gpu.cases import Case, Place, Row, wait
from fuxi_torchrec.bench.timing import BenchCase, BenchSize
from fuxi_torchrec.config import Config, TableConfig, TrainerConfig
from fuxi_torchrec.data.prefetch import pinned, prefetch, prefetch_depth
from fuxi_torchrec.distributed.world import World, start_world
from fuxi_torchrec.profiling.flops import training_flops
from fuxi_torchrec.profiling.memory import PeakMemory

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of the CUDA runtime that hold the host up; the asynchronous copy has another name."""
Event = Dict[str, Any]
Interval = Tuple[float, float]


def cases(place: Place) -> List[Case]:
    """Lists the collective, and steps with a replicated and a sharded table in both precisions."""
    world = place.stack.enter_context(start_world(place.device.type))
    found = [Case("all-reduce in one process", lambda: collective(place, world))]
    for sharding in ("row_wise", "replicated"):
        for precision in ("fp32", "bf16"):
            case = (sharding, precision)
            found.append(Case(f"fuxi_beta, {sharding}, {precision}", lambda case=case: steps(place, world, *case)))
    return found


def collective(place: Place, world: World) -> Row:
    """Adds up over the process group of one process."""
    values = torch.arange(4.0, device=place.device)
    dist.all_reduce(values)
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0]
    version = ".".join(map(str, torch.cuda.nccl.version())) if place.is_gpu else ""
    return {"backend": f"{dist.get_backend()} {version}".strip(), "size": world.size}


def steps(place: Place, world: World, sharding: str, precision: str) -> Row:
    """Runs training steps: times them, counts where the host waits, and looks at a trace."""
    sizes, length = place.sizes, place.sizes.lengths[0]
    optimizer = "rowwise_adagrad" if sharding == "row_wise" else "adamw"
    config = Config(
        model=replace(sizes.model("fuxi_beta"), dropout=0.2, input_dropout=0.2),
        table=TableConfig(sharding=sharding, optimizer=optimizer),
        trainer=TrainerConfig(device=place.device.type, precision=precision, train_pipeline="sparse_dist"),
    )
    memory = PeakMemory(place.device)
    case = BenchCase(config, length, BenchSize(sizes.tokens, sizes.items, 1), world, place.stack)
    kind = place.device.type
    batches = prefetch(pinned(case.batches, kind), prefetch_depth(case.config.data, kind))
    place.stack.callback(batches.close)

    def run(count: int) -> None:
        """Trains some steps as a run does between two log lines: no loss is read."""
        for _ in range(count):
            batch = case.trainer.pipeline.take(batches)
            assert batch is not None  # there is always another epoch
            case.trainer.step(batch)

    run(3)  # kernels are tuned, the optimizer's state is made, the pipeline filled
    memory.restart()
    wait(place)
    start = time.perf_counter()
    run(sizes.steps)
    wait(place)
    seconds = (time.perf_counter() - start) / sizes.steps
    peak, tokens = memory.peak(), sum(case.host_lengths)
    row: Row = {"seconds": seconds, "tokens": tokens, "peak_bytes": peak, "precision": precision, "length": length}
    row["flops"] = training_flops(config.model, case.host_lengths, case.candidates)
    row["synchronisations"] = synchronisations(lambda: run(sizes.steps)) if place.is_gpu else None
    return row | traced(place, run, f"steps-{sharding}-{precision}.json")


def synchronisations(train: Callable[[], None]) -> List[Dict[str, Any]]:
    """Lists where PyTorch makes the host wait for the GPU meanwhile, as `torch.cuda.set_sync_debug_mode` tells."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))
    return [{"where": where, "times": times} for where, times in places.most_common()]


def traced(place: Place, train: Callable[[int], None], name: str) -> Row:
    """Records a few steps for a trace viewer, and reads from the trace what ran beside what."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    count = min(5, place.sizes.steps)
    with torch.profiler.profile(activities=activities) as profile:
        train(count)
        wait(place)
    path = os.path.join(place.folder or tempfile.gettempdir(), name)
    profile.export_chrome_trace(path)
    with open(path, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    streams = streams_of(events)
    row: Row = {"trace": name, "waits_in_trace": waits_of(events, count)}
    return row | (exchange_of(streams) if place.is_gpu else {"exchange": None})


def waits_of(events: Iterable[Event], count: int) -> Dict[str, float]:
    """Counts the runtime's calls that hold the host up, a step. The one that ends the recording is among them."""
    calls = collections.Counter(e["name"] for e in events if e.get("cat") == "cuda_runtime" and e["name"] in WAITS)
    return {name: times / count for name, times in calls.items()}


def streams_of(events: Iterable[Event]) -> Dict[str, List[Event]]:
    """Sorts what ran on a GPU by its stream."""
    streams: Dict[str, List[Event]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in event:
            streams[str(event["args"].get("stream", event.get("tid")))].append(event)
    return dict(streams)


def exchange_of(streams: Dict[str, Sequence[Event]]) -> Row:
    """Tells how much of what the other streams did was beside work of the busiest one, which computes."""
    if not streams:
        return {"exchange": None}
    busy = {name: merged((e["ts"], e["ts"] + e["dur"]) for e in events) for name, events in streams.items()}
    main = max(busy, key=lambda name: length_of(busy[name]))
    others = merged(pair for name, pairs in busy.items() if name != main for pair in pairs)
    total = length_of(others)
    beside = length_of(intersection(others, busy[main]))
    kinds = collections.Counter(e["name"] for name, events in streams.items() if name != main for e in events)
    known = {"microseconds": total, "beside": beside, "streams": len(streams), "work": dict(kinds.most_common(12))}
    return {"exchange": known, "overlap_of": beside / total if total else None}


def merged(intervals: Iterable[Interval]) -> List[Interval]:
    """Joins intervals that meet, in order."""
    joined: List[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def length_of(intervals: Iterable[Interval]) -> float:
    """Adds up intervals that are apart."""
    return sum(end - begin for begin, end in intervals)


def intersection(some: Sequence[Interval], others: Sequence[Interval]) -> List[Interval]:
    """Lists what two lists of intervals have in common; each is in order and apart."""
    common, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        begin, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if begin < end:
            common.append((begin, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return common
