"""Streams users' sequences to the Parquet sequence format. Memory: one row group, plus one count per item."""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, BinaryIO, Dict, Iterable, List, Optional, Type, Union

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.output import GuardedStream, OutputFolder
from fuxi_torchrec.data.format import (
    IDENTITY_FILE,
    ITEMS_FILE,
    SEQUENCE_FIELDS,
    TRAIN_FOLDER,
    USERS_FILE,
    DatasetIdentity,
)

MAX_USERS_PER_GROUP = 1024
MIN_USERS_PER_GROUP = 8
MIN_GROUPS = 16  # so that 16 ranks and workers each get some, where there are users enough
MAX_EVENTS_PER_GROUP = 1 << 21  # bounds a reader's memory where single users have very many events
GROUPS_PER_PART = 256
ITEMS_PER_GROUP = 1 << 20


@dataclass
class Sequences:
    """Some users' sequences, side by side: user b has the events offsets[b] … offsets[b+1]-1.

    user_ids int64 [B]; offsets int64 [B+1], from 0; item_ids int64 [T] (dense ids); timestamps int64 [T], in the data
    set's ticks, ascending for each user; extras: name -> Arrow array [T], any type but null.
    """

    user_ids: np.ndarray
    offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    extras: Dict[str, pa.Array] = field(default_factory=dict)

    def part(self, begin: int, end: int) -> "Sequences":
        """Returns users begin … end-1, without copying the events."""
        first, last = self.offsets[begin], self.offsets[end]
        extras = {name: values.slice(first, last - first) for name, values in self.extras.items()}
        return Sequences(
            self.user_ids[begin:end],
            self.offsets[begin : end + 1] - first,
            self.item_ids[first:last],
            self.timestamps[first:last],
            extras,
        )


@dataclass
class Totals:
    """Counts of what was written, those of DatasetIdentity. `single_event_users` are kept on disk."""

    num_users: int = 0
    num_events: int = 0
    min_timestamp: int = np.iinfo(np.int64).max
    max_timestamp: int = 0
    max_events_per_user: int = 0
    single_event_users: int = 0

    def add(self, sequences: Sequences) -> None:
        """Counts some users."""
        lengths = np.diff(sequences.offsets)
        self.num_users += len(lengths)
        self.num_events += len(sequences.item_ids)
        self.min_timestamp = min(self.min_timestamp, int(sequences.timestamps.min()))
        self.max_timestamp = max(self.max_timestamp, int(sequences.timestamps.max()))
        self.max_events_per_user = max(self.max_events_per_user, int(lengths.max()))
        self.single_event_users += int((lengths == 1).sum())


class SequenceWriter:
    """Writes one data set into an OutputFolder: `write` sequences, `write_items`, perhaps `write_users`, then `finish`.

    num_users (known beforehand) sets the size of the row groups, num_items the size of the frequency table. The files
    depend on the sequences alone, not on how they were cut into `write` calls: same input, same bytes.
    """

    def __init__(self, output: OutputFolder, num_users: int, num_items: int):
        self.output = output
        self.totals = Totals()
        self.frequency = np.zeros(num_items, np.int64)
        per_group = -(-num_users // MIN_GROUPS)
        self._users_per_group = min(MAX_USERS_PER_GROUP, max(MIN_USERS_PER_GROUP, per_group))
        self._pending: List[Sequences] = []
        self._pending_users = self._pending_events = 0
        self._part: Optional[pq.ParquetWriter] = None
        self._part_file: Union[BinaryIO, GuardedStream, None] = None
        self._parts = self._groups = 0
        self._columns: List[str] = []

    def __enter__(self) -> "SequenceWriter":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if error is not None:
            try:
                self._close_part()
            except Exception:  # a full disk fails again here; the first error is the one to see
                pass

    def write(self, sequences: Sequences) -> None:
        """Adds users, each at least one event long. Users keep their order; a user comes in one call, whole."""
        begin, num_users = 0, len(sequences.user_ids)
        while begin < num_users:
            first = sequences.offsets[begin]
            room = MAX_EVENTS_PER_GROUP - self._pending_events
            by_events = int(np.searchsorted(sequences.offsets[begin + 1 :] - first, room)) + 1
            end = min(num_users, begin + self._users_per_group - self._pending_users, begin + by_events)
            self._pending.append(sequences.part(begin, end))
            self._pending_users += end - begin
            self._pending_events += int(sequences.offsets[end] - first)
            if self._pending_users >= self._users_per_group or self._pending_events >= MAX_EVENTS_PER_GROUP:
                self._write_group()
            begin = end

    def write_items(
        self, source_ids: pa.Array, titles: Optional[pa.Array] = None, extras: Optional[Dict[str, pa.Array]] = None
    ) -> None:
        """Writes items.parquet: row v is dense id v. Call it after the last `write`: it needs the frequencies.

        source_ids int64 or string [V]; titles string [V], null where there is none; extras: further columns [V].
        """
        if self._pending:
            self._write_group()
        columns = {
            "item_id": pa.array(np.arange(len(self.frequency))),
            "source_id": source_ids,
            "title": titles if titles is not None else pa.nulls(len(self.frequency), pa.string()),
            "frequency": pa.array(self.frequency),
            **(extras or {}),
        }
        table = pa.table(columns)
        with self.output.open(ITEMS_FILE) as file:
            pq.write_table(table, file, row_group_size=ITEMS_PER_GROUP, compression="zstd")

    def write_users(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Writes users.parquet from batches of user_id int64, source_id string."""
        schema = pa.schema([("user_id", pa.int64()), ("source_id", pa.string())])
        with self.output.open(USERS_FILE) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))

    def finish(self, report: Dict[str, int], **identity: Any) -> DatasetIdentity:
        """Writes dataset.json and puts the data set in place. `identity` holds what the counts do not say."""
        self._close_part()
        files, checksum = self.output.described()
        result = DatasetIdentity(
            num_users=self.totals.num_users,
            num_items=len(self.frequency),
            num_events=self.totals.num_events,
            min_timestamp=self.totals.min_timestamp,
            max_timestamp=self.totals.max_timestamp,
            max_events_per_user=self.totals.max_events_per_user,
            columns=self._columns,
            report={**report, "single_event_users": self.totals.single_event_users},
            content_checksum=checksum,
            files=files,
            **identity,
        )
        with self.output.open(IDENTITY_FILE) as file:
            file.write(result.to_json().encode())
        self.output.commit()
        return result

    def _write_group(self) -> None:
        group = _concatenate(self._pending)
        self._pending, self._pending_users, self._pending_events = [], 0, 0
        self.totals.add(group)
        np.add.at(self.frequency, _without_last_events(group), 1)
        table = _to_table(group)
        if self._part is None or self._groups == GROUPS_PER_PART:
            self._close_part()
            self._part_file = self.output.open(f"{TRAIN_FOLDER}/{part_name(self._parts)}")
            self._part = pq.ParquetWriter(self._part_file, table.schema, compression="zstd")
            self._parts += 1
            self._columns = list(group.extras)
        self._part.write_table(table, row_group_size=len(table))
        self._groups += 1

    def _close_part(self) -> None:
        if self._part is not None:
            part, self._part = self._part, None
            try:
                part.close()
            finally:
                assert self._part_file is not None  # opened with the part
                self._part_file.close()
        self._groups = 0


def part_name(index: int) -> str:
    """Names the part file of this number."""
    return f"part-{index:05d}.parquet"


def _without_last_events(group: Sequences) -> np.ndarray:
    """Item ids of all events but each user's last, int64."""
    kept = np.ones(len(group.item_ids), bool)
    kept[group.offsets[1:] - 1] = False
    return group.item_ids[kept]


def _concatenate(pieces: List[Sequences]) -> Sequences:
    if len(pieces) == 1:
        return pieces[0]
    lengths = np.concatenate([np.diff(p.offsets) for p in pieces])
    return Sequences(
        np.concatenate([p.user_ids for p in pieces]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([p.item_ids for p in pieces]),
        np.concatenate([p.timestamps for p in pieces]),
        {name: pa.concat_arrays([p.extras[name] for p in pieces]) for name in pieces[0].extras},
    )


def _to_table(group: Sequences) -> pa.Table:
    offsets = pa.array(group.offsets, pa.int32())  # MAX_EVENTS_PER_GROUP and one user's events fit

    def as_lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values)

    arrays = [pa.array(group.user_ids), as_lists(pa.array(group.item_ids)), as_lists(pa.array(group.timestamps))]
    extras = [pa.field(name, pa.list_(values.type), nullable=False) for name, values in group.extras.items()]
    arrays += [as_lists(values) for values in group.extras.values()]
    return pa.Table.from_arrays(arrays, schema=pa.schema(SEQUENCE_FIELDS + extras))
