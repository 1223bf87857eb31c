"""Settings that hold for the whole process are the command line's: importing the library changes none."""

import subprocess
import sys

import pytest

from fuxi_torchrec.cli.quiet import LOGGERS

pytestmark = pytest.mark.thorough

LIBRARY = "import fuxi_torchrec.training.trainer, fuxi_torchrec.evaluation.recommend, fuxi_torchrec.cli.main"
SHOW = f"import logging, warnings; print([logging.getLogger(name).level for name in {LOGGERS!r}]);" + (
    "print(sum(filter[1] is not None and filter[1].pattern[:6] in ('Please', 'Sparse') for filter in warnings.filters))"
)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:2]


def test_importing_the_library_silences_nothing():
    assert run(f"{LIBRARY}; {SHOW}") == [str([0] * len(LOGGERS)), "0"]


def test_the_command_line_silences_what_no_user_can_mend():
    assert run(f"from fuxi_torchrec.cli.quiet import quiet; quiet(); {SHOW}") == [str([40] * len(LOGGERS)), "2"]
