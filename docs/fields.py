"""Griffe extension for the API's pages: a docstring's lines `name: what it is` become a list."""

import re
from typing import Any

import griffe

FIELD = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (?=\S)")


class Fields(griffe.Extension):
    """Rewrites every docstring before mkdocstrings reads it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the fields of an object's docstring to a list."""
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """Returns the docstring with a list item for each line that describes a name."""
    lines, in_list = [], False
    for line in docstring.splitlines():
        if FIELD.match(line):
            lines += [] if in_list or not lines else [""]
            line, in_list = FIELD.sub(r"- `\1`: ", line, count=1), True
        elif not line:
            in_list = False
        lines.append(line)
    return "\n".join(lines)
