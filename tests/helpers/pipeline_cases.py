"""Tiny raw data and readers shared by the tests of data_pipelines. All rows are invented."""

import os
import zipfile
from typing import Dict, List, Optional

import pyarrow.parquet as pq

# user, movie, rating, timestamp: unsorted, with a tie (30 and 20 at time 5), a duplicate and a user with one event
RATINGS = [
    (1, 30, 4.0, 5),
    (1, 20, 3.0, 5),
    (1, 10, 5.0, 1),
    (2, 20, 3.5, 7),
    (2, 20, 3.5, 7),
    (2, 40, 1.0, 9),
    (3, 30, 2.0, 8),
]
MOVIES = {10: "Café, The (1990)", 20: "Plain (1991)", 30: "Says ¡Hi! (1992)", 40: "Last (1993)", 50: "Unseen (1994)"}
LAYOUTS = ("ml-100k", "ml-1m", "csv")


def layout_files(layout: str, ratings=None, movies: Optional[Dict[int, str]] = None) -> Dict[str, bytes]:
    """name -> content of an archive's files."""
    ratings = RATINGS if ratings is None else ratings
    movies = MOVIES if movies is None else movies
    if layout == "ml-100k":
        lines = ["\t".join(map(str, row)) for row in ratings]
        items = [f"{i}|{t}|01-Jan-1995||http://x|0|1" for i, t in movies.items()]
        return {"u.data": _text(lines), "u.item": _text(items, "latin-1")}
    if layout == "ml-1m":
        lines = ["::".join(map(str, row)) for row in ratings]
        items = [f"{i}::{t}::Drama|Comedy" for i, t in movies.items()]
        return {"ratings.dat": _text(lines), "movies.dat": _text(items, "latin-1"), "users.dat": b"1::F::1::10::48\n"}
    lines = ["userId,movieId,rating,timestamp"] + [",".join(map(str, row)) for row in ratings]
    items = ["movieId,title,genres"] + [f'{i},"{t}",Drama|Comedy' for i, t in movies.items()]
    return {"ratings.csv": _text(lines), "movies.csv": _text(items)}


def write_zip(path, files: Dict[str, bytes], top: str = "ml-test") -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{top}/{name}", content)
    return str(path)


def write_folder(path, files: Dict[str, bytes]) -> str:
    os.makedirs(path)
    for name, content in files.items():
        with open(os.path.join(path, name), "wb") as file:
            file.write(content)
    return str(path)


def users_of(folder) -> List[dict]:
    """Every row of the part files, in order."""
    train = os.path.join(folder, "train")
    return [row for name in sorted(os.listdir(train)) for row in pq.read_table(os.path.join(train, name)).to_pylist()]


def items_of(folder) -> List[dict]:
    return pq.read_table(os.path.join(folder, "items.parquet")).to_pylist()


def tree(folder) -> Dict[str, bytes]:
    """Every file below a folder -> its bytes; a folder itself -> b"/"."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(parent, name), folder)] = b"/"
        for name in files:
            with open(os.path.join(parent, name), "rb") as file:
                found[os.path.relpath(os.path.join(parent, name), folder)] = file.read()
    return found


def _text(lines: List[str], encoding: str = "utf-8") -> bytes:
    return ("\n".join(lines) + "\n").encode(encoding)
