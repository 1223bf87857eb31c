"""Source values to int64 ids, int64 times and aligned columns, exactly: no id or time ever goes through a float.

Functions take one Arrow array as it was read (text from CSV, the file's own types from Parquet) and raise BadValue,
which knows the first bad row within the array and says what is wrong with it.
"""

import re
from typing import Any, Callable, Optional

import pyarrow as pa
import pyarrow.compute as pc

INT64_MAX = 2**63 - 1
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)|<na>", re.IGNORECASE)


class BadValue(Exception):
    """Raised where the value at `row` (0-based, within the array) is not what its column must hold. row None: the
    whole column."""

    def __init__(self, row: Optional[int], message: str):
        super().__init__(message)
        self.row = row


def looks_like_number(text: Optional[str]) -> bool:
    """Tells whether text is a number, NaN or infinity, spelled in any way: a column that begins so must hold int64."""
    return text is not None and _NUMBER.fullmatch(text.strip()) is not None


def to_int64(array: pa.Array, what: str) -> pa.Int64Array:
    """Converts an integer or text array to non-negative int64 values; anything else is a BadValue. `what`: "user id",
    …"""
    kind = array.type
    if pa.types.is_integer(kind):
        _refuse_nulls(array, what)
        values = array if kind == pa.int64() else _cast_integers(array, what)
    elif is_text(kind):
        values = _parse_integers(array, what)
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        raise BadValue(None, f"holds {kind}, and a {what} is never rounded; cast the column to int64 or text")
    else:
        raise BadValue(None, f"holds {kind}, not a {what}; cast the column to int64 or text")
    if len(values) and pc.min(values).as_py() < 0:
        row = pc.index(pc.less(values, 0), True).as_py()
        raise BadValue(row, f"{what} {values[row].as_py()} is negative; mend or remove the row")
    return values


def to_text(array: pa.Array, what: str) -> pa.StringArray:
    """Converts to non-empty ids as they stand in a text array (or spelled out from an integer one)."""
    if pa.types.is_integer(array.type):
        return to_int64(array, what).cast(pa.string())
    if not is_text(array.type):
        raise BadValue(None, f"holds {array.type}, not a {what}; cast the column to int64 or text")
    _refuse_nulls(array, what)
    values = _plain_text(array)
    row = pc.index(values, "").as_py()
    if row >= 0:
        raise BadValue(row, f"the {what} is empty; mend or remove the row")
    return values


def to_ticks(array: pa.Array, resolution: str, datetimes: bool) -> pa.Int64Array:
    """Converts times to int64: integers stay in the source's own ticks, datetimes become ticks of `resolution` since
    1970.

    `datetimes` says which of the two the column holds (`is_datetime` of its first block). resolution is "us" or "ns";
    a datetime finer than it is rounded down, one without a zone is taken as UTC.
    """
    if not datetimes:
        return to_int64(array, "timestamp")
    _refuse_nulls(array, "timestamp")
    if is_text(array.type):
        array = _parse_datetimes(array, resolution)
    elif pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("s"))
    try:
        finer = pc.cast(array, pa.timestamp(resolution, array.type.tz), safe=array.type.unit != "ns")
    except pa.ArrowInvalid as error:
        raise BadValue(None, f"holds a datetime beyond what int64 {resolution} can hold ({error})") from None
    ticks = finer.cast(pa.int64())
    if len(ticks) and pc.min(ticks).as_py() < 0:
        row = pc.index(pc.less(ticks, 0), True).as_py()
        raise BadValue(row, f"timestamp {array[row].as_py()} is before 1970; mend or remove the row")
    return ticks


def is_datetime(array: pa.Array) -> bool:
    """Tells whether `to_ticks` will take the array as datetimes."""
    kind = array.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return True
    return is_text(kind) and len(array) > 0 and not looks_like_number(array[0].as_py())


def to_float(array: pa.Array, what: str, kind: pa.DataType) -> pa.Array:
    """Converts numbers or text to floats of type `kind`; empty text and nulls become NaN, other text is a BadValue."""
    if is_text(array.type):
        array = _plain_text(array)
        array = pc.if_else(pc.equal(array, ""), pa.scalar("nan"), array)
        try:
            array = array.cast(pa.float64())
        except pa.ArrowInvalid:
            message = f"{what} {{!r}} is not a number; mend or remove the row"
            raise _first_not(array, lambda value: _casts(value, pa.float64()), message) from None
    try:
        return pc.fill_null(array.cast(kind, safe=False), float("nan"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise BadValue(None, f"holds {array.type}, not numbers") from None


def extra_kind(array: pa.Array) -> str:
    """Chooses what an extra column holds, by its first block: "int", "float" or "text"."""
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "int"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "float"
    for name, target in (("int", pa.int64()), ("float", pa.float64())):
        try:
            pc.if_else(pc.equal(array, ""), pa.scalar("nan"), array).cast(target)
            return name
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    return "text"


def to_extra(array: pa.Array, name: str, kind: str) -> pa.Array:
    """Converts an extra column to int64, float64 or string. Missing: NaN in floats, "" in text, a BadValue in ints."""
    if kind == "float":
        return to_float(array, name, pa.float64())
    target = pa.int64() if kind == "int" else pa.string()
    try:
        result = array.cast(target)
    except pa.ArrowNotImplementedError:
        raise BadValue(None, f"holds {array.type}, which cannot be read as {kind}") from None
    except pa.ArrowInvalid:
        plain = array.cast(pa.string())
        message = f"{name} {{!r}} is not an integer; mend or remove the row"
        raise _first_not(plain, lambda value: _casts(value, target), message) from None
    if kind == "text":
        return pc.fill_null(result, "")
    _refuse_nulls(result, name)
    return result


def is_text(kind: pa.DataType) -> bool:
    """Tells whether the array holds text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain_text(array: pa.Array) -> pa.StringArray:
    return array if array.type == pa.string() else array.cast(pa.string())


def _refuse_nulls(array: pa.Array, what: str) -> None:
    if array.null_count:
        row = pc.index(pc.is_null(array), True).as_py()
        raise BadValue(row, f"the {what} is missing (null); mend or remove the row")


def _cast_integers(array: pa.Array, what: str) -> pa.Int64Array:
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid:
        row = pc.index(pc.greater(array, pa.scalar(INT64_MAX, pa.uint64())), True).as_py()
        raise BadValue(row, f"{what} {array[row].as_py()} is beyond int64; mend or remove the row") from None


def _parse_integers(array: pa.Array, what: str) -> pa.Int64Array:
    text = pc.utf8_trim_whitespace(_plain_text(array))
    try:
        values = text.cast(pa.int64())
        # Arrow also reads 0x1F and 007: two spellings of one number would fall together without a word.
        if text.null_count == 0 and values.cast(pa.string()).equals(text):
            return values
    except pa.ArrowInvalid:
        pass
    for row, value in enumerate(text.to_pylist()):
        if message := _why_not_integer(value, what):
            raise BadValue(row, message)
    raise AssertionError("Arrow refused integers that Python reads")


def _why_not_integer(text: Optional[str], what: str) -> Optional[str]:
    if text is None or text == "":
        return f"the {what} is empty; mend or remove the row"
    if re.fullmatch(r"-?[1-9][0-9]*|0", text):
        if not -(2**63) <= int(text) <= INT64_MAX:
            return f"{what} {text} is beyond int64 (at most {INT64_MAX}); mend or remove the row"
        return None
    if "nan" in text.lower():
        return f"{what} {text!r} is not a number; mend or remove the row"
    return f"{what} {text!r} is not a plain integer; mend or remove the row"


def _parse_datetimes(array: pa.Array, resolution: str) -> pa.Array:
    text = pc.utf8_trim_whitespace(_plain_text(array))
    for unit in dict.fromkeys([resolution, "ns"]):  # text may be finer than what is kept
        for kind in (pa.timestamp(unit), pa.timestamp(unit, "UTC")):
            try:
                return text.cast(kind)
            except pa.ArrowInvalid:
                continue
    has_zone = re.search(r"(Z|[+-]\d\d(:?\d\d)?)$", (text[0].as_py() or "")[10:]) is not None
    kind = pa.timestamp("ns", "UTC" if has_zone else None)
    wanted = "an ISO 8601 datetime, with or without a zone as in the first row"
    message = f"timestamp {{!r}} is not {wanted}; mend or remove the row"
    raise _first_not(text, lambda value: _casts(value, kind), message) from None


def _casts(text: str, kind: pa.DataType) -> bool:
    try:
        pa.scalar(text).cast(kind)
        return True
    except pa.ArrowInvalid:
        return False


def _first_not(array: pa.Array, accepts: Callable[[Any], bool], message: str) -> BadValue:
    for row, value in enumerate(array.to_pylist()):
        if value is None or not accepts(value):
            return BadValue(row, message.format(value))
    raise AssertionError("Arrow refused a column whose values it takes one by one")
