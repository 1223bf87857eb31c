"""Reading a prepared data set: row groups of users as flat arrays, and the splits of docs/data.md. No torch.

Shape suffixes: U users of a row group, E their events laid end to end.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Dict, Hashable, Iterator, List, Optional, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fuxi_torchrec.data.checksums import ADVICE, check_start, compare, part_names, verify_files
from fuxi_torchrec.data.format import ITEMS_FILE, TRAIN_FOLDER, USERS_FILE, DatasetIdentity, read_identity
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.paths import join, path_manager


@dataclass(frozen=True)
class RowGroup:
    """One row group of one part file: the unit that is read, shuffled and assigned to ranks."""

    path: str
    index: int
    num_rows: int


@dataclass
class UserRows:
    """Some users and all their events, sorted by time within a user."""

    user_ids_U: np.ndarray  # int64
    offsets_U1: np.ndarray  # int64; user u's events are [offsets[u], offsets[u + 1])
    item_ids_E: np.ndarray  # int64, dense
    timestamps_E: np.ndarray  # int64, ticks
    log_probs_E: Optional[np.ndarray] = None  # float64, where the data set has them

    def cut(self, begin: int, end: int) -> "UserRows":
        """Returns the users [begin, end)."""
        offsets = self.offsets_U1[begin : end + 1]
        events = slice(offsets[0], offsets[-1])
        log_probs_E = None if self.log_probs_E is None else self.log_probs_E[events]
        ids_E, times_E = self.item_ids_E[events], self.timestamps_E[events]
        return UserRows(self.user_ids_U[begin:end], offsets - offsets[0], ids_E, times_E, log_probs_E)


class SequenceDataset:
    """A prepared data set's folder.

    Raises UserError for a folder that is none, of another schema version, or whose part files are not those that its
    identity speaks of.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.identity = read_identity(folder)
        self.item_counts: Dict[Hashable, np.ndarray] = {}  # what item_counts.py has counted, by its CountKey
        self.row_groups = _row_groups(folder, self.identity)
        users = sum(group.num_rows for group in self.row_groups)
        if users != self.identity.num_users:
            raise UserError(
                f"{join(folder, TRAIN_FOLDER)}: part files hold {users} users, dataset.json says "
                f"{self.identity.num_users}; prepare the data set again"
            )

    def check_files(self, rank: int, world_size: int, verify: bool) -> None:
        """Compares the files with dataset.json's record of them: rank 0 sizes and rows of those beside the parts, which
        are compared as they are opened; with `verify` every rank the checksums of its share. Raises UserError."""
        if rank == 0:
            check_start(self.folder, self.identity)
        if verify:
            verify_files(self.folder, self.identity, rank, world_size)

    def read(self, group: RowGroup, log_probs: bool = False) -> UserRows:
        """Reads one row group; checks ids against the catalogue and that each user's times do not go back."""
        log_prob_column = self.identity.log_prob_column if log_probs else None
        columns = ["user_id", "item_ids", "timestamps"] + ([log_prob_column] if log_prob_column else [])
        try:
            with path_manager().open(group.path, "rb") as file:
                table = pq.ParquetFile(file).read_row_group(group.index, columns=columns).combine_chunks()
            rows = _to_rows(table, log_prob_column)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{group.path}, row group {group.index}: cannot be read ({one_line(error)})") from None
        self._check(group, rows)
        return rows

    def _check(self, group: RowGroup, rows: UserRows) -> None:
        where = f"{group.path}, row group {group.index}"
        bad = (rows.item_ids_E < 0) | (rows.item_ids_E >= self.identity.num_items)
        backwards = np.zeros(len(rows.timestamps_E), dtype=bool)
        backwards[1:] = rows.timestamps_E[1:] < rows.timestamps_E[:-1]
        backwards[rows.offsets_U1[:-1][rows.offsets_U1[:-1] < len(backwards)]] = False
        for mask, what in ((bad, f"item id outside 0 … {self.identity.num_items - 1}"), (backwards, "times go back")):
            if mask.any():
                event = int(mask.argmax())
                user = rows.user_ids_U[np.searchsorted(rows.offsets_U1, event, side="right") - 1]
                raise UserError(f"{where}, user {user}: {what}; prepare the data set again")

    def items(self, columns: Optional[List[str]] = None, where: Optional[pc.Expression] = None) -> pa.Table:
        """Reads items.parquet: item_id, source_id, title, frequency (or some of them), in the order of item_id.

        where: of these items alone; the others are read past, not held.
        """
        path = join(self.folder, ITEMS_FILE)
        with _readable(path) as file:
            table = pq.read_table(file, columns=columns and ["item_id", *columns], filters=where).sort_by("item_id")
        if where is None:
            self._check_items(path, table.num_rows)
        return table

    def frequencies(self) -> np.ndarray:
        """Reads items.parquet's frequency, int64 [V]."""
        path = join(self.folder, ITEMS_FILE)
        frequency_V = np.zeros(self.identity.num_items, dtype=np.int64)
        with _readable(path) as file:
            parquet = pq.ParquetFile(file)
            self._check_items(path, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(columns=["item_id", "frequency"]):
                frequency_V[batch["item_id"].to_numpy()] = batch["frequency"].to_numpy()
        return frequency_V

    def _check_items(self, path: str, found: int) -> None:
        if found != self.identity.num_items:
            raise UserError(
                f"{path}: {found} items, dataset.json says {self.identity.num_items}; prepare the data set again"
            )

    def user_ids(self, source_ids: Sequence[str]) -> Optional[Dict[str, int]]:
        """Finds users by the source's text ids: {source id: user_id} of those that there are. None where the source's ids
        are the data set's own, int64."""
        path = join(self.folder, USERS_FILE)
        if not path_manager().isfile(path):
            return None
        with _readable(path) as file:
            found = pq.read_table(file, filters=pc.field("source_id").isin(pa.array(source_ids, pa.string())))
        return dict(zip(found["source_id"].to_pylist(), found["user_id"].to_pylist()))

    @property
    def has_log_probs(self) -> bool:
        """Whether the events have their generator's log probabilities (synthetic data)."""
        return self.identity.log_prob_column is not None


@contextmanager
def _readable(path: str) -> Iterator[BinaryIO]:
    """Opens a Parquet file. Raises UserError where it cannot be read, now or within the block."""
    try:
        with path_manager().open(path, "rb") as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); prepare the data set again") from None


def check_enough_data(dataset: SequenceDataset, processes: int) -> None:
    """Checks that every process gets a user. Raises UserError for more processes than users."""
    users = dataset.identity.num_users
    if users < processes:
        raise UserError(f"{dataset.folder}: {users} users are too few for {processes} processes; use at most {users}")


def ranges(start_U: np.ndarray, stop_U: np.ndarray) -> np.ndarray:
    """Lists the integers of all [start, stop), one range after the other, int64."""
    lengths = stop_U - start_U
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start_U - (ends - lengths), lengths)


def concatenate(parts: Sequence[UserRows]) -> UserRows:
    """Joins the users of several row groups."""
    shifts = np.cumsum([0] + [len(part.item_ids_E) for part in parts])
    offsets = [part.offsets_U1[:-1] + shift for part, shift in zip(parts, shifts)] + [shifts[-1:]]
    return UserRows(
        np.concatenate([part.user_ids_U for part in parts]),
        np.concatenate(offsets),
        np.concatenate([part.item_ids_E for part in parts]),
        np.concatenate([part.timestamps_E for part in parts]),
        None if parts[0].log_probs_E is None else np.concatenate([part.log_probs_E for part in parts]),
    )


def _to_rows(table: pa.Table, log_prob_column: Optional[str]) -> UserRows:
    lists = {name: table[name].chunk(0) for name in table.column_names if name != "user_id"}
    offsets = lists["item_ids"].offsets.to_numpy().astype(np.int64)
    for name, column in lists.items():
        if column.null_count or column.values.null_count:
            raise pa.ArrowInvalid(f"null in column {name}")
        if not np.array_equal(column.offsets.to_numpy(), offsets):
            raise pa.ArrowInvalid(f"column {name} is not aligned with item_ids")
    values = {name: column.values.to_numpy() for name, column in lists.items()}
    return UserRows(
        table["user_id"].to_numpy(),
        offsets,
        values["item_ids"],
        values["timestamps"],
        values.get(log_prob_column),
    )


def _row_groups(folder: str, identity: DatasetIdentity) -> List[RowGroup]:
    """All row groups of the part files, which are compared with dataset.json's record of them, where it has one."""
    groups = []
    for name in _part_names(folder, identity):
        path = join(folder, name)
        try:
            with path_manager().open(path, "rb") as file:
                metadata = pq.ParquetFile(file).metadata
                size = file.seek(0, os.SEEK_END)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({one_line(error)}); prepare it again") from None
        if identity.files:
            compare(path, {"bytes": size, "rows": metadata.num_rows}, identity.files[name])
        groups += [RowGroup(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
    return groups


def _part_names(folder: str, identity: DatasetIdentity) -> List[str]:
    train = join(folder, TRAIN_FOLDER)
    try:
        names = part_names(folder)
    except OSError as error:
        raise UserError(f"{train}: cannot be listed ({one_line(error)}); prepare the data set again") from None
    recorded = {name for name in identity.files if name.startswith(f"{TRAIN_FOLDER}/")}
    for name in sorted(recorded ^ set(names)) if identity.files else []:
        what = "missing" if name in recorded else "not a file that dataset.json lists"
        raise UserError(f"{join(folder, name)}: {what}; {ADVICE}")
    return names
