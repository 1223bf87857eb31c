"""A folder to submit from, in which docs/launch.md's paths exist."""

import shutil

import pytest

from tests.conftest import write_events
from tests.launch.dryrun import ROOT


@pytest.fixture(scope="session")
def large_dataset(tmp_path_factory):
    """A data set of 128 row groups or more, for as many processes."""
    from data_pipelines.events import prepare_events
    from data_pipelines.writer import SequenceWriter  # noqa: F401
    from fuxi_torchrec.dataset import SequenceDataset

    folder = tmp_path_factory.mktemp("large")
    write_events(folder / "log.csv", 1500)
    prepare_events([str(folder / "log.csv")], "user", "item", "time", str(folder / "data"))
    assert len(SequenceDataset(str(folder / "data")).row_groups) >= 128
    return folder / "data"


@pytest.fixture
def here(tmp_path, monkeypatch, large_dataset):
    """The current folder: components, configs and data as in a checkout, and nothing else."""
    shutil.copy(ROOT / ".torchxconfig", tmp_path)
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    for name in ("ml-1m", "ml-20m"):
        (tmp_path / "data" / name).symlink_to(large_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path
