"""How an error is told in one line."""

from fuxi_torchrec.errors import one_line


def test_an_error_is_one_line_of_at_most_200_characters():
    assert one_line(ValueError("first\n  second\tthird")) == "first second third"
    assert len(one_line(ValueError("word " * 100))) == 200


def test_an_error_without_a_text_is_told_by_its_type():
    assert one_line(EOFError()) == "EOFError" and one_line(EOFError(" \n")) == "EOFError"
