"""Where compiled kernels are kept: whole, this user's own, and never what ends a training."""

import concurrent.futures
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fuxi_torchrec.ops.native import cache
from fuxi_torchrec.ops.native import library as native

pytestmark = pytest.mark.thorough

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


class Answers:
    """A library whose function returns how often it has been built."""

    def __init__(self):
        self.built = 0

    def build(self, path):
        self.built += 1
        program = f"int answer(void) {{ return {self.built}; }}"
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=program, text=True, check=True)

    def load(self):
        return cache.load("answers.so", self.build).answer()


@pytest.fixture
def answers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Answers()


@pytest.fixture
def kept(answers, tmp_path):
    """The file of the library after its first load."""
    assert answers.load() == 1
    return tmp_path / "cache" / "fuxi_torchrec" / "answers.so"


@needs_compiler
def test_a_kept_library_is_loaded_as_it_is(answers, kept):
    assert answers.load() == 1 and answers.built == 1
    assert list(kept.parent.iterdir()) == [kept]


DAMAGES = {
    "nothing is left": lambda content: b"",
    "half is left": lambda content: content[: len(content) // 2],
    "a byte is missing": lambda content: content[:-1],
    "a bit is another": lambda content: content[:4000] + bytes([content[4000] ^ 1]) + content[4001:],
    "the digest alone is left": lambda content: content[-cache.DIGEST_BYTES :],
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_library_that_is_not_whole_is_built_again(damage, answers, kept):
    content = kept.read_bytes()
    kept.unlink()  # it stays mapped here
    kept.write_bytes(damage(content))
    kept.chmod(0o700)
    assert answers.load() == 2
    assert answers.load() == 2  # whole again


@needs_compiler
def test_a_library_that_others_can_write_or_that_lies_elsewhere_is_built_again(answers, kept, tmp_path):
    kept.chmod(0o722)
    assert answers.load() == 2 and stat.S_IMODE(kept.stat().st_mode) == 0o700
    kept.rename(tmp_path / "elsewhere.so")
    kept.symlink_to(tmp_path / "elsewhere.so")
    assert answers.load() == 3 and not kept.is_symlink()


@needs_compiler
def test_the_folder_is_closed_to_others(answers, kept):
    kept.parent.chmod(0o777)
    assert answers.load() == 1
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


@needs_compiler
def test_another_users_folder_is_neither_read_nor_written(answers, kept, monkeypatch, caplog, tmp_path):
    content, mode = kept.read_bytes(), kept.parent.stat().st_mode
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert answers.load() == 2
    assert "belongs to another user" in caplog.text
    assert kept.read_bytes() == content and kept.parent.stat().st_mode == mode
    assert os.listdir(tmp_path) == ["cache"] and os.listdir(kept.parent) == ["answers.so"]


@needs_compiler
def test_without_a_folder_to_keep_it_in_a_library_is_loaded_and_leaves_nothing(answers, monkeypatch, caplog, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answers.load() == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)  # no $HOME, and a user whom the system does not know
    assert answers.load() == 2
    assert os.listdir(tmp_path) == ["file"]
    assert caplog.text.count("compiled for this process alone") == 2


@needs_compiler
def test_a_full_disk_costs_the_keeping_not_the_kernels(answers, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert answers.load() == 1
    assert os.listdir(tmp_path / "cache" / "fuxi_torchrec") == []


PROBE = "from fuxi_torchrec.ops.native import library as native; print(native.library() is not None)"


def probe(tmp_path, **environment):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)


@needs_compiler
def test_processes_that_compile_at_once_leave_one_library(tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = pool.map(lambda _: probe(tmp_path, **{native.MORE_FLAGS: "-O0"}), range(3))  # which compiles fast
        done = [run.stdout.strip() for run in runs]
    assert done == ["True"] * 3
    folder = tmp_path / "fuxi_torchrec"
    assert [p.suffix for p in folder.iterdir()] == [".so"] and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_it_can_be_switched_off(tmp_path):
    assert probe(tmp_path, FUXI_TORCHREC_NATIVE="0").stdout.strip() == "False"
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_said_once_and_pytorch_goes_on(tmp_path):
    """In an ASCII locale too, whatever quotes the compiler has."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such option: ‘-x’' >&2\nexit 1\n", "utf-8")
    compiler.chmod(0o755)
    done = probe(tmp_path, CC=str(compiler), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout.strip() == "False"
    assert done.stderr.count("could not be compiled (no such option: ") == 1


FORKED = """
import faulthandler, os, torch
from fuxi_torchrec.ops.row_wise import dispatch
torch.set_num_threads(2)
x = torch.randn(300, 50)
expected = dispatch.rms_norm(x)
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)
    os._exit(0 if torch.equal(dispatch.rms_norm(x), expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_compiler
def test_a_forked_process_does_not_wait_for_its_parents_threads():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)
