"""What is mounted into a job's container, and whether a path inside it lies there: all seen from outside."""

import posixpath
import re
from typing import Dict, List, Optional, Union

from torchx.specs import BindMount, DeviceMount, VolumeMount, parse_mounts

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import is_address

SHARED_MEMORY = "/dev/shm"  # TorchX mounts it into every pod
Mount = Union[BindMount, VolumeMount, DeviceMount]


def read_mounts(words: Optional[List[str]]) -> List[Mount]:
    """Reads --mounts, each folder in its normal form. Raises UserError for a mount that no container can have."""
    for word in words or []:
        key, _, value = word.partition("=")
        if key in ("readonly", "read_only") and value:
            raise UserError(f"--mounts: {word}: write readonly alone, or leave it out")
    try:
        mounts: List[Mount] = parse_mounts(words or [])
    except KeyError as error:
        text = str(error.args[0])
        raise _no_mount(f"{text} is missing" if text in ("src", "dst") else text) from None
    except ValueError as error:
        raise _no_mount(str(error)) from None
    seen: List[str] = []
    for mount in mounts:
        mount.dst_path = _normal_folder(mount.dst_path, "dst")
        _check_source(mount)
        if mount.dst_path == SHARED_MEMORY:
            raise UserError(f"--mounts: {mount.dst_path}: TorchX mounts it by itself; leave this mount out")
        if mount.dst_path in seen:
            raise UserError(f"--mounts: {mount.dst_path}: it is mounted twice; leave one of the mounts out")
        seen.append(mount.dst_path)
    return mounts


def folders(mounts: List[Mount]) -> Dict[str, bool]:
    """Maps each folder that a mount puts into the container to whether it can be written."""
    return {
        mount.dst_path: not mount.read_only for mount in mounts if isinstance(mount, (BindMount, VolumeMount))
    }


def path_inside(option: str, path: Optional[str], mounted: Dict[str, bool], example: str = "runs/mine") -> str:
    """Returns a path inside the container in its normal form; addresses stay as they are. Raises UserError for a
    relative one: from here nobody knows to which folder of the image.

    Args:
        option: that names the path, for the message.
        path: None or empty where none was given.
        mounted: as from `folders`.
        example: what a message suggests below the first mount.
    """
    first = next(iter(mounted), "/data")
    if not path:
        raise UserError(f"{option}: name a full path inside the image, on something mounted there, as in {first}/{example}")
    if is_address(path):
        return path
    if not path.startswith("/"):
        there = f"{first}/{posixpath.basename(normal(path))}"
        raise UserError(f"{option}: {path}: inside an image paths are full ones; write it as in {there}")
    return normal(path)


def output_inside(option: str, path: Optional[str], mounted: Dict[str, bool], example: str = "runs/mine") -> str:
    """Does as `path_inside` for what the job writes. Raises UserError also where it would be lost with the container, or
    cannot be written."""
    path = path_inside(option, path, mounted, example)
    if is_address(path):
        return path
    folder = on_mount(option, path, mounted)
    if not mounted[folder]:
        raise UserError(f"{option}: {path}: {folder} is mounted readonly; leave readonly out of --mounts, or name another")
    return path


def on_mount(option: str, path: str, mounted: Dict[str, bool]) -> str:
    """Names the mount that a normal path lies on: the innermost one. Raises UserError where it lies on none."""
    around = [folder for folder in mounted if f"{path}/".startswith(f"{folder}/")]
    if not around:
        lies = ", ".join(mounted) or "nothing"
        raise UserError(f"{option}: {path} would be lost with the container: mounted into it is {lies}; see --mounts")
    return max(around, key=len)


def normal(path: str) -> str:
    """Writes an absolute path without '//', '.' and '..'."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _normal_folder(folder: str, key: str) -> str:
    if not folder.startswith("/"):
        raise UserError(f"--mounts: {key}={folder}: name a full path, as in {key}=/data")
    if ".." in folder.split("/") or ":" in folder:
        raise UserError(f"--mounts: {key}={folder}: write the folder without '..' and ':'")
    if normal(folder) == "/":
        raise UserError(f"--mounts: {key}={folder} would hide the whole image; name a folder, as in {key}=/data")
    return normal(folder)


def _check_source(mount: Mount) -> None:
    if isinstance(mount, VolumeMount):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", mount.src):
            raise _no_mount(f"src={mount.src} is no name of a volume")
    elif not mount.src_path.startswith("/"):
        raise UserError(f"--mounts: src={mount.src_path}: name a full path of the host")


def _no_mount(why: str) -> UserError:
    return UserError(f"--mounts: {why}; write type=volume,src=CLAIM,dst=/data or type=bind,src=/host,dst=/data")
