"""`fuxi-torchrec prepare movielens|events|synthetic`: flags, and a summary of what was made.

Only jsonargparse is imported here: `--help` must answer at once. The work is imported when it is done.
"""

import sys
from typing import Any, Dict, List, Optional

COMMANDS = {
    "movielens": "a MovieLens archive (ml-100k, 1m, 10m, 20m, 25m, 32m, latest, latest-small)",
    "events": "any event log: CSV or Parquet files, larger than memory if need be",
    "synthetic": "generated sequences whose cross-entropy floor is known, or a MovieLens-like archive",
}
YEAR_2200 = 7_258_118_400  # seconds since 1970
DEFAULT_CLUSTERS = 32


def add_subcommands(prepare_parser) -> None:
    """Adds `movielens`, `events` and `synthetic` to a jsonargparse parser; the one chosen comes as `kind`.

    prepare_parser must already be a sub-command of its own parent: jsonargparse wants them added from the top down. The
    sub-parsers are of its class, so that its way of printing errors is theirs.
    """
    subcommands = prepare_parser.add_subcommands(dest="kind", required=True)
    for name, add_arguments in (("movielens", _movielens), ("events", _events), ("synthetic", _synthetic)):
        parser = type(prepare_parser)(allow_abbrev=False, description=f"Prepares {COMMANDS[name]}.")
        add_arguments(parser)
        _flag(parser, "--overwrite", action="store_true", help="replace the data set that is there")
        subcommands.add_subcommand(name, parser, help=COMMANDS[name])


def run(command: str, arguments) -> None:
    """Runs `prepare <command>` with its parsed namespace and prints a summary. Raises UserError for bad input."""
    given: Dict[str, Any] = {key: value for key, value in arguments.as_dict().items() if value is not None}
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


def summary(identity, output: str) -> List[str]:
    """Lines that say what a data set holds and what was found on the way."""
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


def _run_synthetic(given: Dict[str, Any]):
    if given.pop("format") == "sequences":
        from data_pipelines.synthetic import prepare_synthetic

        given.setdefault("clusters", min(DEFAULT_CLUSTERS, max(given["items"], 1)))

        return prepare_synthetic(**given)
    from data_pipelines.movielens_like import write_movielens_archive

    given.pop("unique_items")  # films are never rated twice, asked for or not
    path = write_movielens_archive(given.pop("output"), **given)
    print(f"{path}: generated, in the layout of ml-1m.zip; next: fuxi-torchrec prepare movielens --source {path}")
    return None


def _movielens(parser) -> None:
    _flag(parser, "--source", type=str, required=True, help="a zip, a folder, or the address of a zip")
    _flag(parser, "--output", type=str, required=True, help="folder of the data set to make")
    _flag(parser, "--catalogue", type=_choice("rated", "all"), default="rated", help="all: movies nobody rated too")
    _flag(parser, "--checksum", type=Optional[str], help="md5 or sha256 of the archive, verified first")
    _flag(parser, "--memory-limit", type=str, default="2GB", help="for the sort")


def _events(parser) -> None:
    _flag(parser, "--source", type=str, nargs="+", required=True, help="CSV or Parquet files, globs or addresses")
    _flag(parser, "--user-column", type=str, required=True)
    _flag(parser, "--item-column", type=str, required=True)
    _flag(parser, "--time-column", type=str, required=True, help="integers, or datetimes")
    _flag(parser, "--output", type=str, required=True, help="folder of the data set to make")
    unit = "s, ms, us, ns, or the seconds in a tick; datetimes are converted to it"
    _flag(parser, "--time-unit", type=str, default="s", help=unit)
    extra = "kept beside the events: NAME or NAME:int, NAME:float, NAME:text"
    _flag(parser, "--extra-columns", type=str, nargs="+", default=[], help=extra)
    id_type = _choice("auto", "integer", "text")
    _flag(parser, "--user-type", type=id_type, default="auto", help="auto: as the first value")
    _flag(parser, "--item-type", type=id_type, default="auto", help="auto: as the first value")
    _flag(parser, "--item-titles", type=Optional[str], help="CSV or Parquet file of titles")
    _flag(parser, "--titles-item-column", type=Optional[str], help="its item column (default: --item-column)")
    _flag(parser, "--title-column", type=str, default="title", help="its title column")
    _flag(parser, "--delimiter", type=Optional[str], help="of CSV files (default: a tab for .tsv, else a comma)")
    _flag(parser, "--column-names", type=str, nargs="+", default=None, help="of CSV files without a header")
    _flag(parser, "--memory-limit", type=str, default="2GB", help="for the sort; about 0.5 GB come on top")
    _flag(parser, "--name", type=Optional[str], help="of the data set (default: the output's)")


def _synthetic(parser) -> None:
    _flag(parser, "--users", type=int, required=True)
    _flag(parser, "--items", type=int, required=True)
    _flag(parser, "--events-per-user", type=int, required=True, help="mean")
    _flag(parser, "--output", type=str, required=True, help="folder of the data set to make, or for ml-1m the zip")
    formats = _choice("sequences", "ml-1m")
    _flag(parser, "--format", type=formats, default="sequences", help="ml-1m: a zip for 'prepare movielens'")
    _flag(parser, "--seed", type=int, default=0)
    # The defaults of these stand in generator.Generator, and for ml-1m in movielens_like: once each.
    _flag(parser, "--clusters", type=Optional[int], help="groups of items (default 32, at most an item each; ml-1m: 18 genres)")
    _flag(parser, "--epsilon", type=Optional[float], help="share of events that ignore the history (default 0.2)")
    _flag(parser, "--decay", type=Optional[float], help="power of time by which events lose weight (default 1)")
    _flag(parser, "--zipf-exponent", type=Optional[float], help="of the popularity laws (default 1)")
    _flag(parser, "--max-sequence-length", type=Optional[int], help="events that are visible to the next (default 200)")
    _flag(parser, "--unique-items", action="store_true", help="no item twice among the visible events and the next")
    lengths = Optional[_choice("lognormal", "uniform", "fixed")]
    _flag(parser, "--lengths", type=lengths, help="law of the users' lengths (default lognormal; ml-1m: uniform)")
    _flag(parser, "--length-sigma", type=Optional[float], help="spread of lognormal lengths (default 0.6)")
    _flag(parser, "--gap-median", type=Optional[float], help="seconds between events (default 3600)")
    _flag(parser, "--gap-sigma", type=Optional[float], help="their spread: lognormal (default 3.5)")


def _flag(parser, name: str, **options) -> None:
    """Adds --with-dashes, and takes --with_underscores as well without listing it in the help."""
    action = parser.add_argument(name, **options)
    if "-" in name[2:]:
        parser._option_string_actions["--" + name[2:].replace("-", "_")] = action


def _choice(*values: str):
    from typing import Literal

    return Literal[values]


def _time_range(identity) -> str:
    from datetime import datetime, timezone

    def date(ticks: int) -> str:
        try:
            return datetime.fromtimestamp(ticks * identity.time_unit, timezone.utc).strftime("%Y-%m-%d")
        except (ValueError, OverflowError, OSError):  # ticks that are no time since 1970
            return str(ticks)

    return f"{date(identity.min_timestamp)} to {date(identity.max_timestamp)} (ticks of {identity.time_unit:g} s)"
