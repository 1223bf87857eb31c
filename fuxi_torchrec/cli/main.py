"""The command line. Each command builds only its own parser, and imports torch only once its arguments are right."""

import errno
import os
import sys
import time
from typing import Callable, Dict, List, Optional

from fuxi_torchrec import __version__
from fuxi_torchrec.cli.evaluate import evaluate_command
from fuxi_torchrec.cli.quiet import quiet
from fuxi_torchrec.cli.recommend import recommend_command
from fuxi_torchrec.cli.streams import run_on_streams
from fuxi_torchrec.cli.train import train_command
from fuxi_torchrec.errors import LostProcess, UserError

COMMANDS = {
    "prepare": "raw data (MovieLens, event logs, synthetic) -> a data set folder",
    "train": "train a config on a data set, into a run folder",
    "plan": "how a table would be cut over a cluster: memory, traffic, and whether it fits",
    "bench": "time training steps by stage, encoder and length",
    "evaluate": "rank a split's targets with a run's saved model",
    "recommend": "top-k items for users, or for a history given by hand",
    "doctor": "what this machine has, what would stop training, and what mends it",
    "import-reference": "a checkpoint of the authors' research code -> a run folder",
    "export-reference": "a run's saved model -> a checkpoint that the research code can load",
}
# Errors of the place that is written to: the user's to mend, wherever they surface.
BEYOND_OUR_CONTROL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 another process was lost, 2 the user's mistake (one line, no traceback), 75
    another process writes to the same folder (the same command may work later), 128 + n stopped by signal n, or as if
    (141: the reader of the output went away)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_on_streams(lambda: _run(words))


def _run(arguments: List[str]) -> int:
    quiet()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fuxi-torchrec {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    handlers: Dict[str, Callable[[List[str]], int]] = {
        "prepare": _prepare,
        "train": train_command,
        "plan": _plan,
        "bench": _bench,
        "evaluate": evaluate_command,
        "recommend": recommend_command,
        "doctor": _doctor,
        "import-reference": _import_research,
        "export-reference": _export_research,
    }
    try:
        if command not in handlers:
            raise UserError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
        return handlers[command](rest)
    except UserError as error:
        _complain(str(error), error.reported)
        return error.code
    except LostProcess as error:
        if not error.reported:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in BEYOND_OUR_CONTROL:
            raise
        return _complain(f"{error.filename or 'writing'}: {error.strerror}; make room or choose another --output")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _complain(message: str, reported: bool = False) -> int:
    """One line on standard error, from one rank."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not reported:
        # Before the ranks are joined: torchrun ends this one meanwhile if rank 0 made the same mistake and said so.
        time.sleep(3)
        message = f"rank {rank}: {message}"
    if not reported:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _overview() -> str:
    lines = [f"  {name:<16} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: fuxi-torchrec COMMAND …", "", "FuXi-β generative recommenders on sharded embedding tables.", ""]
        + [*lines, "", "fuxi-torchrec COMMAND --help tells a command's options."]
    )


def _prepare(arguments: List[str]) -> int:
    from data_pipelines.cli import main

    return main(arguments)


def _plan(arguments: List[str]) -> int:
    from fuxi_torchrec.cli.plan import plan

    return plan(arguments)


def _bench(arguments: List[str]) -> int:
    from fuxi_torchrec.cli.bench import bench

    return bench(arguments)


def _doctor(arguments: List[str]) -> int:
    from fuxi_torchrec.cli.doctor import doctor

    return doctor(arguments)


def _import_research(arguments: List[str]) -> int:
    from fuxi_torchrec.cli.research_checkpoint import import_research

    return import_research(arguments)


def _export_research(arguments: List[str]) -> int:
    from fuxi_torchrec.cli.research_checkpoint import export_research

    return export_research(arguments)


if __name__ == "__main__":
    sys.exit(main())
