"""Configs from YAML files and the command line, by jsonargparse; and back to YAML."""

import argparse
import dataclasses
import difflib
import os
import sys
from typing import Any, List, NoReturn, Optional, Tuple

import yaml
from jsonargparse import ArgumentParser, Namespace

from fuxi_torchrec.config.help import HelpFormatter
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.config.schema import Config, section_of
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import absolute

# Keys that hold paths. In a file that is kept they are absolute: it is read from other folders too.
PATHS = (("data", "path"), ("trainer", "checkpoint_folder"))


class OneLineParser(ArgumentParser):
    """A parser whose complaints are one line and exit code 2, and that takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, "print_config": None, "formatter_class": HelpFormatter, **kwargs})

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Adds an option; one --with-dashes is taken --with_underscores as well, which the help does not list."""
        action = super().add_argument(*names, **options)
        for name in names:
            if name.startswith("--"):
                self._option_string_actions.setdefault("--" + name[2:].replace("-", "_"), action)
        return action

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parses a config file, which is UTF-8: jsonargparse's own reading takes the locale's encoding."""
        with open(path, encoding="utf-8") as file:
            return self.parse_string(file.read(), os.path.basename(path), *args, **kwargs)

    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """Ends the program by one line and exit code 2."""
        line = " ".join(part.strip() for part in str(message).splitlines() if part.strip())
        sys.stderr.write(f"error: {line} (see {self.prog} --help)\n")
        raise SystemExit(2)


def add_config_arguments(parser: OneLineParser) -> None:
    """Adds `--config FILE` (any number, later ones win) and one dotted option for every key of Config."""
    parser.add_argument("--config", action="config", help="YAML file; options after it override it.")
    parser.add_class_arguments(Config)


def read_yaml(path: str, what: str, instead: str = "") -> object:
    """Reads a YAML file's value, whatever it is. Raises UserError for one that is missing or is no YAML.

    Args:
        what: the file is, for the message.
        instead: what to do where it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what} ({error.strerror}){instead and '; ' + instead}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({one_line(error)})") from None


def check_file(path: str) -> None:
    """Raises UserError, naming file and key, for a config file that is missing, is no YAML, or has an unknown key."""
    check_keys(path, read_yaml(path, "config file") or {})


def check_keys(path: str, values: object) -> None:
    """Checks that a config has every key of the nested `values`. Raises UserError, naming `path`, for one that none
    has."""
    _check_keys(path, values, _known_keys(), prefix="")


def _known_keys() -> JsonObject:
    sections = {field.name: section_of(field) for field in dataclasses.fields(Config)}
    return {name: {field.name: None for field in dataclasses.fields(section)} for name, section in sections.items()}


def _check_keys(path: str, values: Any, known: JsonObject, prefix: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path}: {prefix.rstrip('.') or 'the file'} must hold keys and values, not {values!r}")
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(known)}"
            raise UserError(f"{path}: unknown key {prefix}{key}{hint}")
        if known[key] is not None:
            _check_keys(path, {} if value is None else value, known[key], f"{prefix}{key}.")


def parse_config(parser: OneLineParser, path: str, arguments: List[str]) -> Tuple[Config, Namespace]:
    """Parses a config file with command-line options on top; returns (Config, namespace)."""
    return parse_options(parser, ["--config", path, *arguments])


def parse_options(parser: OneLineParser, arguments: List[str]) -> Tuple[Config, Namespace]:
    """Parses command-line options alone, the config's defaults below them; returns (Config, namespace)."""
    files = [after for option, after in zip(arguments, arguments[1:]) if option == "--config"]
    files += [word.split("=", 1)[1] for word in arguments if word.startswith("--config=")]
    for file in files:
        check_file(file)
    namespace = parser.instantiate(parser.parse_args(arguments))
    config = Config(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(Config)})
    check(config)
    return config, namespace


def load_config(path: str, overrides: Optional[List[str]] = None) -> Config:
    """The checked Config of a YAML file, with dotted options on top. Raises UserError (or exits with code 2 for a
    value of the wrong type, like the command line)."""
    parser = OneLineParser(prog="fuxi-torchrec train")
    add_config_arguments(parser)
    return parse_config(parser, path, overrides or [])[0]


def make_paths_absolute(config: Config) -> None:
    """Makes the config's relative paths absolute: those of a command line mean the folder that it is typed in."""
    for section, name in PATHS:
        values = getattr(config, section)
        if getattr(values, name):
            setattr(values, name, absolute(getattr(values, name)))


def to_yaml(config: Config) -> str:
    """Every key of the config, as YAML that `load_config` reads back."""
    values = config.to_dict()
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    return yaml.safe_dump(values, sort_keys=False)
