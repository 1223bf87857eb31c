"""`fuxi-torchrec prepare movielens|events|synthetic`: options, and a summary of what was made.

`--help` must answer at once, so the work is imported when it is done. The options are argparse's own: no config file
stands behind them, and its errors name an option as it is typed.
"""

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, Dict, List, NoReturn, Optional, Set

if TYPE_CHECKING:
    from fuxi_torchrec.data.format import DatasetIdentity

COMMANDS = {
    "movielens": "a MovieLens archive (ml-100k, 1m, 10m, 20m, 25m, 32m, latest, latest-small)",
    "events": "any event log: CSV or Parquet files, larger than memory if need be",
    "synthetic": "generated sequences whose cross-entropy floor is known, or a MovieLens-like archive",
}
YEAR_2200 = 7_258_118_400  # seconds since 1970
DEFAULT_CLUSTERS = 32


def main(arguments: List[str]) -> int:
    """Runs `prepare` with its arguments and prints a summary. Returns 0, or 128 + n where signal n ended the work.

    Raises UserError for bad input, SystemExit (2) after one line on standard error for wrong options."""
    from data_pipelines.interrupts import ended_by_signals

    options = parse(arguments)
    with ended_by_signals() as stop:
        run(options)
    return stop.code


def parse(arguments: List[str]) -> argparse.Namespace:
    """Parses the options of the pipeline that `kind` names; --with_underscores are taken as --with-dashes."""
    parser = _Parser(prog="fuxi-torchrec prepare", description="Raw data to a data set folder.", allow_abbrev=False)
    _add_pipelines(parser)
    return parser.parse_args([re.sub(r"^--[\w-]+", lambda option: option[0].replace("_", "-"), a) for a in arguments])


def path_options() -> Set[str]:
    """Names the options, of any pipeline, whose values are paths, globs or addresses."""
    found: Set[str] = set()
    for pipeline in _add_pipelines(_Parser()).choices.values():
        found.update(name for action in pipeline._actions if action.type is path for name in action.option_strings)
    return found


def path(text: str) -> str:
    """Marks an option, as its type, for `path_options`; the value stays as it is."""
    return text


def run(options: argparse.Namespace) -> None:
    """Runs a pipeline with its parsed options and prints a summary. Raises UserError for bad input."""
    given: Dict[str, Any] = {key: value for key, value in vars(options).items() if value is not None}
    command = given.pop("kind")
    identity: Optional[DatasetIdentity]
    if command == "movielens":
        from data_pipelines.movielens import prepare_movielens

        identity = prepare_movielens(**given)
    elif command == "events":
        from data_pipelines.events import prepare_events

        identity = prepare_events(**given)
    else:
        identity = _run_synthetic(given)
    if identity is not None:
        print("\n".join(summary(identity, given["output"])))
        if identity.max_timestamp * identity.time_unit > YEAR_2200:
            note = "the newest time lies beyond the year 2200; are these milliseconds? (--time-unit ms)"
            print(f"warning: {note}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _add_pipelines(parser: argparse.ArgumentParser) -> Any:
    pipelines = parser.add_subparsers(dest="kind", required=True, metavar="|".join(COMMANDS))
    for name, add_options in (("movielens", _movielens), ("events", _events), ("synthetic", _synthetic)):
        what = COMMANDS[name]
        pipeline = pipelines.add_parser(name, help=what, description=f"Prepares {what}.", allow_abbrev=False)
        add_options(pipeline)
        pipeline.add_argument("--overwrite", action="store_true", help="replace the data set that is there")
    return pipelines


def summary(identity: "DatasetIdentity", output: str) -> List[str]:
    """Lists what a data set holds and what was found on the way, a line each."""
    rows = [
        ("users", f"{identity.num_users:,}"),
        ("items", f"{identity.num_items:,} (catalogue: {identity.catalogue})"),
        ("events", f"{identity.num_events:,} (at most {identity.max_events_per_user:,} a user)"),
        ("time", _time_range(identity)),
    ]
    if identity.columns:
        rows.append(("columns", ", ".join(identity.columns)))
    notes = {
        "unsorted_events": "stood after a later event of their user; sorted by (time, place in the source)",
        "duplicate_events": "repeat a user, item and time; kept",
        "single_event_users": "users have a single event; kept here, skipped in training",
        "items_without_title": "items have no title",
    }
    for key, note in notes.items():
        if identity.report.get(key):
            rows.append((key.split("_")[0], f"{identity.report[key]:,} {note}"))
    return [f"{output}: {identity.name}"] + [f"  {name:<11}{text}" for name, text in rows]


def _run_synthetic(given: Dict[str, Any]) -> "Optional[DatasetIdentity]":
    if given.pop("format") == "sequences":
        from data_pipelines.synthetic import prepare_synthetic

        given.setdefault("clusters", min(DEFAULT_CLUSTERS, max(given["items"], 1)))

        return prepare_synthetic(**given)
    from data_pipelines.movielens_like import write_movielens_archive

    given.pop("unique_items")  # films are never rated twice, asked for or not
    made = write_movielens_archive(given.pop("output"), **given)
    print(f"{made}: generated, in the layout of ml-1m.zip; next: fuxi-torchrec prepare movielens --source {made}")
    return None


def _movielens(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--source", type=path, required=True, help="a zip, a folder, or the address of a zip")
    option("--output", type=path, required=True, help="folder of the data set to make")
    catalogue = "which movies can be recommended: those that were rated, or all that the archive lists (default: rated)"
    option("--catalogue", choices=("rated", "all"), default="rated", help=catalogue)
    option("--checksum", help="md5 or sha256 that the archive must have; compared before anything else")
    _memory_limit(parser)


def _events(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    source = "CSV or Parquet files, as paths, globs or addresses; all of them are one log"
    option("--source", type=path, nargs="+", required=True, help=source)
    option("--user-column", required=True, help="column that holds each event's user id")
    option("--item-column", required=True, help="column that holds each event's item id")
    option("--time-column", required=True, help="column that holds each event's time: integers, or datetimes")
    option("--output", type=path, required=True, help="folder of the data set to make")
    unit = "unit of the times: s, ms, us, ns, or a number of seconds; datetimes are converted to it (default: s)"
    option("--time-unit", default="s", help=unit)
    extra = "further columns to keep with the events: NAME, or with what it holds NAME:int, NAME:float, NAME:text"
    option("--extra-columns", nargs="+", default=[], help=extra)
    for kind in ("user", "item"):
        what = f"what {kind} ids are; auto decides by the first one; text keeps 007 as it stands (default: auto)"
        option(f"--{kind}-type", choices=("auto", "integer", "text"), default="auto", help=what)
    option("--item-titles", type=path, help="another CSV or Parquet file, with a title for each item; 'recommend' prints them")
    item_column = "column of the --item-titles file that holds the item ids (default: the name in --item-column)"
    option("--titles-item-column", help=item_column)
    title_column = "column of the --item-titles file that holds the titles (default: title)"
    option("--title-column", default="title", help=title_column)
    option("--delimiter", help="what stands between the values of a CSV file (default: a tab for .tsv, else a comma)")
    option("--column-names", nargs="+", help="names of the columns, for CSV files without a header line")
    _memory_limit(parser)
    option("--name", help="name of the data set in reports (default: that of the output folder)")


def _synthetic(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--users", type=int, required=True, help="number of users")
    option("--items", type=int, required=True, help="number of items in the catalogue")
    option("--events-per-user", type=int, required=True, help="mean length of a user's history")
    option("--output", type=path, required=True, help="folder of the data set to make, or for --format ml-1m the zip file")
    formats = "sequences: a data set; ml-1m: a zip for 'prepare movielens' (default: sequences)"
    option("--format", choices=("sequences", "ml-1m"), default="sequences", help=formats)
    option("--seed", type=int, default=0, help="another seed gives other users (default: 0)")
    # The defaults of these stand in generator.Generator, and for ml-1m in movielens_like: once each.
    option("--clusters", type=int, help="groups of items (default 32, at most an item each; ml-1m: 18 genres)")
    option("--epsilon", type=float, help="share of events that ignore the history (default 0.2)")
    option("--decay", type=float, help="power of time by which events lose weight (default 1)")
    option("--zipf-exponent", type=float, help="exponent of the items' popularity (default 1)")
    option("--max-sequence-length", type=int, help="number of past events that the next one depends on (default 200)")
    option("--unique-items", action="store_true", help="never draw an item that is among those past events")
    lengths = "how the lengths of histories are spread (default lognormal; ml-1m: uniform)"
    option("--lengths", choices=("lognormal", "uniform", "fixed"), help=lengths)
    option("--length-sigma", type=float, help="spread of lognormal lengths (default 0.6)")
    option("--gap-median", type=float, help="median of the seconds between two events (default 3600)")
    option("--gap-sigma", type=float, help="spread of these seconds, which are lognormal (default 3.5)")


def _memory_limit(parser: argparse.ArgumentParser) -> None:
    what = "memory of the sort, which goes on on disk beyond it; 0.5 GB come on top (default: 2GB)"
    parser.add_argument("--memory-limit", default="2GB", help=what)


def _time_range(identity: "DatasetIdentity") -> str:
    from datetime import datetime, timezone

    def date(ticks: int) -> str:
        try:
            return datetime.fromtimestamp(ticks * identity.time_unit, timezone.utc).strftime("%Y-%m-%d")
        except (ValueError, OverflowError, OSError):  # ticks that are no time since 1970
            return str(ticks)

    return f"{date(identity.min_timestamp)} to {date(identity.max_timestamp)} (ticks of {identity.time_unit:g} s)"
