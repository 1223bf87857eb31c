"""Lists of ids as a person types them: one row of CSV. No torch."""

import re
from typing import List

_FIELD = re.compile(r'\s*"((?:[^"]|"")*)"([^,]*)|([^,]*)')


def split_ids(text: str) -> List[str]:
    """Splits a row at its commas. Spaces around a field are dropped; what stands in quotes stays as it is.

    A quote within quotes is doubled. The row `7, "Smith, J", "c,d"@9` has the three fields `7`, `Smith, J` and `c,d@9`.
    """
    ids, at = [], 0
    while at <= len(text):
        field = _FIELD.match(text, at)
        assert field is not None  # a field may be empty
        quoted, rest, plain = field.groups()
        ids.append(plain.strip() if quoted is None else quoted.replace('""', '"') + rest.rstrip())
        at = field.end() + 1
    return ids
