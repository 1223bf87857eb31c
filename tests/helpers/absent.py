"""Processes for which some packages are not there, as on a machine that lacks them; their children inherit it."""

import os

SITE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def environment_without(folder, names, root):
    """Environment variables of a process that imports the project from `root`, and finds none of the packages `names`.
    Python runs a sitecustomize module at its start."""
    (folder / "sitecustomize.py").write_text(SITE.format(names=frozenset(names)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), root]), "OMP_NUM_THREADS": "1"}
