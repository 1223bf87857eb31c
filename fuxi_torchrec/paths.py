"""Every path the user names goes through iopath, so that a bucket or an address works where a folder does."""

from functools import cache


@cache
def path_manager():
    """The process's `iopath` PathManager: local files, http(s) downloads, and S3 where boto3 is installed."""
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


def join(folder: str, *names: str) -> str:
    """Joins with '/', which is right for local paths and for addresses with a scheme."""
    return "/".join([folder.rstrip("/"), *names])
