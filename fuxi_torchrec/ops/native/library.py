"""Kernels in C for the CPU: one pass over memory where PyTorch's own operators would make many.

They are compiled when a process first needs them, by the C compiler that the machine has (two or three seconds), and
kept in a folder of the user's (`cache`) under a name that tells everything they depend on. Without a compiler, and for
anything but float32 on a CPU, callers go through PyTorch: the same results up to rounding, slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Callable, FrozenSet, Iterable, List, Optional, Union

import torch
from torch import Tensor

from fuxi_torchrec.ops.native import cache

SWITCH = "FUXI_TORCHREC_NATIVE"
"""Environment variable; 0: never use these kernels."""
MORE_FLAGS = "FUXI_TORCHREC_NATIVE_FLAGS"
"""Environment variable; further flags of the compiler, after those below: -mno-avx512f for another processor's vectors."""
SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
LINK_FLAGS = ("-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 120
WRONG_INDEX = 2

_TENSORS = {"F": torch.float32, "D": torch.float64, "L": torch.int64, "W": torch.int32}
_NUMBERS = {"i": ctypes.c_int64, "u": ctypes.c_uint32, "s": ctypes.c_uint64, "f": ctypes.c_float}
_SIGNATURES = {
    "lanes": "",
    "dropout_rows": "FFiiufs",
    "input_rows": "FFLFiifufs",
    "rms_norm_rows": "FiFFF" + "iifufs",
    "rms_norm_rows_backward": "FFiFFFF" + "iiufs",
    "silu_rows": "FFii",
    "silu_rows_backward": "FiFF" + "iiii",
    "swiglu_rows": "FFii",
    "swiglu_rows_backward": "FFFii",
    "unit_rows": "FFFiif",
    "unit_rows_backward": "FFFFiif",
    "sampled_softmax": "FFFWLFFFFF" + "iiiiiff",
    "toeplitz_forward": "FiLFiL" + "FiLiLiFii",
    "toeplitz_backward": "FiLFiLFiL" + "FFiLiLiFii",
    "mix_forward": "FiLLLFFL" + "iiiiiiii" + "fff",
    "mix_backward": "FiLLLFFFFDL" + "iiiiiiii" + "fff",
}
"""Arguments of each kernel. Tensors (or None): F float32, D float64, L int64, W int32; i int64, u uint32, s uint64,
f float32. The number of threads is last."""

FAMILIES = ("token_mixing", "linear_mixing", "sampled_softmax", "row_wise")
"""The operations that have kernels here, by what chooses between these and PyTorch's together."""

_log = logging.getLogger(__name__)
_left_to_pytorch: FrozenSet[str] = frozenset()
_found = False
_forked = False


def leave_to_pytorch(families: Iterable[str]) -> None:
    """Makes this process compute these families of operations by PyTorch's operators, and all others by the kernels.

    Raises:
        ValueError: a name that is none of FAMILIES.
    """
    global _left_to_pytorch
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no kernels of that name; there are {', '.join(FAMILIES)}")
    _left_to_pytorch = frozenset(families)


def left_to_pytorch() -> FrozenSet[str]:
    """Returns the families of operations that PyTorch computes."""
    return _left_to_pytorch


def is_chosen(family: str) -> bool:
    """Tells whether a family of operations is not left to PyTorch; whoever asks for a kernel by name gets it all the same."""
    return family not in _left_to_pytorch


def usable(*tensors: Tensor) -> bool:
    """Tells whether the kernels can run on these tensors' memory, here and now: nothing is being traced or compiled."""
    if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False  # a fake tensor has no memory to point at
    return takes(*tensors)


def takes(*tensors: Tensor) -> bool:
    """Tells whether the kernels exist here and are for such tensors: float32 on a CPU. While something is compiled:
    whether they have been found before, since torch.compile cannot follow the search."""
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors):
        return False
    return _found if torch.compiler.is_compiling() else library() is not None


def call(name: str, *arguments: Union[Tensor, int, float, None]) -> None:
    """Runs a kernel on tensors (row-major as its source says; None for a null pointer), ints and floats.

    The caller has checked sizes and indices: a kernel takes every address as it comes.

    Raises:
        TypeError: a wrong number of arguments, or a tensor of another type or device than the kernel's.
        MemoryError: the kernel found none; its results are worth nothing.
        IndexError: an index beyond the rows that it counts; its results are worth nothing.
    """
    kinds = _SIGNATURES[name]
    if len(arguments) != len(kinds):
        raise TypeError(f"{name} takes {len(kinds)} arguments, not {len(arguments)}")
    values = [_address(name, x, kind) if kind in _TENSORS else x for x, kind in zip(arguments, kinds)]
    status = _function(name)(*values, _threads())
    if status == WRONG_INDEX:
        raise IndexError(f"{name}: an index that is no row")
    if status:
        raise MemoryError(f"the CPU kernel {name} found no memory for what it computes with")


def _threads() -> int:
    """One in a process that was forked: the threads that OpenMP would wait for are its parent's."""
    return 1 if _forked else torch.get_num_threads()


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def _address(name: str, x: Union[Tensor, int, float, None], kind: str) -> Optional[int]:
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} takes a tensor of {_TENSORS[kind]}, not {x!r}")
    if x.dtype != _TENSORS[kind] or x.device.type != "cpu":
        raise TypeError(f"{name} takes {_TENSORS[kind]} on the CPU, not {x.dtype} on {x.device.type}")
    return x.data_ptr()


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function = getattr(library(), name)
    kinds = [ctypes.c_void_p if kind in _TENSORS else _NUMBERS[kind] for kind in _SIGNATURES[name]]
    function.argtypes, function.restype = [*kinds, ctypes.c_int], ctypes.c_int
    return function


@functools.cache
def lanes() -> int:
    """Returns the floats of a vector; some kernels take rows of whole vectors."""
    return int(_function("lanes")(1))


@functools.cache
def library() -> Optional[ctypes.CDLL]:
    """Returns the compiled kernels, or None: switched off, no compiler, or it failed (reported once, as a warning)."""
    compiler = find_compiler()
    if os.environ.get(SWITCH) == "0" or platform.system() != "Linux":
        return None
    if compiler is None:
        _log.warning("no C compiler (cc, gcc, clang or $CC): training on the CPU takes PyTorch's operators, and longer")
        return None
    global _found
    try:
        kernels = _open(compiler)
        _found = True
        return kernels
    except (OSError, subprocess.SubprocessError) as error:
        what = "compiled" if isinstance(error, subprocess.SubprocessError) else "loaded"
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        _log.warning("the CPU kernels could not be %s (%s): %s=0 silences this", what, "".join(reason), SWITCH)
        return None


def _open(compiler: str) -> ctypes.CDLL:
    flags, sources = compile_flags(), sorted(SOURCES.glob("*.c"))
    return cache.load(
        f"{_name(compiler)}.so", lambda built: _run(compiler, *flags, *map(str, sources), "-o", str(built), "-lm")
    )


def name() -> str:
    """Names the kernels of this machine and environment by a hash of all that they depend on."""
    compiler = find_compiler()
    assert compiler is not None
    return _name(compiler)


@functools.cache
def _name(compiler: str) -> str:
    hashed = hashlib.sha256("\0".join([compiler, _run(compiler, "--version"), *compile_flags(), _processor()]).encode())
    for path in (*sorted(SOURCES.glob("*.c")), *sorted(SOURCES.glob("*.h"))):
        hashed.update(b"\0" + path.read_bytes())
    return f"kernels-{hashed.hexdigest()[:16]}"


def compile_flags() -> List[str]:
    """Lists what the kernels are compiled with, the user's further flags last."""
    return [*FLAGS, *LINK_FLAGS, *shlex.split(os.environ.get(MORE_FLAGS, ""))]


def find_compiler() -> Optional[str]:
    """Finds the C compiler: the one that $CC names, else cc, gcc or clang."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def _run(*command: str) -> str:
    # Compilers quote in UTF-8 whatever the locale is.
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=COMPILE_SECONDS
    )
    return done.stdout


def processor() -> str:
    """Names the processor, as it names itself."""
    names = [line.partition(":")[2].strip() for line in _processor().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))
