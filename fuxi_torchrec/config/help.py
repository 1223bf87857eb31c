"""The help of options: a config's keys are described by the docstrings that stand below them."""

import argparse
import copy
import dataclasses
from functools import cache
from typing import Any, Dict, List, Literal, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

from fuxi_torchrec.config.schema import Config, config_keys

SECTIONS = tuple(section.name for section in dataclasses.fields(Config))


class HelpFormatter(DefaultHelpFormatter):
    """Help of options without names of Python types: what an option means, its default, and the bounds of a config's key."""

    def add_argument(self, action: argparse.Action) -> None:
        """Leaves out the options that read one section from a file of its own, which --config does as well."""
        if action.dest not in SECTIONS:
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        action = copy.copy(action)
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]  # appends to a list
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        key = config_keys().get(action.dest)
        return _metavar(key.type) if key else super()._get_default_metavar_for_optional(action)

    def _format_action(self, action: argparse.Action) -> str:
        if action.help is None and action.dest in config_keys():
            action = copy.copy(action)
            action.help = _docstrings()[action.dest]
        return super()._format_action(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        notes, key = [], config_keys().get(action.dest)
        if isinstance(action.default, bool):
            notes.append(f"default: {str(action.default).lower()}" if action.nargs != 0 else "")
        elif action.default not in (None, "", [], argparse.SUPPRESS):
            notes.append("default: %(default)s")
        if key and action.help == _docstrings()[action.dest]:
            notes.append(str(key.metadata.get("bounds", "")))
        note = "; ".join(filter(None, notes))
        return (action.help or "") + (f" ({note})" if note else "")


_METAVARS = {int: "N", float: "X", str: "TEXT", List[int]: "[N,...]"}


def _metavar(type_: Any) -> str:
    """A placeholder for values of a key's type, as in {validation,test,null}."""
    inner = next((arg for arg in get_args(type_) if arg is not type(None)), type_) if _is_optional(type_) else type_
    if get_origin(inner) is Literal:
        names = [*get_args(inner), *(["null"] if _is_optional(type_) else [])]
        return "{" + ",".join(names) + "}"
    return _METAVARS.get(inner, "[NAME,...]")


def _is_optional(type_: Any) -> bool:
    return get_origin(type_) is Union


@cache
def _docstrings() -> Dict[str, str]:
    """The docstring below each key of Config, by its dotted name."""
    from docstring_parser import parse_from_object

    sections = {section.name: section.default_factory for section in dataclasses.fields(Config)}
    return {
        f"{name}.{key.arg_name}": " ".join((key.description or "").split())
        for name, section in sections.items()
        for key in parse_from_object(section).params
    }
