"""An object store in a folder, as iopath's S3 handler behaves."""

import os

from iopath.common.file_io import PathHandler


class Bucket(PathHandler):
    """bucket://key: no folders, so a key's are made by themselves and one is named by its '/'; listing gives keys; no rename,
    no appending, no writing into an object, and none made only if it is not there."""

    def __init__(self, root):
        self.root = root

    def _get_supported_prefixes(self):
        return ["bucket://"]

    def _local(self, path):
        return os.path.join(self.root, path[len("bucket://") :])

    def _open(self, path, mode="r", buffering=-1, **more):
        assert set(mode) <= set("rwbt")
        if "w" in mode:
            os.makedirs(os.path.dirname(self._local(path)), exist_ok=True)
        return open(self._local(path), mode)

    def _exists(self, path, **more):
        return os.path.isfile(self._local(path))

    def _isfile(self, path, **more):
        return self._exists(path)

    def _isdir(self, path, **more):
        return path.endswith("/") and bool(self._ls(path))

    def _ls(self, path, **more):
        assert path.endswith("/")
        folder, prefix = self._local(path), path[len("bucket://") :]
        names = os.listdir(folder) if os.path.isdir(folder) else []
        files = [prefix + name for name in names if os.path.isfile(os.path.join(folder, name))]
        return files + [f"{prefix}{name}/" for name in names if self._holds_any(os.path.join(folder, name))]

    def _holds_any(self, folder):
        return any(files for _, _, files in os.walk(folder))

    def _rm(self, path, **more):
        os.remove(self._local(path))
