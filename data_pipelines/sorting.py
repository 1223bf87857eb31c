"""Events of any number into users' sequences: an external sort on disk, then one streaming pass.

Grouping with list(… ORDER BY …) needs every list in memory; sorting to a temporary file does not.
"""

import os
from types import TracebackType
from typing import TYPE_CHECKING, Dict, Iterator, List, Optional, Type

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.writer import Sequences
from fuxi_torchrec.errors import UserError

if TYPE_CHECKING:
    import duckdb

BATCH_ROWS = 1 << 18


class EventSorter:
    """An external sort: takes events in source order and gives them back as sequences, sorted stably by (user, time,
    source position).

    folder: for temporary files, about three times the size of the events. memory_limit: DuckDB's ("2GB"); what Python
    holds comes on top (a few hundred MB, and the item table).
    """

    def __init__(self, folder: str, memory_limit: str):
        self.folder = folder
        self.memory_limit = memory_limit
        self.num_events = self.num_users = self.num_items = 0
        self.unsorted_events = self.duplicate_events = 0
        self._raw: Optional[pq.ParquetWriter] = None
        self._extras: List[str] = []

    def __enter__(self) -> "EventSorter":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if self._raw is not None:
            try:
                self._raw.close()
            except Exception:  # already failing (a full disk, say); the first error is the one to see
                pass
        if hasattr(self, "_connection"):
            self._connection.close()
        if isinstance(error, RuntimeError) and "Query interrupted" in str(error):
            raise KeyboardInterrupt from None  # DuckDB's way of passing Ctrl-C on
        if kind is not None and kind.__module__.split(".")[0] in ("duckdb", "_duckdb"):
            if kind.__name__ == "OutOfMemoryException" and "max_temp_directory_size" not in str(error):
                raise UserError(
                    f"--memory-limit {self.memory_limit}: too little to sort {self.num_events:,} events; raise it"
                ) from None

    def add(self, users: pa.Array, items: pa.Array, times: pa.Array, extras: Dict[str, pa.Array]) -> None:
        """Adds events in source order. users, items: int64 or string; times int64; each keeps its type throughout."""
        positions = pa.array(np.arange(self.num_events, self.num_events + len(users)))
        columns = {"user": users, "item": items, "time": times, "position": positions}
        # The extras' own names may be anything, "user" included.
        columns.update({f"x{k}": values for k, values in enumerate(extras.values())})
        batch = pa.record_batch(columns)
        if self._raw is None:
            self._extras = list(extras)
            self._raw = pq.ParquetWriter(self._file("raw"), batch.schema, compression="lz4", use_dictionary=False)
        self._raw.write_batch(batch)
        self.num_events += len(users)

    def sort(self, listed_items: Optional[pa.Array] = None) -> None:
        """Sorts what was added. listed_items: source ids that belong to the catalogue even if no event has them."""
        assert self._raw is not None and self.num_events, "the caller refuses an empty data set"
        self._text_users = self._raw.schema.field("user").type == pa.string()
        self._raw.close()
        self._raw = None
        self._connection = connection = self._connect()
        raw = f"read_parquet({_quoted(self._file('raw'))})"
        listed = ""
        if listed_items is not None:
            connection.register("listed", pa.table({"item": listed_items}))
            listed = "UNION SELECT item FROM listed"
        numbered = "CREATE TABLE {0} AS SELECT {1} AS source_id, row_number() OVER (ORDER BY {1}) - 1 AS id FROM ({2})"
        connection.execute(numbered.format("items", "item", f"SELECT DISTINCT item FROM {raw} {listed}"))
        self.num_items = self._count("SELECT count(*) FROM items")
        user, join = "raw.user", ""
        if self._text_users:
            connection.execute(numbered.format("users", '"user"', f'SELECT DISTINCT "user" FROM {raw}'))
            user, join = "users.id", 'JOIN users ON raw."user" = users.source_id'
        else:
            user = 'raw."user"'
        extras = "".join(f", raw.x{k}" for k in range(len(self._extras)))
        connection.execute(
            f"COPY (SELECT {user} AS user_id, items.id AS item_id, raw.time, raw.position {extras} FROM {raw} AS raw "
            f"JOIN items ON raw.item = items.source_id {join} ORDER BY user_id, raw.time, raw.position) "
            f"TO {_quoted(self._file('sorted'))} (FORMAT parquet, COMPRESSION lz4)"
        )
        os.remove(self._file("raw"))
        sorted_events = f"read_parquet({_quoted(self._file('sorted'))})"
        self.num_users = self._count(f"SELECT count(DISTINCT user_id) FROM {sorted_events}")

    def source_items(self) -> pa.Array:
        """Reads the source ids of the items, in the order of their dense ids, int64 or string [V]."""
        return _one_array(self._connection.sql("SELECT source_id FROM items ORDER BY id").to_arrow_table()[0])

    def titles(self, items: pa.Array, titles: pa.Array) -> pa.Array:
        """Reads the title of each catalogue item, string [V]; null where none is listed, the first where several are.

        items: source ids; titles: string, beside them.
        """
        listed = pa.table({"item": items, "title": titles, "position": np.arange(len(items))})
        self._connection.register("titles", listed)
        query = (
            "SELECT first.title FROM items LEFT JOIN "
            "(SELECT item, arg_min(title, position) AS title FROM titles GROUP BY item) AS first "
            "ON items.source_id = first.item ORDER BY items.id"
        )
        return _one_array(self._connection.sql(query).to_arrow_table()[0])

    def source_users(self) -> Optional[Iterator[pa.RecordBatch]]:
        """Reads (user_id int64, source_id string) where the source's users are text, else None: their ids are kept."""
        if not self._text_users:
            return None
        query = "SELECT id AS user_id, source_id FROM users ORDER BY id"
        return iter(self._connection.sql(query).to_arrow_reader(BATCH_ROWS))

    def sequences(self) -> Iterator[Sequences]:
        """Yields whole users, many at a time, in the order of user_id. Counts unsorted and duplicate events on the
        way.

        timestamps are as they were added. Memory: a few batches of BATCH_ROWS events, or one user's events if more.
        """
        rest: List[pa.RecordBatch] = []
        with pq.ParquetFile(self._file("sorted")) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                users = batch.column("user_id").to_numpy()
                last = int(np.searchsorted(users, users[-1]))  # its last user may go on in the next batch
                if last > 0:
                    yield self._to_sequences(rest + [batch.slice(0, last)])
                    rest = []
                elif rest and rest[0].column("user_id")[0] != batch.column("user_id")[0]:
                    yield self._to_sequences(rest)
                    rest = []
                rest.append(batch.slice(last))
        yield self._to_sequences(rest)

    def _to_sequences(self, batches: List[pa.RecordBatch]) -> Sequences:
        table = pa.Table.from_batches(batches).combine_chunks()
        users, items, times, positions = (table[name].to_numpy() for name in ("user_id", "item_id", "time", "position"))
        starts = np.flatnonzero(np.diff(users, prepend=users[0] - 1))
        assert np.all(np.diff(users) >= 0), "DuckDB gave the events unsorted"
        offsets = np.append(starts, len(users))
        self.unsorted_events += count_unsorted(offsets, positions)
        self.duplicate_events += count_duplicates(users, times, items)
        extras = {name: _one_array(table[f"x{k}"]) for k, name in enumerate(self._extras)}
        return Sequences(users[starts], offsets, items, times, extras)

    def _connect(self) -> "duckdb.DuckDBPyConnection":
        import duckdb

        connection = duckdb.connect(self._file("duckdb"))
        connection.execute(f"SET temp_directory = {_quoted(self._file('spill'))}")
        try:
            connection.execute(f"SET memory_limit = {_quoted(self.memory_limit)}")
        except duckdb.Error:
            raise UserError(f"--memory-limit {self.memory_limit}: not a size; write 500MB or 4GB") from None
        connection.execute("SET preserve_insertion_order = false")  # needs memory; every order here is asked for
        return connection

    def _count(self, query: str) -> int:
        return self._connection.execute(query).fetchall()[0][0]

    def _file(self, name: str) -> str:
        return os.path.join(self.folder, name)


def count_unsorted(offsets: np.ndarray, positions: np.ndarray) -> int:
    """Counts the events that stood in the source after a later event of the same user.

    offsets int64 [B+1] of users; positions int64 [T], the source positions of the events in sorted order.
    """
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    # Later users' keys are all larger, so that one running minimum from the end serves every user.
    keys = positions + users * (positions.max() + 1)
    smallest_later = np.minimum.accumulate(keys[::-1])[::-1]
    return int((smallest_later[1:] < keys[:-1]).sum())


def count_duplicates(users: np.ndarray, times: np.ndarray, items: np.ndarray) -> int:
    """Counts the events whose user, time and item were seen before. Arrays int64 [T], sorted by user and time."""
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.append(same, False) | np.append(False, same)  # only ties can hold duplicates, and they are few
    users, times, items = users[tied], times[tied], items[tied]
    order = np.lexsort((items, times, users))
    same = [values[order][1:] == values[order][:-1] for values in (users, times, items)]
    return int((same[0] & same[1] & same[2]).sum())


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
