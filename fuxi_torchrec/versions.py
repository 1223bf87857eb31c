"""Do the installed torch, torchrec and fbgemm go together? Asked of their metadata, before any of them is imported.

The three are compiled against each other's minor version, and pip does not know it: a wrong set imports, then fails
much later with `no attribute jagged_...`. Commands that need torch call `check_environment` first.
"""

import ctypes
import re
import sys
import warnings
from importlib import metadata
from typing import Dict, List, Optional, Tuple

from fuxi_torchrec.errors import UserError

# The sets that were run, by torch's minor version. The first is what setup.py and requirements/ pin.
TESTED: Dict[Tuple[int, int], Dict[str, str]] = {
    (2, 13): {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"},
    (2, 14): {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm": "1.9.0"},
}
PINNED = TESTED[2, 13]
CPU, CUDA = "fbgemm-gpu-cpu", "fbgemm-gpu"
# What torchrec needs beside torch and fbgemm; missing where it was installed with --no-deps and nothing else.
TORCHREC_NEEDS = {
    "tensordict": "tensordict",
    "torchmetrics": "torchmetrics==1.0.3",
    "pyre-extensions": "pyre-extensions",
    "tqdm": "tqdm",
}


def installed_version(distribution: str) -> Optional[str]:
    """Returns the installed version of a distribution (not of an import name), or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def has_nvidia_driver() -> bool:
    """Tells whether the library that fbgemm's CUDA build is linked to can be loaded."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def fbgemm_has_cuda() -> bool:
    """Tells whether the CUDA build of fbgemm is installed: without it, embedding tables stay on the CPU."""
    return installed_version(CUDA) is not None and installed_version(CPU) is None


def check_environment(device: str = "auto") -> None:
    """Refuses a set of torch, torchrec and fbgemm that cannot work, with the command that mends it.

    `device` is the run's ("auto", "cpu" or "cuda"). A set newer than the tested ones whose numbers go together is let
    through with a warning. Takes milliseconds and imports nothing.

    Raises UserError: something is missing, the versions do not go together, both builds of fbgemm are installed, or
    the one that is does not fit the device.
    """
    if nightly := [n for n in ("torchrec-nightly", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu") if _found(n)]:
        warnings.warn(f"{' and '.join(map(_found, nightly))}: nightly builds are not checked", stacklevel=2)
        return
    if device == "cuda" and not has_nvidia_driver():
        raise UserError("trainer.device, --device: cuda, but no NVIDIA driver (libnvidia-ml.so.1) is found; choose cpu or auto")
    problems = _missing() or _both_builds() or _mismatch() or _wrong_build(device)
    if problems:
        raise UserError(f"{'; '.join(problems)}. To mend it: {_mend(device)}")
    if _minor(_installed("torch")) not in TESTED:
        names = ", ".join(filter(None, map(_found, ("torch", "torchrec", CPU, CUDA))))
        warnings.warn(f"{names}: newer than every set this project was tested with", stacklevel=2)


def _installed(name: str) -> str:
    """The version of a distribution that is known to be there."""
    version = installed_version(name)
    assert version is not None, name
    return version


def _found(name: str) -> str:
    version = installed_version(name)
    return f"{name} {version}" if version else ""


def _minor(version: str) -> Tuple[int, int]:
    """(2, 13) of "2.13.0+cpu", "2.13.0a0+gitabc" or "2.13.0.dev20260101"."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None, version
    return int(numbers[1]), int(numbers[2])


def _partners(torch: str) -> Optional[Tuple[int, int]]:
    """The minor version of torchrec and fbgemm that goes with this torch, or None where it is not known.

    Since torch 2.6 / fbgemm 1.1 / torchrec 1.1 they have been released in step.
    """
    major, minor = _minor(torch)
    return (1, minor - 5) if major == 2 else None


def _missing() -> List[str]:
    absent = [n for n in ("torch", "torchrec", *TORCHREC_NEEDS) if not installed_version(n)]
    if not installed_version(CPU) and not installed_version(CUDA):
        absent.append("fbgemm")
    return [f"not installed: {', '.join(absent)}"] if absent else []


def _both_builds() -> List[str]:
    if installed_version(CPU) and installed_version(CUDA):
        return [f"{_found(CPU)} and {_found(CUDA)} are both installed and have overwritten each other's files"]
    return []


def _mismatch() -> List[str]:
    torch, torchrec = _installed("torch"), _installed("torchrec")
    fbgemm = _installed(CPU if installed_version(CPU) else CUDA)
    oldest = min(TESTED)
    if _minor(torch) < oldest:
        return [f"torch {torch} is too old: this project needs torch {oldest[0]}.{oldest[1]} or newer"]
    partners = _partners(torch)
    if partners is None or _minor(torchrec) == _minor(fbgemm) == partners:
        return []
    found = f"torch {torch}, torchrec {torchrec} and {_found(CPU) or _found(CUDA)}"
    want = f"{partners[0]}.{partners[1]}"
    major, minor = _minor(torch)
    return [f"{found} do not go together: torch {major}.{minor} needs torchrec {want} and fbgemm {want}"]


def _wrong_build(device: str) -> List[str]:
    if installed_version(CUDA):
        if not has_nvidia_driver():
            return [f"{_found(CUDA)} is the CUDA build, and there is no NVIDIA driver here (libnvidia-ml.so.1)"]
        if _torch_is_cpu_build():
            return [f"{_found(CUDA)} is the CUDA build, and {_found('torch')} is a CPU build"]
    elif device == "cuda":
        return [f"the device is cuda, but {_found(CPU)} has no CUDA kernels"]
    return []


def _torch_is_cpu_build() -> bool:
    return (installed_version("torch") or "").endswith("+cpu")


def _mend(device: str) -> str:
    """The shell command that ends in a tested set: the one of the installed torch if there is one, else the pinned."""
    torch = installed_version("torch")
    tested = TESTED.get(_minor(torch)) if torch is not None else None
    keep_torch, pins = tested is not None, tested or PINNED
    cuda = has_nvidia_driver() and (device == "cuda" or device == "auto" and not _torch_is_cpu_build())
    build, other = (CUDA, CPU) if cuda else (CPU, CUDA)
    # Both builds fill one folder, so taking one out breaks the other: out with both, then in again.
    remove = [name for name in (CPU, CUDA) if installed_version(name)] if installed_version(other) else []
    if cuda and _torch_is_cpu_build():  # pip takes 2.13.0+cpu for 2.13.0
        remove.append("torch")
        keep_torch = False
    add = [] if keep_torch else [f"torch=={pins['torch']}"]
    add += [requirement for name, requirement in TORCHREC_NEEDS.items() if not installed_version(name)]

    pip = f"{sys.executable} -m pip"
    steps = [f"{pip} uninstall -y {' '.join(remove)}"] if remove else []
    steps += [f"{pip} install {' '.join(add)}"] if add else []
    steps += [f"{pip} install --no-deps torchrec=={pins['torchrec']} {build}=={pins['fbgemm']}"]
    return " && ".join(steps)
