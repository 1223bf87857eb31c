"""Calls of the C kernels with their arguments and results, to be made again by kernels of another target: a shared library for
this machine, or a program for another one."""

import ctypes
import shlex
import struct
import subprocess
from dataclasses import dataclass
from typing import Any, List, Sequence

import torch
import torch.nn.functional as F

from fuxi_torchrec.ops.native import library as native

C_TYPES = {"F": "float", "D": "double", "L": "int64_t", "W": "int32_t"}
C_TYPES |= {"i": "int64_t", "u": "uint32_t", "s": "uint64_t", "f": "float"}
PACKED = {"i": "q", "u": "I", "s": "Q", "f": "f"}
THREADS = 2


@dataclass
class Call:
    """A kernel's name, its arguments (tensors as they were before the call), and every tensor after it."""

    name: str
    arguments: List[Any]
    results: List[torch.Tensor]

    @property
    def kinds(self) -> str:
        return native._SIGNATURES[self.name]


def copied(value):
    """A copy of a tensor's elements up to the end of what its strides reach."""
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value


def record(work, monkeypatch) -> List[Call]:
    """The calls that `work()` makes."""
    calls, real = [], native.call

    def noted(name, *arguments):
        # A kernel may read beyond a view's own elements: what is kept is the view's whole memory, from its first element on.
        whole = [_whole(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        before = [copied(x) for x in whole]
        real(name, *arguments)
        calls.append(Call(name, before, [copied(x) for x in whole if isinstance(x, torch.Tensor)]))

    monkeypatch.setattr(native, "call", noted)
    work()
    monkeypatch.setattr(native, "call", real)
    return calls


def _whole(x: torch.Tensor) -> torch.Tensor:
    count = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((count,), (1,))


def padded_for(call: Call, lanes: int) -> Call:
    """The same call for vectors of another length, where its candidates have rows of whole vectors."""
    if call.name != "sampled_softmax":
        return call
    U, D = call.arguments[12], call.arguments[13]

    def padded(x):
        return None if x is None else F.pad(x.view(U, -1)[:, :D], (0, -D % lanes)).flatten()

    arguments, results = list(call.arguments), list(call.results)
    for x in (2, 9):
        at = sum(isinstance(y, torch.Tensor) for y in arguments[:x])
        if arguments[x] is not None:
            arguments[x], results[at] = padded(arguments[x]), padded(results[at])
    return Call(call.name, arguments, results)


def build(folder, compiler: str, *more: str):
    """The kernels as a shared library for this machine, compiled with further flags."""
    path = folder / "kernels.so"
    sources = sorted(map(str, native.SOURCES.glob("*.c")))
    command = [compiler, *native.FLAGS, *native.LINK_FLAGS, *more, *sources, "-o", str(path), "-lm"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return ctypes.CDLL(str(path))


def replay(library: ctypes.CDLL, call: Call) -> List[torch.Tensor]:
    """All tensors after the same call of a library's kernel."""
    arguments = [copied(x) for x in call.arguments]
    kinds = [ctypes.c_void_p if kind in native._TENSORS else native._NUMBERS[kind] for kind in call.kinds]
    function = getattr(library, call.name)
    function.argtypes = [*kinds, ctypes.c_int]
    assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), THREADS) == 0
    return [x for x in arguments if isinstance(x, torch.Tensor)]


def replay_elsewhere(folder, compiler: str, emulator: str, calls: Sequence[Call]) -> List[List[torch.Tensor]]:
    """All tensors after the same calls in a program for another processor, run by its emulator."""
    (folder / "main.c").write_text(_program(calls))
    (folder / "in").write_bytes(b"".join(_packed(call) for call in calls))
    sources = sorted(map(str, native.SOURCES.glob("*.c")))
    options = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-static", "-fopenmp"]
    command = [compiler, *options, str(folder / "main.c"), *sources, "-o", str(folder / "main"), "-lm"]
    subprocess.run(command, check=True, timeout=120)
    subprocess.run([*shlex.split(emulator), str(folder / "main"), "in", "out"], cwd=folder, check=True, timeout=120)
    data, found, place = bytearray((folder / "out").read_bytes()), [], 0
    for call in calls:
        tensors = []
        for like in call.results:
            size = like.numel() * like.element_size()
            tensors.append(torch.frombuffer(data[place : place + size] or bytearray(8), dtype=like.dtype)[: like.numel()])
            place += size
        found.append(tensors)
    return found


def _packed(call: Call) -> bytes:
    parts = []
    for kind, x in zip(call.kinds, call.arguments):
        if kind in native._TENSORS:
            parts.append(b"" if x is None else bytes(x.untyped_storage())[: x.numel() * x.element_size()])
        else:
            parts.append(struct.pack(f"<{PACKED[kind]}", x))
    return b"".join(parts)


def _program(calls: Sequence[Call]) -> str:
    """A C program that reads every call's arguments, makes the calls, and writes all arrays."""
    lines = ["#include <stdint.h>", "#include <stdio.h>", "#include <stdlib.h>"]
    for name in sorted({call.name for call in calls}):
        kinds = native._SIGNATURES[name]
        types = [f"{C_TYPES[kind]} *" if kind in native._TENSORS else C_TYPES[kind] for kind in kinds]
        lines.append(f"int {name}({', '.join([*types, 'int'])});")
    lines += ["int main(int n, char **files) {", "(void)n;"]
    lines.append("FILE *in = fopen(files[1], \"rb\"), *out = fopen(files[2], \"wb\");")
    for call in calls:
        names, arrays = [], []
        lines.append("{")
        for place, (kind, x) in enumerate(zip(call.kinds, call.arguments)):
            variable, c_type = f"a{place}", C_TYPES[kind]
            if kind in native._TENSORS and x is None:
                names.append("0")
                continue
            if kind in native._TENSORS:
                lines.append(f"{c_type} *{variable} = malloc({x.numel()} * sizeof({c_type}) + 64);")
                lines.append(f"if (fread({variable}, sizeof({c_type}), {x.numel()}, in) != {x.numel()}) return 1;")
                arrays.append((variable, c_type, x.numel()))
            else:
                lines.append(f"{c_type} {variable}; if (fread(&{variable}, sizeof({c_type}), 1, in) != 1) return 1;")
            names.append(variable)
        lines.append(f"if ({call.name}({', '.join([*names, str(THREADS)])})) return 2;")
        lines += [f"fwrite({variable}, sizeof({c_type}), {count}, out);" for variable, c_type, count in arrays]
        lines.append("}")
    return "\n".join([*lines, "return fclose(out);", "}"])
