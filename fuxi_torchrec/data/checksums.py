"""Are the files of a data set still those that `prepare` wrote? Sizes and rows at every start, bytes on demand. No torch.

dataset.json records of each file {"bytes": int, "rows": int, "sha256": hexadecimal}; data sets of schema 1.0 have no such
record, only one checksum over all bytes.
"""

import contextlib
import hashlib
import os
from typing import BinaryIO, Dict, Iterable, Iterator, List, Tuple

import pyarrow as pa
import pyarrow.parquet as pq

from fuxi_torchrec.data.format import ITEMS_FILE, TRAIN_FOLDER, USERS_FILE, DatasetIdentity
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import join, names_in, path_manager

ADVICE = "copy the data set again from where it is whole, or prepare it again"


def part_names(folder: str) -> List[str]:
    """Lists the part files, "train/part-….parquet", in name order."""
    names = sorted(names_in(join(folder, TRAIN_FOLDER)))
    return [f"{TRAIN_FOLDER}/{name}" for name in names if name.startswith("part-") and name.endswith(".parquet")]


def file_names(folder: str) -> List[str]:
    """Lists the data files in a data set's folder, in the order of the content checksum."""
    users = [USERS_FILE] if path_manager().isfile(join(folder, USERS_FILE)) else []
    return [ITEMS_FILE, *part_names(folder), *users]


def describe_files(folder: str, names: Iterable[str]) -> Tuple[Dict[str, JsonObject], str]:
    """Reads every byte; returns the `files` and the `content_checksum` ("sha256:…" over all bytes) of dataset.json."""
    whole, files = hashlib.sha256(), {}
    for name in names:
        own = hashlib.sha256()
        with path_manager().open(join(folder, name), "rb") as file:
            facts = size_and_rows(file)
            file.seek(0)
            while block := file.read(1 << 20):
                own.update(block)
                whole.update(block)
        files[name] = {**facts, "sha256": own.hexdigest()}
    return files, f"sha256:{whole.hexdigest()}"


def size_and_rows(file: BinaryIO) -> Dict[str, int]:
    """Reads the size and the footer of an open Parquet file: {"bytes", "rows"}."""
    rows = pq.read_metadata(file).num_rows
    return {"bytes": file.seek(0, os.SEEK_END), "rows": rows}


def check_start(folder: str, identity: DatasetIdentity) -> None:
    """Compares the sizes and rows of the files beside the parts, which SequenceDataset compares as it opens them.

    Raises UserError for a file that is missing or another one. Without a record, items.parquet must be there at least.
    """
    names = [name for name in identity.files if not name.startswith(f"{TRAIN_FOLDER}/")]
    for name in names or [ITEMS_FILE]:
        path = join(folder, name)
        with _reading(path):
            if not path_manager().isfile(path):
                raise UserError(f"{path}: missing; {ADVICE}")
            if names:
                with path_manager().open(path, "rb") as file:
                    compare(path, size_and_rows(file), identity.files[name])


def compare(path: str, found: JsonObject, recorded: JsonObject) -> None:
    """Compares a file with its record in dataset.json. Raises UserError, naming what differs."""
    for key, value in found.items():
        if value != recorded.get(key):
            said = f"{key} {value}, dataset.json says {recorded.get(key)}"
            raise UserError(f"{path}: not the file that prepare wrote ({said}); {ADVICE}")


def verify_files(folder: str, identity: DatasetIdentity, rank: int = 0, world_size: int = 1) -> None:
    """Reads every byte, this rank's share of the files, and compares checksums. Raises UserError for the first difference.

    A data set without a record of its files has one checksum over all of them, which rank 0 compares."""
    recorded = identity.files
    for name in sorted(recorded)[rank::world_size]:
        path = join(folder, name)
        with _reading(path):
            found, _ = describe_files(folder, [name])
        compare(path, found[name], recorded[name])
    if not recorded and rank == 0:
        with _reading(folder):
            _, content = describe_files(folder, file_names(folder))
        compare(folder, {"content_checksum": content}, {"content_checksum": identity.content_checksum})


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = one_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); {ADVICE}") from None
