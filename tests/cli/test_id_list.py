"""Every text id can be asked for on the command line."""

import csv
import io

import pytest

from fuxi_torchrec.cli.id_list import split_ids


@pytest.mark.parametrize(
    "text, ids",
    [
        ("1,2,3", ["1", "2", "3"]),
        (" 1 , 2,3 ", ["1", "2", "3"]),
        ('7, "Smith, J", " x", "say ""hi""", "a,b"@9', ["7", "Smith, J", " x", 'say "hi"', "a,b@9"]),
        ('"one only "', ["one only "]),
        ('5" nail,x@y', ['5" nail', "x@y"]),
        ('"never closed,2', ['"never closed', "2"]),
        ("1,,2,", ["1", "", "2", ""]),
        ("", [""]),
        ('""', [""]),
    ],
)
def test_fields_are_those_of_a_row_of_csv_with_outer_spaces_dropped(text, ids):
    assert split_ids(text) == ids


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_python_writes_as_csv_comes_back(quoting):
    ids = ["a", "a,b", 'a "b" c', '"', '","', "zoë", "x\ny", "-"]
    row = io.StringIO()
    csv.writer(row, quoting=quoting, lineterminator="").writerow(ids)
    assert split_ids(row.getvalue()) == ids
