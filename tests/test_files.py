"""Files are complete or absent, and the file written aside is nobody else's."""

import os
import stat

import pytest

from fuxi_torchrec.files import file_aside, write_aside


def test_a_file_is_replaced_as_a_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_aside(str(path), "one")
    with pytest.raises(KeyboardInterrupt), file_aside(str(path)) as aside:
        with open(aside, "w") as file:
            file.write("half of t")
        assert path.read_text() == "one"
        raise KeyboardInterrupt
    assert (path.read_text(), os.listdir(tmp_path)) == ("one", ["a.json"])
    write_aside(str(path), "two")
    assert (path.read_text(), os.listdir(tmp_path)) == ("two", ["a.json"])


def test_processes_of_the_same_number_write_different_files(tmp_path):
    """In containers the process number is always the same."""
    path = str(tmp_path / "a.json")
    with file_aside(path) as one, file_aside(path) as two:
        assert one != two
        assert os.path.isfile(one) and os.path.isfile(two)


def test_a_file_that_lies_where_the_name_falls_is_neither_followed_nor_written(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "a.json.tmp-guessed").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_aside(str(tmp_path / "a.json"), "text")
    assert (tmp_path / "precious").read_text() == "as it was"
    assert (tmp_path / "a.json.tmp-guessed").is_symlink()
    assert not (tmp_path / "a.json").exists()


def test_the_umask_says_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_aside(str(tmp_path / "a.json"), "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == 0o640


@pytest.mark.parametrize("place", ["nowhere/a.json", "file/a.json"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        write_aside(str(tmp_path / place), "text")
    assert caught.value.filename == str(tmp_path / place)
