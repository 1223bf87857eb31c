"""`python -m launch.chain.prepare …`: 'fuxi-torchrec prepare' that keeps a data set which the same arguments have made.

It is what a chain's job runs: a job that starts again after its node was lost, or that comes second where two chains share
a data set, finds it made.
"""

import argparse
import os
import sys
from typing import Any, Dict, List, Optional

from fuxi_torchrec.errors import FolderInUse, UserError
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import is_address, join, path_manager


def kept_data(arguments: List[str]) -> Optional[str]:
    """Tells in a line that the data set of these arguments is there; None where it has to be made.

    Compared is what dataset.json keeps of its arguments. Raises UserError where another one is there and --overwrite is
    not among them."""
    from data_pipelines.cli import parse
    from fuxi_torchrec.data.format import IDENTITY_FILE, read_identity

    options = parse(arguments)
    if getattr(options, "format", "sequences") != "sequences":
        raise UserError("prepare: --format ml-1m makes an archive and no data set; a chain needs a data set")
    if not path_manager().isfile(join(options.output, IDENTITY_FILE)):
        return None
    found = vars(read_identity(options.output))
    for key, wanted in _asked_for(options).items():
        before = found[key] if not isinstance(wanted, dict) else {name: found[key].get(name) for name in wanted}
        if before == wanted:
            continue
        if options.overwrite:
            return None
        raise UserError(
            f"prepare: {options.output}: the data set that is here was made by other arguments ({key}: {before}, not "
            f"{wanted}); name another --output, or add --overwrite"
        )
    _warn_of_newer(options)
    return f"{options.output}: {found['name']}, made before"


def main(arguments: Optional[List[str]] = None) -> int:
    """Prepares the data set unless it is there, and waits for another process that is making it. Exit codes as of
    'fuxi-torchrec prepare'."""
    from fuxi_torchrec.cli.main import main as fuxi

    words = list(sys.argv[1:] if arguments is None else arguments)
    while True:
        try:
            kept = kept_data(words)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.code
        if kept is not None:
            print(f"prepare: {kept}")
            return 0
        code = fuxi(["prepare", *words])
        if code != FolderInUse.code:
            # What another process made while this one waited for it was refused: it is looked at again.
            return 0 if code == 2 and _is_there(words) else code
        print("prepare: waiting on", file=sys.stderr, flush=True)


def _is_there(words: List[str]) -> bool:
    try:
        return kept_data(words) is not None
    except UserError:
        return False


def _asked_for(options: argparse.Namespace) -> Dict[str, Any]:
    """What dataset.json will say, as far as the arguments decide it."""
    if options.kind == "movielens":
        source = options.source.rstrip("/")
        asked = {"source": source if is_address(source) else os.path.basename(source), "catalogue": options.catalogue}
        algorithm_known = len((options.checksum or "").rpartition(":")[2]) == 64
        return {**asked, **({"source_checksum": _sha256(options.checksum)} if algorithm_known else {})}
    if options.kind == "events":
        from data_pipelines.events import seconds_per_tick, source_name

        return {
            "source": source_name(options.source),
            "time_unit": seconds_per_tick(options.time_unit),
            "name": options.name or os.path.basename(options.output.rstrip("/")),
            "columns": [name.partition(":")[0] for name in options.extra_columns],
        }
    return {"source": "synthetic", "name": f"synthetic-{options.users}-{options.items}", "generator": _generator(options)}


def _generator(options: argparse.Namespace) -> JsonObject:
    """The generator's parameters, those that were not given too."""
    from data_pipelines.cli import DEFAULT_CLUSTERS
    from data_pipelines.generator import Generator

    others = ("kind", "users", "output", "overwrite", "format")
    given = {name: value for name, value in vars(options).items() if value is not None and name not in others}
    return Generator(**{"clusters": min(DEFAULT_CLUSTERS, max(options.items, 1)), **given}).to_dict()


def _sha256(checksum: str) -> str:
    return f"sha256:{checksum.rpartition(':')[2].lower()}"


def _warn_of_newer(options: argparse.Namespace) -> None:
    """Says so where a source file is newer than the data set: it may hold more by now."""
    from fuxi_torchrec.data.format import IDENTITY_FILE

    sources = getattr(options, "source", None) or []
    files = [name for name in ([sources] if isinstance(sources, str) else sources) if os.path.isfile(name)]
    identity = join(options.output, IDENTITY_FILE)
    if is_address(options.output) or not files:
        return
    newest = max(files, key=os.path.getmtime)
    if os.path.getmtime(newest) > os.path.getmtime(identity):
        print(
            f"warning: prepare: {newest} is newer than {options.output}, which is kept; to make it again, remove it first",
            file=sys.stderr,
        )


if __name__ == "__main__":
    from fuxi_torchrec.cli.streams import run_on_streams

    sys.exit(run_on_streams(main))
