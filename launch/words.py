"""Words of a command line, as lists: options taken out, and paths among them replaced."""

from typing import Callable, List, Sequence


def without(arguments: List[str], option: str) -> List[str]:
    """Lists the arguments less `option VALUE` and `option=VALUE`."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


def with_values(arguments: List[str], options: Sequence[str], change: Callable[[str, str], str]) -> List[str]:
    """Lists the arguments with each value of `options` changed by change(option, value); an option may have several.
    Options are taken --with_underscores as well."""
    made, current = [], ""
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            current = option.replace("_", "-") if option.replace("_", "-") in options else ""
            made.append(f"{option}={change(current, value)}" if current and equals else word)
            current = "" if equals else current
        else:
            made.append(change(current, word) if current else word)
    return made
