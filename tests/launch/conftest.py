"""A folder to submit from, in which the paths of docs/launch.md exist."""

import shutil

import pytest
from torchx import plugins

from tests.helpers.dryrun import ROOT
from tests.helpers.entry_points import write_entry_points


@pytest.fixture
def here(tmp_path, monkeypatch, small_dataset, plugged_in):
    """The current folder: components, configs and data as in a checkout, and nothing else."""
    shutil.copy(ROOT / ".torchxconfig", tmp_path)
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    for name in ("ml-1m", "ml-20m"):
        (tmp_path / "data" / name).symlink_to(small_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def entry_points(tmp_path_factory):
    """A folder for PYTHONPATH with this checkout's entry points."""
    return write_entry_points(tmp_path_factory.mktemp("entry-points"))


@pytest.fixture
def plugged_in(entry_points, monkeypatch):
    """TorchX finds this checkout's commands and scheduler, in this process and those that it starts."""
    monkeypatch.syspath_prepend(str(entry_points))
    monkeypatch.setenv("PYTHONPATH", f"{entry_points}:{ROOT}")
    plugins.registry().clear()
    yield
    plugins.registry().clear()
