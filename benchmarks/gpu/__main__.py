"""What a GPU makes of this project: agreement of kernels, ceilings, towers and losses, whole steps. See docs/gpu.md.

    python -m benchmarks.gpu [--output runs/gpu] [--minutes 9] [--parts PART …] [--quick] [--device cuda]

Needs torch with CUDA (which brings Triton) and numpy; with torchrec and fbgemm it times whole training steps too. Prints
tables, and writes results.json, index.html and traces to the output folder. Exit codes: 0; 1: something failed or
disagrees; 2: a mistake, told in one line. With --device cpu it runs at tiny sizes in Triton's interpreter, to try the
command itself.
"""

import argparse
import json
import os
import shlex
import sys
from typing import List, Sequence

import torch

from benchmarks.gpu.page import page
from benchmarks.gpu.run import LAST_SECONDS, PARTS, Machine, Part, run_parts
from benchmarks.gpu.tables import complete, is_well, text
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import write_aside


def main() -> int:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="it ends within so many")
    parser.add_argument("--output", default=os.path.join("runs", "gpu"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command; always so on a CPU")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    try:
        return _run(options, options.quick or options.device == "cpu")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def _run(options: argparse.Namespace, quick: bool) -> int:
    device, minutes, output = options.device, options.minutes, options.output
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no GPU here; --device cpu tries the command itself, and measures nothing")
    if not minutes * 60 > LAST_SECONDS:
        raise UserError(f"--minutes: {minutes:g} is too short; it needs {LAST_SECONDS:g} seconds to write its results alone")
    try:
        os.makedirs(output, exist_ok=True)
        write_aside(os.path.join(output, "index.html"), "")  # before minutes of work
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); name another folder") from None
    parts: List[Part] = []
    machine: Machine = {}
    names = [name for name in PARTS if name in options.parts]
    for part, seen in run_parts(names, device, quick, minutes * 60, output):
        print(f"{part.name}: {len(part.rows)} cases in {part.seconds:.0f} s", file=sys.stderr, flush=True)
        parts.append(part)
        machine = machine or seen
        _write(parts, machine, quick, output)  # what ends the command leaves the parts before
    print(text(parts, machine, quick))
    print(f"written to {os.path.join(output, 'results.json')}, {os.path.join(output, 'index.html')}")
    return 0 if is_well(parts) else 1


def _write(parts: Sequence[Part], machine: Machine, quick: bool, output: str) -> None:
    complete(parts)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    results = {"command": command, "machine": machine, "quick": quick, "well": is_well(parts)}
    results["parts"] = [part.to_json() for part in parts]
    write_aside(os.path.join(output, "results.json"), json.dumps(results, indent=1) + "\n")
    write_aside(os.path.join(output, "index.html"), page(parts, machine, quick, command))


if __name__ == "__main__":
    sys.exit(main())
