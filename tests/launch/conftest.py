"""A folder to submit from, in which the paths of docs/launch.md exist."""

import shutil

import pytest

from tests.helpers.dryrun import ROOT


@pytest.fixture
def here(tmp_path, monkeypatch, small_dataset):
    """The current folder: components, configs and data as in a checkout, and nothing else."""
    shutil.copy(ROOT / ".torchxconfig", tmp_path)
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    for name in ("ml-1m", "ml-20m"):
        (tmp_path / "data" / name).symlink_to(small_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path
