"""Any event log, CSV or Parquet, larger than memory if need be, to a data set of sequences."""

import glob
import hashlib
import os
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple, Union

import pyarrow as pa

from data_pipelines import values
from data_pipelines.archive import local_copy
from data_pipelines.output import OutputFolder
from data_pipelines.sorting import EventSorter
from data_pipelines.tables import CsvTable, ParquetTable, refuse
from data_pipelines.values import BadValue
from data_pipelines.writer import SequenceWriter
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.errors import UserError

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
RESERVED = ("user_id", "item_ids", "timestamps")
Table = Union[CsvTable, ParquetTable]


@dataclass
class EventColumns:
    """The columns that are read and what they hold. The types "auto" are settled by the first block of the first
    file.

    A CSV id column whose first value looks like a number holds integers, and a later value that is not one is an error:
    taking the column for text instead would hide a damaged row. extras: name -> "auto", "int", "float" or "text".
    """

    user: str
    item: str
    time: str
    user_type: str = "auto"  # "integer" or "text"
    item_type: str = "auto"
    extras: Dict[str, str] = field(default_factory=dict)
    datetimes: Optional[bool] = None
    resolution: str = "us"

    @property
    def names(self) -> List[str]:
        """Names of all columns that are read."""
        return list(dict.fromkeys([self.user, self.item, self.time, *self.extras]))

    def settle(self, block: Dict[str, pa.Array]) -> None:
        """Replaces every "auto" by what the block shows."""
        self.user_type = _id_type(self.user_type, block[self.user])
        self.item_type = _id_type(self.item_type, block[self.item])
        if self.datetimes is None:
            self.datetimes = values.is_datetime(block[self.time])
        for name, kind in self.extras.items():
            self.extras[name] = values.extra_kind(block[name]) if kind == "auto" else kind

    def convert(self, table: Table, first_row: int, block: Dict[str, pa.Array]) -> Tuple:
        """Converts a block to (users, items, times, extras). Raises UserError naming file, row and column."""
        column = self.user
        try:
            users = to_ids(block[column], self.user_type, "user id")
            column = self.item
            items = to_ids(block[column], self.item_type, "item id")
            column = self.time
            times = values.to_ticks(block[column], self.resolution, bool(self.datetimes))
            extras = {}
            for column, kind in self.extras.items():
                extras[column] = values.to_extra(block[column], column, kind)
        except BadValue as error:
            raise refuse(table, first_row, column, error, self._hint(column, error)) from None
        return users, items, times, extras

    def _hint(self, column: str, error: BadValue) -> str:
        if column in (self.user, self.item) and ("plain integer" in str(error) or "beyond int64" in str(error)):
            return f" (ids that are text: --{'user' if column == self.user else 'item'}-type text)"
        if column in self.extras and error.row is not None:
            return f" (or name the type: --extra-columns {column}:text)"
        return ""


def prepare_events(
    source: Sequence[str],
    user_column: str,
    item_column: str,
    time_column: str,
    output: str,
    *,
    extra_columns: Sequence[str] = (),
    time_unit: Union[str, float] = "s",
    user_type: str = "auto",
    item_type: str = "auto",
    item_titles: Optional[str] = None,
    titles_item_column: Optional[str] = None,
    title_column: str = "title",
    delimiter: Optional[str] = None,
    column_names: Optional[Sequence[str]] = None,
    memory_limit: str = "2GB",
    name: Optional[str] = None,
    overwrite: bool = False,
) -> DatasetIdentity:
    """Makes the data set `output` of an event log: one row an event, in any order.

    source: CSV (also .tsv, .gz, .bz2, .zst) and Parquet files, globs, addresses; their order settles ties.
    user_column, item_column: int64 or text. time_column: integers in `time_unit`, or datetimes, which are converted to
    it, rounded down. time_unit: "s", "ms", "us", "ns", or seconds per tick.
    extra_columns: kept as aligned list columns, "name" or "name:int", "name:float", "name:text".
    user_type, item_type: "integer", "text", or "auto" (the first value shows it).
    item_titles: a CSV or Parquet file with titles_item_column (default: item_column) and title_column.
    delimiter, column_names: for CSV; column_names where the files have no header.
    memory_limit: DuckDB's, for the sort; the process needs a few hundred MB beside it.

    Events are sorted per user by (time, source order); dense item ids follow the source's sorted ids; integer user ids
    are kept, text ones are numbered in sorted order (users.parquet). Raises UserError naming file, row and column.
    """
    seconds = seconds_per_tick(time_unit)
    columns = EventColumns(user_column, item_column, time_column, user_type, item_type, _extras(extra_columns))
    columns.resolution = "ns" if seconds < 1e-6 else "us"
    with OutputFolder(output, overwrite) as folder:
        paths = expand(source)
        titles = None
        if item_titles is not None:
            keys = [titles_item_column or item_column, title_column]
            titles = _open_table(expand([item_titles])[0], keys, delimiter, None)
        tables = [_open_table(path, columns.names, delimiter, column_names) for path in paths]
        with EventSorter(folder.work, memory_limit) as sorter:
            _add_events(tables, columns, sorter)
            divisor = _ticks_divisor(columns, seconds, time_unit)
            listed = _read_titles(titles, columns.item_type) if titles is not None else None
            sorter.sort()
            with SequenceWriter(folder, sorter.num_users, sorter.num_items) as writer:
                return writer.finish(
                    _write(sorter, writer, divisor, listed),
                    name=name or os.path.basename(folder.output),
                    catalogue="rated",
                    time_unit=seconds,
                    source=source_name(source),
                    source_checksum=_checksum(paths),
                )


def _add_events(tables: Sequence[Table], columns: EventColumns, sorter: EventSorter) -> None:
    for table in tables:
        for first_row, block in table.blocks():
            if len(block[columns.user]) == 0:
                continue
            if sorter.num_events == 0:
                columns.settle(block)
            sorter.add(*columns.convert(table, first_row, block))
    if sorter.num_events == 0:
        raise UserError(f"{', '.join(table.name for table in tables)}: no events in it; name files with at least one")


def _write(
    sorter: EventSorter, writer: SequenceWriter, divisor: int, listed: Optional[Tuple[pa.Array, pa.Array]]
) -> Dict[str, int]:
    """Writes everything but dataset.json and returns its report."""
    for sequences in sorter.sequences():
        sequences.timestamps = sequences.timestamps // divisor
        writer.write(sequences)
    report = {"unsorted_events": sorter.unsorted_events, "duplicate_events": sorter.duplicate_events}
    titles = None
    if listed is not None:
        titles = sorter.titles(*listed)
        report["items_without_title"] = titles.null_count
    writer.write_items(sorter.source_items(), titles)
    if (users := sorter.source_users()) is not None:
        writer.write_users(users)
    return report


def to_ids(array: pa.Array, kind: str, what: str) -> pa.Array:
    """Converts checked ids: int64 for kind "integer", string for "text"."""
    return values.to_text(array, what) if kind == "text" else values.to_int64(array, what)


def seconds_per_tick(time_unit: Union[str, float]) -> float:
    """Parses a unit of time: "s", "ms", "us", "ns" or a positive number of seconds. Raises UserError for anything
    else."""
    if time_unit in TIME_UNITS:
        return TIME_UNITS[time_unit]
    try:
        seconds = float(time_unit)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"--time-unit {time_unit}: it is s, ms, us, ns, or the seconds in one tick (60)")
    return seconds


def expand(source: Sequence[str]) -> List[str]:
    """Lists the local paths of files, globs and addresses, in order. Raises UserError for what is not there."""
    paths: List[str] = []
    for pattern in source:
        if "://" not in pattern and not os.path.exists(pattern):
            found = sorted(glob.glob(pattern))
            if not found:
                raise UserError(f"{pattern}: no such file")
            paths += found
        else:
            paths.append(local_copy(pattern))
    for path in paths:
        if os.path.isdir(path):
            raise UserError(f"{path}: a folder; name the files in it, such as {path.rstrip('/')}/*.parquet")
    if not paths:
        raise UserError("--source: name at least one file")
    return paths


def _open_table(path: str, columns: List[str], delimiter: Optional[str], names: Optional[Sequence[str]]) -> Table:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if magic == b"PAR1" or path.endswith((".parquet", ".pq")):
        return ParquetTable(path, path, columns)
    delimiter = (delimiter or ("\t" if ".tsv" in os.path.basename(path) else ",")).replace("\\t", "\t")
    if len(set(delimiter)) != 1 or len(delimiter) > 2:
        raise UserError(f"--delimiter {delimiter!r}: one character, or the same one twice (::)")
    return CsvTable(
        path,
        lambda: pa.input_stream(path, compression="detect"),
        columns,
        delimiter,
        list(names) if names else None,
        quoted=len(delimiter) == 1,
        multiline=len(delimiter) == 1,
    )


def _id_type(kind: str, array: pa.Array) -> str:
    if kind not in ("auto", "integer", "text"):
        raise UserError(f"--user-type, --item-type {kind}: it is auto, integer or text")
    if kind != "auto":
        return kind
    if not values.is_text(array.type):
        return "integer"
    if pa.types.is_dictionary(array.type):
        return "text"
    return "integer" if array[0].as_py() in (None, "") or values.looks_like_number(array[0].as_py()) else "text"


def _extras(specifications: Sequence[str]) -> Dict[str, str]:
    extras: Dict[str, str] = {}
    for specification in specifications:
        name, _, kind = specification.rpartition(":")
        if kind not in ("int", "float", "text") or not name:
            name, kind = specification, "auto"
        if name in RESERVED or name in extras:
            raise UserError(f"--extra-columns {name}: the name is taken; rename the column")
        extras[name] = kind
    return extras


def _ticks_divisor(columns: EventColumns, seconds: float, time_unit: Union[str, float]) -> int:
    """What the sorted times are divided by: 1 for integers, which are in the data set's ticks already."""
    if not columns.datetimes:
        return 1
    ticks = seconds / (1e-9 if columns.resolution == "ns" else 1e-6)
    if round(ticks) < 1 or abs(ticks - round(ticks)) > 1e-6 * ticks:
        raise UserError(f"--time-unit {time_unit}: datetimes need whole microseconds, or ns")
    return round(ticks)


def _read_titles(table: Table, item_type: str) -> Tuple[pa.Array, pa.Array]:
    """(item ids int64 or string, titles string) of every row of a table with the columns (item, title)."""
    item_column, title_column = table.columns
    ids: List[pa.Array] = [pa.array([], pa.string() if item_type == "text" else pa.int64())]
    texts: List[pa.Array] = [pa.array([], pa.string())]
    for first_row, block in table.blocks():
        try:
            ids.append(to_ids(block[item_column], item_type, "item id"))
        except BadValue as error:
            raise refuse(table, first_row, item_column, error) from None
        texts.append(block[title_column].cast(pa.string()))
    return pa.concat_arrays(ids), pa.concat_arrays(texts)


def source_name(source: Sequence[str]) -> str:
    """Names the files of a log as dataset.json does, without local folders."""
    names = [name if "://" in name else os.path.basename(name) for name in source]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _checksum(paths: List[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
