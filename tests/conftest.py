"""Small prepared data sets, made once a session."""

import os

import numpy as np
import pytest

# Tests in two processes beside each other (make test) get a core each: threads that wait for others would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Runs that are compared bit for bit take the same kernels, whatever a busy machine would measure.
os.environ.setdefault("FUXI_TORCHREC_NATIVE", "1")


def write_events(path, users, seed=0, items=60):
    """An event log as CSV: `users` users of 1 … 40 events, source ids with gaps, times with ties."""
    random = np.random.default_rng(seed)
    with open(path, "w") as file:
        file.write("user,item,time\n")
        for user in range(users):
            count = 1 if user == 3 else int(random.integers(2, 41))
            times = 1_000_000_000 + np.cumsum(random.integers(0, 3, count) * random.integers(1, 100_000, count))
            for item, time in zip(random.integers(0, items, count), times):
                file.write(f"{user * 7 + 1},{item * 3 + 5},{time}\n")


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    """Folder of a prepared data set of 150 users and up to 60 items; user 22 has a single event."""
    from data_pipelines.events import prepare_events

    folder = tmp_path_factory.mktemp("data")
    write_events(folder / "log.csv", 150)
    output = str(folder / "small")
    prepare_events([str(folder / "log.csv")], "user", "item", "time", output)
    return output


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch):
    """The test runs with the CPU kernels in C, and again with what PyTorch does without them."""
    from fuxi_torchrec.ops.native import library as native

    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler here")
    return request.param


@pytest.fixture
def bucket(tmp_path):
    """The folder where what is written to bucket:// lies."""
    from fuxi_torchrec.paths import path_manager
    from tests.helpers.bucket import Bucket

    (tmp_path / "bucket").mkdir()
    path_manager.cache_clear()  # handlers cannot be taken back, so this manager is thrown away afterwards
    path_manager().register_handler(Bucket(str(tmp_path / "bucket")), allow_override=True)
    yield tmp_path / "bucket"
    path_manager.cache_clear()
