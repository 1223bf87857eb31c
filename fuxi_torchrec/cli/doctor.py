"""`fuxi-torchrec doctor`. Standard library alone: it is asked where something else is broken."""

import argparse
import json
from typing import Any, Callable, List, NoReturn, Sequence, Tuple

from fuxi_torchrec import __version__
from fuxi_torchrec.cli.probes import PROBES, Finding
from fuxi_torchrec.errors import UserError, one_line

Answer = Tuple[str, Finding]
"""A probe's name and what it found."""


def doctor(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec doctor`; returns the exit code, 1 where something would stop training. Raises UserError."""
    parser = _Parser(
        prog="fuxi-torchrec doctor",
        allow_abbrev=False,
        description="Looks at what training needs on this machine: versions, processor, kernels, GPU, folders. Says what "
        "would stop training, and what mends it. Exit code 1: something would.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args(arguments)
    answers = ask(PROBES)
    is_fine = not any(finding.stops for _, finding in answers)
    print(_json(answers, is_fine) if options.json else _text(answers, is_fine))
    return 0 if is_fine else 1


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"doctor: {message}; see fuxi-torchrec doctor --help")


def ask(probes: Sequence[Tuple[str, Callable[[], Finding]]]) -> List[Answer]:
    """Asks every probe. One that fails becomes a remark on its own line, and the others are asked all the same."""
    answers = []
    for name, probe in probes:
        try:
            finding = probe()
        except Exception as error:
            problem = f"this could not be looked at ({type(error).__name__}: {one_line(error)})"
            finding = Finding("unknown", problem)
        answers.append((name, finding))
    return answers


def _text(answers: Sequence[Answer], is_fine: bool) -> str:
    width = max(len(name) for name, _ in answers)
    lines = [f"{name:<{width}}  {finding.value}" for name, finding in answers]
    lines.append("")
    for name, finding in answers:
        if finding.problem:
            lines.append(f"{'stops training' if finding.stops else 'note'}: {name}: {finding.problem}")
        if finding.mend:
            lines.append(f"  to mend it: {finding.mend}")
    lines.append("nothing here would stop training" if is_fine else "training would stop here")
    return "\n".join(lines)


def _json(answers: Sequence[Answer], is_fine: bool) -> str:
    probes: List[Any] = [{"name": name, **finding._asdict()} for name, finding in answers]
    return json.dumps({"fuxi_torchrec": __version__, "fine": is_fine, "probes": probes}, indent=2)
