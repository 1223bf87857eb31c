"""MovieLens archives, all layouts, to a data set of sequences."""

import csv
import io
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np
import pyarrow as pa

from data_pipelines import values
from data_pipelines.archive import Archive
from data_pipelines.output import OutputFolder
from data_pipelines.sorting import EventSorter
from data_pipelines.tables import CsvTable, refuse
from data_pipelines.writer import SequenceWriter
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Spelling of one generation of archives. names: the ratings' columns where the file has no header."""

    ratings_file: str
    movies_file: str
    delimiter: str
    movies_delimiter: str
    names: Optional[Tuple[str, ...]] = None

    @property
    def columns(self) -> List[str]:
        """Columns of the ratings: user, movie, rating, timestamp."""
        return list(self.names or ("userId", "movieId", "rating", "timestamp"))


_COLUMNS = ("user", "movie", "rating", "timestamp")
LAYOUTS = (
    Layout("ratings.csv", "movies.csv", ",", ","),  # ml-20m, 25m, 32m, latest, latest-small
    Layout("ratings.dat", "movies.dat", "::", "::", _COLUMNS),  # ml-1m, ml-10m
    Layout("u.data", "u.item", "\t", "|", _COLUMNS),  # ml-100k
)


def prepare_movielens(
    source: str,
    output: str,
    catalogue: str = "rated",
    checksum: Optional[str] = None,
    overwrite: bool = False,
    memory_limit: str = "2GB",
) -> DatasetIdentity:
    """Makes the data set `output` (a folder or an address) of a MovieLens archive.

    source: a zip, a folder, or an address such as https://files.grouplens.org/datasets/movielens/ml-1m.zip.
    catalogue: "rated" (movies that occur) or "all" (every movie listed, and any rated one that is not).
    checksum: md5 or sha256 of the archive, verified before anything else. memory_limit: for the sort (DuckDB's).

    Events are sorted per user by (timestamp, place in the file), timestamps in seconds; ratings become the aligned
    float32 column `ratings`; no user and no item is filtered out. Dense item ids follow the source's ids.

    Raises UserError naming file and line for anything that cannot be read; nothing is left behind then.
    """
    if catalogue not in ("rated", "all"):
        raise UserError(f"--catalogue {catalogue}: it is 'rated' or 'all'")
    with OutputFolder(output, overwrite) as folder, Archive(source, checksum) as archive:
        layout, ratings_name, movies_name = _detect(archive)
        archive.keep_only([ratings_name, movies_name])
        titles = _read_titles(archive, movies_name, layout)
        with EventSorter(folder.work, memory_limit) as sorter:
            _add_ratings(archive, ratings_name, layout, sorter)
            sorter.sort(pa.array(sorted(titles), pa.int64()) if catalogue == "all" else None)
            with SequenceWriter(folder, sorter.num_users, sorter.num_items) as writer:
                for sequences in sorter.sequences():
                    writer.write(sequences)
                items = sorter.source_items()
                writer.write_items(items, pa.array([titles.get(i) for i in items.to_pylist()], pa.string()))
                return writer.finish(
                    _report(sorter, titles, items, writer.frequency),
                    name=archive.name,
                    catalogue=catalogue,
                    time_unit=1.0,
                    source=source.rstrip("/") if "://" in source else source.rstrip("/").split("/")[-1],
                    source_checksum=archive.checksum(),
                )


def _detect(archive: Archive) -> Tuple[Layout, str, str]:
    """(layout, name of the ratings file, name of the movies file)."""
    for layout in LAYOUTS:
        ratings = archive.find(layout.ratings_file)
        if ratings is None:
            continue
        movies = archive.find(layout.movies_file)
        if movies is None:
            raise UserError(f"{archive.source}: {ratings} is there, {layout.movies_file} is not; fetch it again")
        return layout, ratings, movies
    wanted = ", ".join(layout.ratings_file for layout in LAYOUTS)
    raise UserError(
        f"{archive.source}: no MovieLens ratings inside (none of {wanted}); for other logs use 'prepare events'"
    )


def _add_ratings(archive: Archive, name: str, layout: Layout, sorter: EventSorter) -> None:
    user, movie, rating, timestamp = layout.columns
    table = CsvTable(
        f"{archive.source}: {name}",
        lambda: archive.reading(name),
        layout.columns,
        delimiter=layout.delimiter,
        names=list(layout.names) if layout.names else None,
        quoted=layout.names is None,
    )
    for first_row, columns in table.blocks():
        column = user
        try:
            users = values.to_int64(columns[user], "user id")
            column = movie
            movies = values.to_int64(columns[movie], "movie id")
            column = timestamp
            times = values.to_int64(columns[timestamp], "timestamp")
            column = rating
            ratings = values.to_float(columns[rating], "rating", pa.float32())
        except values.BadValue as error:
            raise refuse(table, first_row, column, error) from None
        sorter.add(users, movies, times, {"ratings": ratings})
    if sorter.num_events == 0:
        raise UserError(f"{table.name}: no ratings in it; fetch the archive again")


def _read_titles(archive: Archive, name: str, layout: Layout) -> Dict[int, Optional[str]]:
    """Movie id -> title of every listed movie. Raises UserError naming the line."""
    with archive.reading(name) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # the older archives
    titles: Dict[int, Optional[str]] = {}
    for line, record in _movie_records(text, layout):
        where = f"{archive.source}: {name}, line {line}"
        if len(record) < 3:
            raise UserError(f"{where}: too few fields ({len(record)}, expected 3); mend or remove the line")
        try:
            movie = values.to_int64(pa.array([record[0]]), "movie id")[0].as_py()
        except values.BadValue as error:
            raise UserError(f"{where}: {error}") from None
        titles.setdefault(movie, record[1] or None)
    return titles


def _movie_records(text: str, layout: Layout) -> Iterator[Tuple[int, List[str]]]:
    if layout.movies_delimiter == ",":
        reader = csv.reader(io.StringIO(text, newline=""))
        next(reader, None)  # movieId,title,genres
        for record in reader:
            if record:
                yield reader.line_num, record
        return
    # Not splitlines(): it also splits at characters that stand in titles (\x85 is one of latin-1's).
    for line, content in enumerate(text.split("\n"), start=1):
        if content.rstrip("\r"):
            yield line, content.rstrip("\r").split(layout.movies_delimiter)


def _report(sorter: EventSorter, titles: Dict, items: pa.Array, frequency: np.ndarray) -> Dict[str, int]:
    return {
        "unsorted_events": sorter.unsorted_events,
        "duplicate_events": sorter.duplicate_events,
        "listed_items": len(titles),
        "items_without_title": sum(titles.get(i) is None for i in items.to_pylist()),
    }
