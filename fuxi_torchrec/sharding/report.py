"""`fuxi-torchrec plan`: what a run would take on a cluster that one doesn't have. No process group, no table in memory.

Memory is bytes a rank; traffic is bytes a rank sends and receives in a step, ids not yet deduplicated.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Dict, List, Tuple

import torch
from rich.table import Table
from torchrec.distributed.types import ShardingPlan

from fuxi_torchrec.config import Config
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.model.recommender import SequenceRecommender, build_model
from fuxi_torchrec.run.reporting import print_table
from fuxi_torchrec.sharding import memory_estimate, planner
from fuxi_torchrec.sharding.memory_estimate import FLOAT_BYTES, ID_BYTES
from fuxi_torchrec.sharding.plan import Shard, planned_shards, replicated_shards
from fuxi_torchrec.sharding.planner import GIB, Machine
from fuxi_torchrec.sharding.table_choice import TableChoice


@dataclass
class Report:
    """Everything the command prints and writes. Lists have an entry a rank. `candidates` are those that a position is set
    against; `planner_ms` is TorchRec's own estimate of a step's lookups and exchange on the slowest rank, by which it
    chooses (0 where it wasn't asked)."""

    fits: bool
    reason: str
    items: int
    width: int
    sharding: str
    optimizer: str
    machine: Machine
    ids_per_user: Dict[str, float]
    table_bytes: List[int]
    optimizer_bytes: List[int]
    lookup_bytes: List[int]
    dense_bytes: int
    activation_bytes: int
    candidates: float
    candidate_bytes: int
    available_bytes: int
    traffic_bytes: List[int]
    candidate_traffic_bytes: int
    dense_traffic_bytes: int
    planner_ms: float
    shards: List[Shard]

    @property
    def memory_bytes(self) -> List[int]:
        """Bytes that each rank needs in all."""
        fixed = self.dense_bytes + self.activation_bytes + self.candidate_bytes
        return [sum(parts) + fixed for parts in zip(self.table_bytes, self.optimizer_bytes, self.lookup_bytes)]

    def to_json(self) -> str:
        """Returns the report as JSON text, with the memory in all and the balance of the ranks."""
        values = dataclasses.asdict(self)
        balance = {name: imbalance(values[name]) for name in ("table_bytes", "traffic_bytes")}
        return json.dumps({**values, "memory_bytes": self.memory_bytes, "largest_over_mean": balance}, indent=1) + "\n"


def parse_size(text: str, key: str) -> int:
    """Parses "80GB" (10^9), "80GiB" (2^30), "1.5TB", or a plain number of GB, to bytes. Raises UserError naming the
    key."""
    units = {"GIB": GIB, "TIB": GIB << 10, "GB": 10**9, "TB": 10**12, "": 10**9}
    number = text.strip().upper().rstrip("IBGT")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{key}: {text!r} is no size; write it like 80GB or 75GiB") from None
    if size <= 0:
        raise UserError(f"{key}: {text!r} must be greater than 0")
    return size


def report(config: Config, machine: Machine, items: int, events: float) -> Report:
    """Plans the run of a config on a machine, for a catalogue of `items` and users of `events` mean events."""
    choice = planner.choose(config, machine, items, events)
    model = build_model(config, items, 1.0, torch.device("cpu"), on_meta=True)
    shards: List[Shard]
    reason, planner_ms = "", 0.0
    if choice.is_sharded:
        planner.apply_table_optimizer(model.embeddings, choice, config.optimizer)
        plan, planner_ms, reason = _plan(model, config, choice, machine, items, events)
        shards, sharding = planned_shards(plan)
    else:
        sharding = "replicated"
        shards = replicated_shards(items, config.model.embedding_dim, machine.world_size)
    made = _report(config, machine, items, events, choice, sharding, shards, planner.dense_bytes(model))
    if not reason and max(made.memory_bytes) > made.available_bytes:
        reason = f"a rank needs {max(made.memory_bytes) / GIB:,.1f} GiB and has {made.available_bytes / GIB:,.1f}"
    return dataclasses.replace(made, fits=not reason, reason=reason, planner_ms=planner_ms)


def _plan(
    model: SequenceRecommender, config: Config, choice: TableChoice, machine: Machine, items: int, events: float
) -> Tuple[ShardingPlan, float, str]:
    """The plan, TorchRec's estimate of its time, and why it doesn't fit (then it is the plan for ranks of as much memory
    as it takes)."""
    reason = ""
    try:
        plan, options = planner.plan_table(model, config, choice, machine, items, events)
    except UserError as error:
        reason = str(error)
        endless = dataclasses.replace(machine, hbm=machine.hbm and 1 << 56, ddr=1 << 56)
        plan, options = planner.plan_table(model, config, choice, endless, items, events)
    time_by_rank: Dict[int, float] = {}
    for shard in (shard for option in options for shard in option.shards):
        time_by_rank[shard.rank] = time_by_rank.get(shard.rank, 0.0) + shard.perf.total
    return plan, max(time_by_rank.values(), default=0.0), reason


def _report(
    config: Config,
    machine: Machine,
    items: int,
    events: float,
    choice: TableChoice,
    sharding: str,
    shards: List[Shard],
    dense_bytes: int,
) -> Report:
    world, width = machine.world_size, config.model.embedding_dim
    per_user = memory_estimate.ids_per_user(config, items, events)
    ids = config.data.batch_size * sum(per_user)
    gradient = dense_bytes // 4  # what ranks average: as large as the parameters
    table, state, lookups = ([0] * world for _ in range(3))
    served = [0.0] * world  # bytes a rank exchanges with each other rank over its own shards
    for shard in shards:
        table[shard.rank] += shard.table_bytes
        state[shard.rank] += shard.optimizer_bytes(choice.optimizer)
        served[shard.rank] += ids * shard.rows / items * (ID_BYTES + 2 * shard.columns * FLOAT_BYTES)
    if choice.is_sharded:
        traffic = [round(sum(served) - own + (world - 1) * own) for own in served]
        # What came in for others, what goes out, and the same rows back at home with their gradient.
        lookups = [round(own * world + ids * (ID_BYTES + 2 * width * FLOAT_BYTES)) for own in served]
    else:
        gradient += items * width * FLOAT_BYTES
        table = [2 * bytes_ for bytes_ in table]  # the gradient is as large
        traffic = [0] * world
    candidates = memory_estimate.candidates(config, items, events) * (world if config.loss.cross_rank else 1)
    return Report(
        fits=True,
        reason="",
        items=items,
        width=width,
        sharding=sharding,
        optimizer=choice.optimizer,
        machine=machine,
        ids_per_user={"events": per_user[0], "negatives": per_user[1]},
        table_bytes=table,
        optimizer_bytes=state,
        lookup_bytes=lookups,
        dense_bytes=dense_bytes,
        activation_bytes=memory_estimate.activation_bytes(config, events),
        candidates=candidates,
        candidate_bytes=memory_estimate.candidate_bytes(config, items, events, world),
        available_bytes=machine.memory,
        traffic_bytes=traffic,
        candidate_traffic_bytes=memory_estimate.candidate_traffic_bytes(config, items, events, world),
        dense_traffic_bytes=round(2 * 2 * (world - 1) / world * gradient),
        planner_ms=0.0,
        shards=[] if sharding == "replicated" else shards,
    )


def imbalance(values: List[int]) -> float:
    """Divides the largest value by the mean; 1.0 is even."""
    return max(values) * len(values) / sum(values) if sum(values) else 1.0


def show(made: Report) -> None:
    """Prints the report as tables on standard output."""
    machine = made.machine
    print(
        f"{made.items:,} items x {made.width}, {made.sharding}, {made.optimizer}; {machine.world_size} ranks, "
        f"{machine.local_world_size} a host, {made.available_bytes / GIB:,.1f} GiB each ({machine.device_type})"
    )
    ids = ", ".join(f"{name} {value:,.1f}" for name, value in made.ids_per_user.items())
    print(f"ids a user looks up: {ids}; candidates in the loss: {made.candidates:,.0f}")
    table = Table()
    for name in ("of a rank", "largest, GiB", "mean, GiB", "largest / mean"):
        table.add_column(name, justify="left" if name == "of a rank" else "right")
    ranks = machine.world_size
    rows = {
        "table" + (" and its gradient" if made.sharding == "replicated" else ""): made.table_bytes,
        "table's optimizer": made.optimizer_bytes,
        "lookups in flight": made.lookup_bytes,
        "encoder, its gradient and AdamW": [made.dense_bytes] * ranks,
        "encoder's activations (a guess)": [made.activation_bytes] * ranks,
        "loss: candidates and their gradient": [made.candidate_bytes] * ranks,
        "memory in all": made.memory_bytes,
        "exchanged a step: ids, rows, gradients": made.traffic_bytes,
        "exchanged a step: all ranks' candidates": [made.candidate_traffic_bytes] * ranks,
        "exchanged a step: dense gradients": [made.dense_traffic_bytes] * ranks,
    }
    for name, values in rows.items():
        numbers = (f"{max(values) / GIB:,.4f}", f"{sum(values) / len(values) / GIB:,.4f}", f"{imbalance(values):.2f}")
        table.add_row(name, *numbers)
    print_table(table)
    if made.planner_ms:
        print(f"TorchRec's own estimate of a step's lookups and their exchange: {made.planner_ms:,.1f} ms")
    print("fits" if made.fits else f"does not fit: {made.reason}")
