"""`prepare movielens`: every layout gives the same sequences, and every damaged archive a one-line error."""

import hashlib

import pytest

from data_pipelines.movielens import prepare_movielens
from fuxi_torchrec.data.format import read_identity
from fuxi_torchrec.errors import UserError
from tests.helpers.pipeline_cases import (
    LAYOUTS,
    MOVIES,
    RATINGS,
    items_of,
    layout_files,
    tree,
    users_of,
    write_folder,
    write_zip,
)


@pytest.mark.parametrize("container", ["zip", "folder", "folder of the unpacked zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_sequences_sorted_by_time_then_place_in_the_file(tmp_path, layout, container):
    files = layout_files(layout)
    if container == "zip":
        source = write_zip(tmp_path / "a.zip", files)
    elif container == "folder":
        source = write_folder(tmp_path / "a", files)
    else:
        write_folder(tmp_path / "a" / "ml-test", files)
        source = str(tmp_path / "a")
    identity = prepare_movielens(source, str(tmp_path / "out"))
    # Dense ids 0 … 3 are the movies 10, 20, 30, 40; user 1's tie at time 5 keeps the file's order, 30 before 20.
    assert users_of(tmp_path / "out") == [
        {"user_id": 1, "item_ids": [0, 2, 1], "timestamps": [1, 5, 5], "ratings": [5.0, 4.0, 3.0]},
        {"user_id": 2, "item_ids": [1, 1, 3], "timestamps": [7, 7, 9], "ratings": [3.5, 3.5, 1.0]},
        {"user_id": 3, "item_ids": [2], "timestamps": [8], "ratings": [2.0]},
    ]
    assert identity == read_identity(str(tmp_path / "out"))
    assert (identity.num_users, identity.num_items, identity.num_events) == (3, 4, 7)
    assert (identity.min_timestamp, identity.max_timestamp, identity.max_events_per_user) == (1, 9, 3)
    assert identity.report["unsorted_events"] == 1  # the event at time 1 stands after later ones
    assert identity.report["duplicate_events"] == 1
    assert identity.report["single_event_users"] == 1
    assert (identity.columns, identity.time_unit, identity.catalogue) == (["ratings"], 1.0, "rated")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_catalogue_rated_holds_what_occurs_and_all_what_is_listed_too(tmp_path, layout):
    source = write_zip(tmp_path / "a.zip", layout_files(layout))
    prepare_movielens(source, str(tmp_path / "rated"))
    prepare_movielens(source, str(tmp_path / "all"), catalogue="all")
    # frequency leaves every user's last event out: user 1's second 20, user 2's 40, user 3's 30
    frequency = {10: 1, 20: 2, 30: 1, 40: 0, 50: 0}
    expected = [
        {"item_id": k, "source_id": i, "title": MOVIES[i], "frequency": frequency[i]} for k, i in enumerate(MOVIES)
    ]
    assert items_of(tmp_path / "rated") == expected[:4]
    assert items_of(tmp_path / "all") == expected


def test_a_rated_movie_that_is_not_listed_is_kept_without_a_title(tmp_path):
    movies = {10: "Ten (1990)", 50: "Fifty (1950)"}
    source = write_zip(tmp_path / "a.zip", layout_files("ml-1m", movies=movies))
    identity = prepare_movielens(source, str(tmp_path / "out"), catalogue="all")
    assert [(row["source_id"], row["title"]) for row in items_of(tmp_path / "out")] == [
        (10, "Ten (1990)"), (20, None), (30, None), (40, None), (50, "Fifty (1950)"),
    ]  # fmt: skip
    assert identity.report["items_without_title"] == 3


def test_ids_above_2_to_the_53_survive_exactly(tmp_path):
    ids = [2**53 + 1, 2**53 + 2, 2**63 - 1]
    ratings = [(u, i, 3, 10) for u in ids for i in ids]
    source = write_zip(tmp_path / "a.zip", layout_files("csv", ratings=ratings))
    prepare_movielens(source, str(tmp_path / "out"))
    assert [row["user_id"] for row in users_of(tmp_path / "out")] == ids
    assert [row["source_id"] for row in items_of(tmp_path / "out")] == ids


@pytest.mark.parametrize("prefix", ["", "named"])
@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_the_right_checksum_passes_and_the_archive_and_content_are_named_by_sha256(tmp_path, algorithm, prefix):
    source = write_zip(tmp_path / "a.zip", layout_files("ml-1m"))
    content = (tmp_path / "a.zip").read_bytes()
    checksum = (f"{algorithm}:" if prefix else "") + hashlib.new(algorithm, content).hexdigest().upper()
    identity = prepare_movielens(source, str(tmp_path / "out"), checksum=checksum)
    assert identity.source_checksum == "sha256:" + hashlib.sha256(content).hexdigest()
    files = tree(tmp_path / "out")
    assert sorted(files) == ["dataset.json", "items.parquet", "train", "train/part-00000.parquet"]
    expected = hashlib.sha256(files["items.parquet"] + files["train/part-00000.parquet"]).hexdigest()
    assert identity.content_checksum == f"sha256:{expected}"
    assert (identity.name, identity.source) == ("ml-test", "a.zip")


def test_the_same_archive_gives_the_same_bytes(tmp_path):
    source = write_zip(tmp_path / "a.zip", layout_files("csv"))
    for name in ("one", "two"):
        prepare_movielens(source, str(tmp_path / name))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# Each: (line of the file, that line's new text, words of the error)
BAD_LINES = [
    (3, "1::10::5", ["ratings.dat, line 3", "too few fields (3, expected 4)"]),
    (3, "1::10::5::1::9", ["line 3", "too many fields"]),
    (2, "1::20::3::nan", ["line 2", "'timestamp'", "'nan' is not a number"]),
    (7, "3::30::2::-8", ["line 7", "timestamp -8 is negative"]),
    (7, "3::30::2::8.5", ["line 7", "'8.5' is not a plain integer"]),
    (1, "1::30::4::", ["line 1", "timestamp is empty"]),
    (4, "NaN::20::3::7", ["line 4", "'user'", "'NaN' is not a number"]),
    (4, "-2::20::3::7", ["line 4", "user id -2 is negative"]),
    (4, "2.0::20::3::7", ["line 4", "user id '2.0' is not a plain integer"]),
    (4, "2::20x::3::7", ["line 4", "'movie'", "'20x' is not a plain integer"]),
    (5, "2::9223372036854775808::3::7", ["line 5", "9223372036854775808 is beyond int64"]),
    (5, "2::007::3::7", ["line 5", "'007' is not a plain integer"]),
    (6, "2::40::good::9", ["line 6", "'rating'", "'good' is not a number"]),
]


@pytest.mark.parametrize("line, text, words", BAD_LINES)
def test_a_bad_rating_line_is_named_and_nothing_is_left_behind(tmp_path, line, text, words):
    files = layout_files("ml-1m")
    lines = files["ratings.dat"].decode().splitlines()
    lines[line - 1] = text
    files["ratings.dat"] = ("\n".join(lines) + "\n").encode()
    source = write_zip(tmp_path / "a.zip", files)
    assert_refused(tmp_path, source, words)


@pytest.mark.parametrize("layout, line", [("csv", 5), ("ml-100k", 4)])
def test_line_numbers_count_the_header(tmp_path, layout, line):
    ratings = list(RATINGS)
    ratings[3] = (2, 20, 3.5, -7)
    source = write_zip(tmp_path / "a.zip", layout_files(layout, ratings=ratings))
    assert_refused(tmp_path, source, [f"line {line}", "-7"])


def test_a_missing_archive(tmp_path):
    assert_refused(tmp_path, str(tmp_path / "none.zip"), ["none.zip", "no such file"])


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>404</html>" * 100)
    assert_refused(tmp_path, str(tmp_path / "a.zip"), ["a.zip", "not a zip archive"])


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_archive(tmp_path, keep):
    source = write_zip(tmp_path / "a.zip", layout_files("ml-1m", ratings=RATINGS * 500))
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    assert_refused(tmp_path, source, ["a.zip", "truncated"])


def test_an_archive_damaged_inside(tmp_path):
    source = write_zip(tmp_path / "a.zip", layout_files("ml-1m", ratings=[(u, 10, 3, 5) for u in range(1, 9999)]))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    middle = len(content) // 3
    content[middle : middle + 64] = bytes(64)
    (tmp_path / "a.zip").write_bytes(content)
    assert_refused(tmp_path, source, ["a.zip", "ratings.dat", "damaged"])


def test_a_wrong_checksum_names_file_expected_and_found(tmp_path):
    source = write_zip(tmp_path / "a.zip", layout_files("ml-1m"))
    found = hashlib.md5((tmp_path / "a.zip").read_bytes()).hexdigest()
    assert_refused(tmp_path, source, ["a.zip", "wrong checksum", "0" * 32, found], checksum="0" * 32)
    assert_refused(tmp_path, source, ["neither an md5"], checksum="123")


def test_an_archive_without_ratings_or_movies_or_events(tmp_path):
    assert_refused(tmp_path, write_zip(tmp_path / "a.zip", {"README": b"hello"}), ["no MovieLens ratings"])
    files = layout_files("ml-1m")
    del files["movies.dat"]
    assert_refused(tmp_path, write_zip(tmp_path / "b.zip", files), ["b.zip", "movies.dat is not"])
    for layout in LAYOUTS:
        source = write_zip(tmp_path / f"{layout}.zip", layout_files(layout, ratings=[]))
        files = layout_files("ml-1m") | {"ratings.dat": b""}
        assert_refused(tmp_path, source, [layout, "no ratings"])
    assert_refused(tmp_path, write_zip(tmp_path / "c.zip", files), ["c.zip", "no ratings"])


def test_a_missing_column_and_a_bad_movie_line(tmp_path):
    files = layout_files("csv")
    renamed = files | {"ratings.csv": files["ratings.csv"].replace(b"movieId", b"film")}
    assert_refused(tmp_path, write_zip(tmp_path / "a.zip", renamed), ["ratings.csv", "no column 'movieId'", "'film'"])
    files = layout_files("ml-1m")
    short = files | {"movies.dat": b"10::Ten\n"}
    assert_refused(tmp_path, write_zip(tmp_path / "b.zip", short), ["movies.dat, line 1", "too few fields"])


def test_an_address_that_cannot_be_reached(tmp_path):
    assert_refused(tmp_path, "http://127.0.0.1:9/ml-1m.zip", ["127.0.0.1:9/ml-1m.zip", "cannot be fetched"])


def assert_refused(tmp_path, source, words, **options):
    """A one-line UserError holding the words; the folder is as it was before."""
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare_movielens(source, str(tmp_path / "deep" / "out"), **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert tree(tmp_path) == before
