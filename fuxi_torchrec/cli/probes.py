"""What `fuxi-torchrec doctor` looks at, a line a probe. Standard library alone.

Whatever may hang or end its process (imports of torch, torchrec and fbgemm; CUDA; kernels that are compiled) is asked in a
child (`probes_inside`), so that a broken library costs its own lines only.
"""

import functools
import json
import locale
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from fuxi_torchrec import versions
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject

CHILD_SECONDS = {"torch_inside": 120, "torchrec_inside": 120, "kernels_inside": 200}
"""How long a child may take; the kernels may have to be compiled."""
PACKAGES: Dict[str, Tuple[Tuple[str, ...], str]] = {
    "torch": (("torch",), ""),
    "torchrec": (("torchrec", "torchrec-nightly"), ""),
    "fbgemm": ((versions.CPU, versions.CUDA, "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu"), ""),
    "triton": (("triton",), ""),
    "torchx": (("torchx-nightly", "torchx"), ""),
    "numpy": (("numpy",), "training"),
    "pyarrow": (("pyarrow",), "training"),
    "duckdb": (("duckdb",), "prepare"),
    "iopath": (("iopath",), "training"),
    "jsonargparse": (("jsonargparse",), "training"),
    "docstring-parser": (("docstring-parser",), "training"),
    "PyYAML": (("PyYAML",), "training"),
    "rich": (("rich",), "training"),
    "tensorboard": (("tensorboard",), "training"),
}
"""Line -> (distributions, any of which will do; what cannot be done without them). Of torch, torchrec and fbgemm the line
"versions together" judges."""
FEATURES = {"avx2": "AVX2", "fma": "FMA", "avx512f": "AVX-512", "asimd": "NEON", "sve": "SVE"}
"""Word of /proc/cpuinfo -> the vector instructions that it stands for."""
MACROS = {"__AVX2__": "AVX2", "__FMA__": "FMA", "__AVX512F__": "AVX-512", "__ARM_NEON": "NEON"}
"""What a C compiler defines -> the vector instructions that it may then use."""


class Finding(NamedTuple):
    """What a probe found: a value to show; what is wrong with it, if anything, and the command or deed that mends it.
    stops: training would stop there. A problem that stops nothing is a remark."""

    value: str
    problem: str = ""
    mend: str = ""
    stops: bool = False


def python() -> Finding:
    """Tells the interpreter."""
    value = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 10):  # noqa: UP036 (this is asked where nothing else works)
        return Finding(value, "this project needs Python 3.10 or newer", "make a new environment with it", stops=True)
    if platform.system() != "Linux":
        return Finding(value, "this project is tested on Linux alone")
    return Finding(value)


def package(name: str) -> Finding:
    """Tells the version of a line of PACKAGES."""
    distributions, needed = PACKAGES[name]
    found = [f"{d} {v}" for d in distributions if (v := versions.installed_version(d))]
    if found:
        return Finding(", ".join(found))
    if not needed:
        return Finding("not installed")
    mend = f"{sys.executable} -m pip install {distributions[0]}"
    return Finding("not installed", f"{needed} needs it", mend, stops=needed == "training")


def versions_together() -> Finding:
    """Tells whether torch, torchrec and fbgemm go together, and the command that mends a wrong set."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            versions.check_environment()
        except UserError as error:
            problem, _, mend = str(error).partition(". To mend it: ")
            return Finding("no", problem, mend, stops=True)
    return Finding("yes", "; ".join(str(one.message) for one in warned))


def processor() -> Finding:
    """Tells the processor's name, the vector instructions that it has, and the cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    fields = {key.strip(): value for key, _, value in (line.partition(":") for line in reversed(lines))}
    words = (fields.get("flags") or fields.get("Features") or "").split()
    features = [name for word, name in FEATURES.items() if word in words]
    name = fields.get("model name", platform.processor() or platform.machine()).strip()
    usable = len(os.sched_getaffinity(0))
    without = "" if "AVX-512" in features or platform.machine() != "x86_64" else " (no AVX-512)"
    shown = " ".join(features) or "no vector instructions known"
    return Finding(f"{name}; {shown}{without}; {usable} of {os.cpu_count()} cores")


def threads() -> Finding:
    """Tells how many threads torch would use, and what sets it."""
    asked = os.environ.get("OMP_NUM_THREADS")
    answer, problem = inside("torch_inside")
    shown = "not known" if answer is None else str(answer["threads"])
    return Finding(f"{shown} (OMP_NUM_THREADS {'is not set' if asked is None else f'= {asked}'})", problem)


def torch_imports() -> Finding:
    """Tells whether torch can be imported."""
    answer, problem = inside("torch_inside")
    if answer is None:
        return Finding("no", problem, _mend_of_set(), stops=True)
    return Finding(f"yes: {answer['torch']}, products on the CPU by {answer['cpu_capability']}")


def torchrec_imports() -> Finding:
    """Tells whether torchrec and fbgemm can be imported together, and fbgemm's operators are there."""
    answer, problem = inside("torchrec_inside")
    return Finding("no", problem, _mend_of_set(), stops=True) if answer is None else Finding(f"yes: {answer['torchrec']}")


def compiler() -> Finding:
    """Tells the C compiler that the CPU kernels would be made by."""
    answer, problem = inside("kernels_inside")
    if answer is None:
        return Finding("not known", problem)
    if answer["compiler"] is None:
        mend = "install gcc or clang (apt install gcc), or name one in CC"
        return Finding("none", "without one, training on a CPU takes PyTorch's operators", mend)
    version = _output(answer["compiler"], "--version").splitlines()
    return Finding(f"{answer['compiler']}: {version[0] if version else ''}")


def kernels() -> Finding:
    """Tells whether the CPU kernels are there, and if not why."""
    answer, problem = inside("kernels_inside")
    if answer is None:
        return Finding("no", problem)
    if answer["loaded"]:
        return Finding("loaded", answer["said"])
    return Finding("switched off by the environment" if answer["switched_off"] else "none", answer["said"])


def kernels_target() -> Finding:
    """Tells the flags that the kernels are compiled with, and the vector instructions that follow from them here."""
    answer, problem = inside("kernels_inside")
    if answer is None or answer["compiler"] is None:
        return Finding("none", problem)
    macros = _output(answer["compiler"], *answer["flags"], "-dM", "-E", "-x", "c", os.devnull)
    defined = {words[1] for words in map(str.split, macros.splitlines()) if len(words) > 1}
    vectors = [name for macro, name in MACROS.items() if macro in defined]
    return Finding(f"{' '.join(vectors) or 'no vector instructions known'}: {' '.join(answer['flags'])}")


def kernels_choice() -> Finding:
    """Tells what runs on this machine have measured of kernels and PyTorch, and what fixes the choice."""
    answer, problem = inside("kernels_inside")
    if answer is None or not answer["loaded"]:
        return Finding("nothing to choose from", problem)
    if answer["fixed_by"]:
        return Finding(f"kernels, fixed by FUXI_TORCHREC_NATIVE={answer['fixed_by']}")
    measured = answer["measured"]
    if not measured:
        return Finding("a run measures it at its start; none has here yet")
    found: Dict[str, List[float]] = {}
    for ratios, _ in measured:
        for family, ratio in ratios.items():
            found.setdefault(family, []).append(ratio)
    told = ", ".join(f"{family} {min(ratios):.1f} to {max(ratios):.1f}" for family, ratios in found.items())
    left = sorted({family for _, losing in measured for family in losing})
    leaving = f"; left to PyTorch at some: {', '.join(left)}" if left else ""
    return Finding(f"measured at {len(measured)} size(s) of a step, PyTorch's time over the kernels': {told}{leaving}")


def kernels_folder() -> Finding:
    """Tells where compiled kernels are kept."""
    answer, problem = inside("kernels_inside")
    if answer is None:
        return Finding("not known", problem)
    if answer["folder"] is None:
        mend = "give this user a home folder, or name one in XDG_CACHE_HOME"
        return Finding("none", "kernels are compiled anew by every process", mend)
    return Finding(f"{answer['folder']}: {answer['kept']} kept")


def driver() -> Finding:
    """Tells the NVIDIA driver, and whether what is installed could use it."""
    if not versions.has_nvidia_driver():
        return Finding("none: training takes the CPU")
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    value = text[0] if text else "its library is there, its version is not told"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            versions.check_environment("cuda")
    except UserError as error:
        problem, _, mend = str(error).partition(". To mend it: ")
        return Finding(value, f"training takes the CPU: {problem}", mend)
    return Finding(value)


def cuda() -> Finding:
    """Tells the CUDA and cuDNN that torch was built with."""
    answer, problem = inside("torch_inside")
    if answer is None:
        return Finding("not known", problem)
    return Finding(f"CUDA {answer['cuda']}, cuDNN {answer['cudnn']}" if answer["cuda"] else "torch is a CPU build")


def nccl() -> Finding:
    """Tells the NCCL that torch brings."""
    answer, problem = inside("torch_inside")
    return Finding("not known" if answer is None else answer["nccl"] or "none in this torch", problem)


def gpus() -> Finding:
    """Tells the GPUs that torch sees."""
    answer, problem = inside("torch_inside")
    if answer is None:
        return Finding("not known", problem)
    if answer["cuda"] and versions.has_nvidia_driver() and not answer["gpus"]:
        mend = "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for torch's CUDA"
        return Finding("none", "there is a driver and torch has CUDA, yet torch sees no GPU", mend)
    return Finding("; ".join(answer["gpus"]) or "none")


def home() -> Finding:
    """Tells whether the user has a home folder that can be written."""
    try:
        folder = Path.home()
    except RuntimeError:  # no $HOME, and a user whom the system does not know
        return Finding("none")
    problem = _cannot_write(folder)
    return Finding(str(folder) + (" (cannot be written)" if problem else ""), problem)


def temporary_folder() -> Finding:
    """Tells where temporary files go."""
    try:
        return Finding(tempfile.gettempdir())
    except FileNotFoundError as error:
        mend = "name a folder that can be written in TMPDIR"
        return Finding("none", one_line(error), mend, stops=True)


def locale_() -> Finding:
    """Tells the locale's encoding; files are read and written as UTF-8 whatever it is."""
    return Finding(f"{locale.getpreferredencoding(False)} (files are UTF-8 whatever it is)")


PROBES: List[Tuple[str, Callable[[], Finding]]] = [
    ("python", python),
    *((name, functools.partial(package, name)) for name in PACKAGES),
    ("versions together", versions_together),
    ("torch imports", torch_imports),
    ("torchrec imports", torchrec_imports),
    ("processor", processor),
    ("threads", threads),
    ("C compiler", compiler),
    ("CPU kernels", kernels),
    ("kernels' target", kernels_target),
    ("kernels' choice", kernels_choice),
    ("kernels' folder", kernels_folder),
    ("NVIDIA driver", driver),
    ("CUDA", cuda),
    ("NCCL", nccl),
    ("GPUs", gpus),
    ("home", home),
    ("temporary folder", temporary_folder),
    ("locale", locale_),
]
"""In the order in which they are shown. A probe returns a Finding; what it raises becomes a remark."""


@functools.cache
def inside(name: str) -> Tuple[Optional[JsonObject], str]:
    """Asks a function of `probes_inside` in a child, once: (its answer, "") or (None, what went wrong)."""
    code = f"import json; from fuxi_torchrec.cli.probes_inside import {name} as ask; print('\\n' + json.dumps(ask()))"
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=CHILD_SECONDS[name],
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return None, f"it did not answer within {CHILD_SECONDS[name]} seconds"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return None, one_line("".join(last) or f"the process ended with code {done.returncode}")


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _cannot_write(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"


def _mend_of_set() -> str:
    """The command that ends in a set that goes together, for a library that cannot be imported."""
    mend = versions_together().mend
    pins = versions.PINNED
    build = versions.CUDA if versions.fbgemm_has_cuda() else versions.CPU
    again = f"install --force-reinstall --no-deps torchrec=={pins['torchrec']} {build}=={pins['fbgemm']}"
    return mend or f"{sys.executable} -m pip {again}"
