"""A run folder from somebody else runs no code here, whichever of a checkpoint's files carries it."""

import io
import json
import os
import pickle
import shutil
import zlib

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.load_model import open_model
from fuxi_torchrec.run.folder import RunFolder
from tests.helpers.training_runs import tiny, train

pytestmark = pytest.mark.thorough


class Call:
    """An object whose unpickling calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def trained(small_dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(small_dataset, max_epochs=1), run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return RunFolder.open(str(tmp_path / "run"))


def forge(run, **changed):
    """Puts other bytes into files of the run's best checkpoint, and what its marker says of them, as a forger would."""
    index = json.load(open(os.path.join(run.checkpoints, "index.json")))
    folder = os.path.join(run.checkpoints, index["best"])
    marker = json.load(open(os.path.join(folder, "complete.json")))
    for name, change in changed.items():
        name = {"metadata": ".metadata", "shard": "__0_0.distcp"}[name]
        with open(os.path.join(folder, name), "r+b") as file:
            data = change(file.read())
            file.seek(0)
            file.truncate()
            file.write(data)
        marker["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    with open(os.path.join(folder, "complete.json"), "w") as file:
        json.dump({**marker, "format": 2}, file)  # one checksum a file


def error_of_opening(run, capfd):
    capfd.readouterr()
    with pytest.raises(UserError) as raised, open_model(run, run.config(), "best"):
        pass
    assert "Traceback" not in capfd.readouterr().err and "\n" not in str(raised.value)
    return str(raised.value)


def dotted(module, name, argument):
    """The pickle that calls an attribute of an attribute: what no __reduce__ writes."""
    text = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + text + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


CARRIERS = {
    "posix.system": lambda command: pickle.dumps(Call(os.system, command)),
    "builtins.exec": lambda command: pickle.dumps(Call(exec, f"import os; os.system({command!r})")),
    "torch.hub.load": lambda command: pickle.dumps(Call(torch.hub.load, command, "model")),
    "torch.distributed.checkpoint.metadata.os.system": lambda command: dotted(
        "torch.distributed.checkpoint.metadata", "os.system", command
    ),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_a_hostile_list_of_tensors_is_one_line_and_runs_nothing(run, tmp_path, capfd, name):
    forge(run, metadata=lambda _: CARRIERS[name](f"touch {tmp_path}/pwned"))
    says = error_of_opening(run, capfd)
    assert f".metadata: {name} is no part of a checkpoint" in says
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("item", ["bytes", "tensor"])
def test_a_hostile_item_is_one_line_and_runs_nothing(run, tmp_path, capfd, item):
    """DCP unpickles an item of bytes without a look."""
    hostile = io.BytesIO()
    torch.save(Call(os.system, f"touch {tmp_path}/pwned"), hostile)
    offset = None

    def append(shard):
        nonlocal offset
        offset = len(shard)
        return shard + hostile.getvalue()

    def point_there(data):
        metadata = pickle.loads(data)
        index, stored = next((i, s) for i, s in metadata.storage_data.items() if i.fqn.startswith("model."))
        stored.offset, stored.length = offset, len(hostile.getvalue())
        if item == "bytes":
            metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
            metadata.storage_data = {type(i)(i.fqn) if i is index else i: s for i, s in metadata.storage_data.items()}
        return pickle.dumps(metadata)

    forge(run, shard=append, metadata=point_there)
    says = error_of_opening(run, capfd)
    assert ("is no tensor" if item == "bytes" else "damaged checkpoint") in says, says
    assert not (tmp_path / "pwned").exists()


def by_getattr(data, owner=_MEM_FORMAT_ENCODING, name=None):
    """The list of tensors as Python 3.11.2 writes it: a member of an enumeration as getattr of its class and its name."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            is_member = isinstance(value, _MEM_FORMAT_ENCODING)
            return (getattr, (owner, name or value.name)) if is_member else NotImplemented

    written = io.BytesIO()
    Pickler(written).dump(pickle.loads(data))
    return written.getvalue()


def test_a_checkpoint_of_a_python_that_writes_members_by_getattr_is_read(run):
    forge(run, metadata=by_getattr)
    with open_model(run, run.config(), "best") as saved:
        assert saved.step > 0


@pytest.mark.parametrize("owner, name", [(os, "system"), (_MEM_FORMAT_ENCODING, "__class__"), (_MEM_FORMAT_ENCODING, "mro")])
def test_getattr_of_anything_else_is_refused(run, owner, name):
    if owner is os:
        forge(run, metadata=lambda data: pickle.dumps(Call(getattr, "", name)))
    else:
        forge(run, metadata=lambda data: by_getattr(data, owner, name))
    with pytest.raises(UserError, match="was not run"), open_model(run, run.config(), "best"):
        pass


def test_what_is_no_pickle_is_one_line(run, capfd):
    forge(run, metadata=lambda data: data[: len(data) // 2])
    assert "damaged checkpoint (.metadata: not readable" in error_of_opening(run, capfd)
    forge(run, metadata=lambda _: pickle.dumps({"state_dict_metadata": {}}))
    assert "damaged checkpoint (.metadata: not a list of tensors" in error_of_opening(run, capfd)
