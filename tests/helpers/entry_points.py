"""This checkout's entry points, whatever the installed package was made from."""

import subprocess
import sys

from tests.helpers.dryrun import ROOT


def write_entry_points(folder):
    """Writes the metadata of setup.py into a folder: first on a process's PYTHONPATH, it goes before what is installed."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder
