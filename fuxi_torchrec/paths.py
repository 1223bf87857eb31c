"""Every path the user names goes through iopath, so that a bucket or an address works where a folder does."""

import os
from functools import cache
from typing import TYPE_CHECKING, List

if TYPE_CHECKING:
    from iopath.common.file_io import PathManager


@cache
def path_manager() -> "PathManager":
    """Returns the process's `iopath` PathManager: local files, http(s) downloads, and S3 where boto3 is installed."""
    from iopath.common.file_io import HTTPURLHandler, PathManager

    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    try:
        import boto3  # noqa: F401
        from iopath.common.s3 import S3PathHandler
    except ImportError:
        pass
    else:
        manager.register_handler(S3PathHandler())
    return manager


def is_address(path: str) -> bool:
    """Tells whether a path names a bucket or another address, by its scheme."""
    return "://" in path


def absolute(path: str) -> str:
    """Makes a local path absolute; addresses stay as they are."""
    return path if is_address(path) else os.path.abspath(path)


def join(folder: str, *names: str) -> str:
    """Joins names to a folder with '/', which is right for local paths and for addresses with a scheme."""
    return "/".join([folder.rstrip("/"), *names])


def make_folder(folder: str) -> None:
    """Makes a folder and those above it; a bucket has none to be made."""
    if not is_address(folder):
        os.makedirs(folder, exist_ok=True)


def names_in(folder: str) -> List[str]:
    """Lists the names in a folder, in any order; none where there is no such folder."""
    if not is_address(folder):
        try:
            return os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):  # and no other: a disk that fails for a moment is not empty
            return []
    place = join(folder, "")  # iopath's S3 takes a folder by its '/', and answers with whole keys
    keys = path_manager().ls(place)
    return [key.rstrip("/").rpartition("/")[2] for key in keys if not (key.endswith("/") and place.endswith(key))]
