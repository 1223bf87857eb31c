"""Kernels in C for the CPU: one pass over memory where PyTorch's own operators would make many.

They are compiled when a process first needs them, by the C compiler that the machine has (two or three seconds), and
kept in a cache folder under a name that tells everything they depend on. Without a compiler, and for anything but
float32 on a CPU, callers go through PyTorch: the same results up to rounding, slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Callable, Optional

import torch
from torch import Tensor

SWITCH = "FUXI_TORCHREC_NATIVE"
"""Environment variable; 0: never use these kernels."""
SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
LINK_FLAGS = ("-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 120

_KINDS = {"t": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint32, "s": ctypes.c_uint64, "f": ctypes.c_float}
_SIGNATURES = {
    "dropout_rows": "ttiiufs",
    "input_rows": "ttttiifufs",
    "rms_norm_rows": "tittt" + "iifufs",
    "rms_norm_rows_backward": "ttitttt" + "iiufs",
    "silu_rows": "ttii",
    "silu_rows_backward": "titt" + "iiii",
    "swiglu_rows": "ttii",
    "swiglu_rows_backward": "tttii",
    "unit_rows": "tttiif",
    "unit_rows_backward": "ttttiif",
    "sampled_softmax_tokens": "t" * 10 + "iiiffi",
    "sampled_softmax_candidates": "tttt" + "iiiif",
    "toeplitz_forward": "tittit" + "titititii",
    "toeplitz_backward": "tittitttt" + "ititi" + "tii",
    "mix_forward": "titttttt" + "iiiiiiii" + "fff",
    "mix_backward": "titttttttt" + "t" + "iiiiiiii" + "fff",
}
"""Arguments of each kernel: t a tensor or None, i int64, u uint32, s uint64, f float32. The number of threads is last."""

_log = logging.getLogger(__name__)
_found = False


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can run on these tensors' memory, here and now: nothing is being traced or compiled."""
    if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False  # a fake tensor has no memory to point at
    return takes(*tensors)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels exist here and are for such tensors: float32 on a CPU. While something is compiled: whether they
    have been found before, since torch.compile cannot follow the search."""
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors):
        return False
    return _found if torch.compiler.is_compiling() else library() is not None


def call(name: str, *arguments) -> None:
    """Runs a kernel on tensors (row-major as its source says; None for a null pointer), ints and floats."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _function(name)(*values, torch.get_num_threads())


@functools.cache
def _function(name: str) -> Callable[..., None]:
    function = getattr(library(), name)
    function.argtypes = [_KINDS[kind] for kind in _SIGNATURES[name]] + [ctypes.c_int]
    function.restype = None
    return function


@functools.cache
def library() -> Optional[ctypes.CDLL]:
    """The compiled kernels, or None: switched off, no compiler, or it failed (said once, as a warning)."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get(SWITCH) == "0" or platform.system() != "Linux":
        return None
    if compiler is None:
        _log.warning("no C compiler (cc, gcc, clang or $CC): training on the CPU takes PyTorch's operators, and longer")
        return None
    global _found
    try:
        kernels = ctypes.CDLL(str(_compiled(compiler)))
        _found = True
        return kernels
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        _log.warning("the CPU kernels could not be compiled (%s): %s=0 silences this", "".join(reason), SWITCH)
        return None


def _compiled(compiler: str) -> Path:
    sources = sorted(SOURCES.glob("*.c"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [compiler, version, *FLAGS, *LINK_FLAGS, _processor()]
    parts += [path.read_text() for path in (*sources, *sorted(SOURCES.glob("*.h")))]
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    target = _cache_folder() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / name
            command = [compiler, *FLAGS, *LINK_FLAGS, *map(str, sources), "-o", str(built), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
            os.replace(built, target)  # complete or absent, however many processes compile it at once
    return target


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuxi_torchrec"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fuxi_torchrec-"))
