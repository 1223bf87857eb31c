"""The folder in which compiled kernels are kept: what is loaded from it is whole and this user's own."""

import ctypes
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Callable, Optional

DIGEST_BYTES = hashlib.sha256().digest_size
"""The last bytes of a kept library are the digest of those before them; the loader does not look there."""

_log = logging.getLogger(__name__)


def load(name: str, build: Callable[[Path], object]) -> ctypes.CDLL:
    """Loads the library `name` from the cache folder, where it is built first if it is not there, or not whole.

    Without a folder that only this user can write, the library is built for this process alone and leaves no file.

    Args:
        name: of the file; it tells everything that the library depends on.
        build: makes the library at a path.

    Raises:
        OSError: the library that was built cannot be loaded.
        Whatever `build` raises.
    """
    folder = own_folder()
    kept = None if folder is None else _load_kept(folder / name)
    return _build(name, build, folder) if kept is None else kept


def digest(text: str) -> str:
    """Shortens a text to a name that tells it from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_text(name: str) -> Optional[str]:
    """Reads a text that `keep_text` has kept; None where there is none of this user's own."""
    folder = own_folder()
    try:
        descriptor = -1 if folder is None else os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if descriptor < 0:
        return None
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read() if _is_own(os.fstat(descriptor), stat.S_ISREG) else None


def keep_text(name: str, text: str) -> None:
    """Keeps a short text beside the kernels, complete or not at all."""
    folder = own_folder()
    if folder is None:
        return
    try:
        with tempfile.TemporaryDirectory(prefix="fuxi_torchrec-", dir=folder) as scratch:
            aside = Path(scratch) / name
            aside.write_text(text, encoding="utf-8")
            aside.chmod(0o600)
            os.replace(aside, folder / name)
    except OSError as error:
        _log.info("%s could not be kept in %s (%s)", name, folder, error)


def _build(name: str, build: Callable[[Path], object], folder: Optional[Path]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="fuxi_torchrec-", dir=folder) as scratch:
        built = Path(scratch) / name
        build(built)
        library = ctypes.CDLL(str(built))  # mapped now: the file may go
        if folder is not None:
            _keep(built, folder / name)
    return library


def _keep(built: Path, target: Path) -> None:
    try:
        _sign(built)
        os.replace(built, target)  # complete or absent, however many processes build it at once
    except OSError as error:
        _log.warning("the CPU kernels could not be kept in %s (%s)", target.parent, error)


def _sign(path: Path) -> None:
    """Appends the digest and waits until the file is on the disk."""
    path.chmod(0o700)
    with open(path, "r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _load_kept(path: Path) -> Optional[ctypes.CDLL]:
    """The library at `path`; None where it is absent, somebody else's, or not what was once written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        content = file.read() if _is_own(os.fstat(descriptor), stat.S_ISREG) else b""
    digest = hashlib.sha256(content[:-DIGEST_BYTES]).digest()
    if len(content) <= DIGEST_BYTES or digest != content[-DIGEST_BYTES:]:
        _log.info("%s is not what was once written there: it is built again", path)
        return None
    return ctypes.CDLL(str(path))


def own_folder() -> Optional[Path]:
    """`fuxi_torchrec` in the user's cache folder, closed to others; None, with the reason as a warning, where there is none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuxi_torchrec"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700)
        if not _is_own(folder.stat(), stat.S_ISDIR):
            raise PermissionError(f"{folder} belongs to another user")
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: no $HOME, and a user whom the system does not know
        _log.warning("no folder to keep the CPU kernels in (%s): they are compiled for this process alone", error)
        return None


def _is_own(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether only this user can have written it."""
    return is_kind(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
