"""The Parquet sequence format: names, schemas and the identity card of a data set. No torch here: `prepare` uses it too.

    DIR/train/part-*.parquet   one row per user, in several row groups (a row group is the unit dealt to ranks)
    DIR/items.parquet          dense item id -> the source's id, title, frequency
    DIR/users.parquet          only where the source's user ids are not int64: user_id -> the source's id
    DIR/dataset.json           DatasetIdentity, written last: a folder without it is not a data set
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import pyarrow as pa

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import join, path_manager

# Version 1 is read for good. A key that is added gets a default here and raises the minor version, which this release
# then writes; readers of an older minor version pass over it.
SCHEMA_VERSION = 1
SCHEMA_MINOR = 1
TRAIN_FOLDER = "train"
ITEMS_FILE = "items.parquet"
USERS_FILE = "users.parquet"
IDENTITY_FILE = "dataset.json"

# Every column beyond these three in a part file is a list aligned with item_ids (ratings, actions, log_probs, …).
SEQUENCE_FIELDS = [
    pa.field("user_id", pa.int64(), nullable=False),
    pa.field("item_ids", pa.list_(pa.int64()), nullable=False),
    pa.field("timestamps", pa.list_(pa.int64()), nullable=False),
]
# source_id is int64 where the source's ids are integers, string otherwise. frequency counts the item's events with
# each user's last event left out, so that it holds nothing of what leave_one_out tests on.
ITEM_COLUMNS = ("item_id", "source_id", "title", "frequency")
LOG_PROBS_COLUMN = "log_probs"  # what the generator of synthetic data calls its log_prob_column


@dataclass(frozen=True)
class DatasetIdentity:
    """`dataset.json`. Counts are of what is on disk; `report` says what preparation skipped, sorted or found twice."""

    name: str
    num_users: int
    num_items: int  # V: dense ids are 0 … V-1
    num_events: int
    catalogue: str  # "rated": items that occur; "all": every item the source lists
    time_unit: float  # seconds per tick of `timestamps` (1.0: seconds, 0.001: milliseconds)
    min_timestamp: int
    max_timestamp: int
    max_events_per_user: int
    source: str  # file name or address, without local folders
    source_checksum: str  # "sha256:…" of the source file(s)
    content_checksum: str  # "sha256:…" over items.parquet, the part files and users.parquet, where there is one
    columns: List[str] = field(default_factory=list)  # aligned list columns beyond item_ids and timestamps
    report: Dict[str, int] = field(default_factory=dict)
    generator: JsonObject = field(default_factory=dict)  # synthetic data: every parameter of the generator
    # Synthetic data: the float64 column of `columns` that holds the generator's own log p of each event.
    log_prob_column: Optional[str] = None
    # Relative path of every Parquet file -> "bytes", "rows" (int) and "sha256" (hexadecimal); empty in schema 1.0.
    files: Dict[str, JsonObject] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    schema_minor: int = SCHEMA_MINOR

    def to_json(self) -> str:
        """Returns the JSON text of dataset.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_identity(folder: str) -> DatasetIdentity:
    """Reads DIR/dataset.json, of this schema version and any minor one: what an older one lacks has its default, what a
    newer one adds is passed over. Raises UserError where the file is missing, unreadable or of another version."""
    path = join(folder, IDENTITY_FILE)
    try:
        found = path_manager().isfile(path)
    except NotImplementedError:  # iopath cannot list, say, an http address
        raise UserError(f"{folder}: data sets cannot be read from this kind of address; use a folder or a bucket") from None
    if not found:
        raise UserError(
            f"{folder}: no data set here ({IDENTITY_FILE} is missing); make one with 'fuxi-torchrec prepare', "
            "or name another folder with --data.path"
        )
    try:
        with path_manager().open(path, "rb") as file:
            values = json.load(file)
        version, minor = values["schema_version"], values.get("schema_minor", 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a data set's identity ({error}); prepare the data set again") from None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "update fuxi_torchrec" if newer else "prepare the data set again"
        raise UserError(f"{path}: schema version {version}, this release reads version {SCHEMA_VERSION}; {advice}")
    _check_keys(path, values, minor)
    return DatasetIdentity(**_upgraded(values, minor))


def _check_keys(path: str, values: JsonObject, minor: Any) -> None:
    """Raises UserError for a key that is missing, holds another type, or is unknown though this release knows them all."""
    fields = {f.name: f for f in dataclasses.fields(DatasetIdentity)}
    for name, key in fields.items():
        required = key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING
        kinds: Any = (float, int) if key.type is float else typing.get_origin(key.type) or key.type
        if name not in values:
            if required:
                raise UserError(f"{path}: {name} is missing; prepare the data set again")
        elif kinds is not typing.Union and (not isinstance(values[name], kinds) or isinstance(values[name], bool)):
            raise UserError(f"{path}: {name} cannot be {values[name]!r}; prepare the data set again")
    unknown = sorted(set(values) - set(fields))
    if unknown and minor <= SCHEMA_MINOR:
        raise UserError(f"{path}: unknown key {unknown[0]}; prepare the data set again")


def _upgraded(values: JsonObject, minor: int) -> JsonObject:
    """The keys that this release knows, in the meaning of its own minor version."""
    known = {f.name for f in dataclasses.fields(DatasetIdentity)} - {"schema_minor"}
    kept = {name: value for name, value in values.items() if name in known}
    if minor < 1 and values.get("generator") and LOG_PROBS_COLUMN in values.get("columns", []):
        kept["log_prob_column"] = LOG_PROBS_COLUMN  # the column's name alone said so then
    return kept


def same_data(one: DatasetIdentity, other: DatasetIdentity) -> bool:
    """Tells whether a model trained on the one may be used on the other: the same bytes, in the same unit of time."""
    return (one.content_checksum, one.time_unit) == (other.content_checksum, other.time_unit)
