"""Reads CSV and Parquet files block by block, and knows where in the file a row stands when it must be named."""

import csv
import io
from dataclasses import dataclass, field
from typing import BinaryIO, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple, Union

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_pipelines.values import BadValue
from fuxi_torchrec.errors import UserError, one_line

CSV_BLOCK_BYTES = 8 << 20
PARQUET_BLOCK_ROWS = 1 << 18


@dataclass
class CsvTable:
    """A CSV-like file. Wanted columns come as text, so that every value can be checked before it is a number.

    open_file opens it afresh in binary (it is read again where an error must name its line). names: the columns of a
    file without a header. A delimiter of two equal characters ("::") is MovieLens'. quoted=False: quotes are text.
    """

    name: str
    open_file: Callable[[], ContextManager[BinaryIO]]
    columns: List[str]
    delimiter: str = ","
    names: Optional[List[str]] = None
    quoted: bool = True
    multiline: bool = False  # quoted values may hold line ends (slower)
    _header: List[str] = field(default_factory=list)

    def blocks(self) -> Iterator[Tuple[int, Dict[str, pa.Array]]]:
        """Yields (rows before the block, column -> text array). Raises UserError naming file and line."""
        try:
            self._header = self.names or self._read_header()
            _require_columns(self.name, self.columns, self._header)
            rows = 0
            with self.open_file() as file:
                for batch in self._reader(file):
                    yield rows, dict(zip(self.columns, batch.columns))
                    rows += len(batch)
        except pa.ArrowInvalid as error:
            if "Empty CSV file" not in str(error):  # no events: for the caller to say, who may have other files
                raise self._explain(error) from None
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's own trouble, not the file's
            raise UserError(f"{self.name}: damaged or truncated ({one_line(error)}); fetch it again") from None

    def place(self, row: int) -> str:
        """Says where data row `row` (0-based) begins: 'line N', 1-based, the header, empty lines and all counted."""
        with self.open_file() as file:
            for number, (line, _) in enumerate(self._records(file), start=-1 if self.names is None else 0):
                if number == row:
                    return f"line {line}"
        return f"row {row + 1}"

    def _reader(self, file: BinaryIO) -> pa_csv.CSVStreamingReader:
        wide = len(self.delimiter)  # "a::b" read with ":" has an empty column between a and b
        count = (len(self._header) - 1) * wide + 1
        names = [f"c{i}" for i in range(count)]
        used = [names[self._header.index(name) * wide] for name in self.columns]
        return pa_csv.open_csv(
            file,
            read_options=pa_csv.ReadOptions(
                column_names=names,
                block_size=CSV_BLOCK_BYTES,
                skip_rows_after_names=1 if self.names is None else 0,
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=self.delimiter[0],
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.multiline,
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=used, column_types={name: pa.string() for name in used}, strings_can_be_null=False
            ),
        )

    def _read_header(self) -> List[str]:
        with self.open_file() as file:
            for _, record in self._records(file):
                return record
        raise UserError(f"{self.name}: the file is empty; name a file with a header and events")

    def _records(self, file: BinaryIO) -> Iterator[Tuple[int, List[str]]]:
        """(line on which it begins, values) of every non-empty record, slowly."""
        text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
        if not self.quoted:
            for line, content in enumerate(text, start=1):
                if content.strip("\r\n"):
                    yield line, content.rstrip("\r\n").split(self.delimiter)
            return
        reader = csv.reader(text, delimiter=self.delimiter)
        before = 0
        for record in reader:
            if record:
                yield before + 1, record
            before = reader.line_num

    def _explain(self, error: Exception) -> UserError:
        expected = len(self._header)
        with self.open_file() as file:
            for line, record in self._records(file):
                if len(record) != expected:
                    few = "few" if len(record) < expected else "many"
                    return UserError(
                        f"{self.name}, line {line}: too {few} fields ({len(record)}, expected {expected}); "
                        "mend or remove the line"
                    )
                if any("\ufffd" in value for value in record):
                    return UserError(f"{self.name}, line {line}: not UTF-8 text; convert the file to UTF-8")
        return UserError(f"{self.name}: not a readable CSV file ({one_line(error)})")


@dataclass
class ParquetTable:
    """A Parquet file; wanted columns come in the file's own types."""

    name: str
    path: str
    columns: List[str]

    def blocks(self) -> Iterator[Tuple[int, Dict[str, pa.Array]]]:
        """Yields (rows before the block, column -> array). Raises UserError naming the file."""
        try:
            # Without pre-buffering a file that is one large row group is streamed as well.
            with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as file:
                _require_columns(self.name, self.columns, file.schema_arrow.names)
                rows = 0
                for batch in file.iter_batches(PARQUET_BLOCK_ROWS, columns=self.columns):
                    yield rows, {name: batch.column(name) for name in self.columns}
                    rows += len(batch)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's own trouble, not the file's
            raise UserError(f"{self.name}: not a readable Parquet file ({one_line(error)}); fetch it again") from None

    def place(self, row: int) -> str:
        """Says which row `row` (0-based) is."""
        return f"row {row + 1}"


def refuse(table: "Union[CsvTable, ParquetTable]", first_row: int, column: str, error: BadValue, hint: str = "") -> UserError:
    """Makes the UserError for a bad value found in the block of `table` that begins after `first_row` rows."""
    if error.row is None:
        return UserError(f"{table.name}, column {column!r}: {error}{hint}")
    return UserError(f"{table.name}, {table.place(first_row + error.row)}, column {column!r}: {error}{hint}")


def _require_columns(name: str, wanted: List[str], found: List[str]) -> None:
    missing = [column for column in wanted if column not in found]
    if missing:
        raise UserError(f"{name}: no column {missing[0]!r}; the file has {', '.join(map(repr, found))}")
