"""A checkpoint's .metadata without its pickle's powers: a run folder from somebody else must not run code here.

DCP stores the list of what it saved as a pickle, and a pickle may call anything. This reader knows the classes that DCP
itself puts there, each by its full name, and nothing else.
"""

import io
import pickle
from typing import Any, Union

import torch
from torch.distributed.checkpoint.metadata import Metadata

from fuxi_torchrec.distributed.private_api import MemoryFormatEncoding

KNOWN = {
    "torch": ("Size",),  # and every torch.dtype
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}


class UnknownClass(ValueError):
    """Raised where a pickle asks for something that no checkpoint holds."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in KNOWN.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise UnknownClass(f"{module}.{name} is no part of a checkpoint, and was not run")


def _memory_format(owner: Any, name: str) -> Any:
    """What some releases of Python 3.11 (Debian 12 has one, 3.11.2) write for a member of an enumeration: getattr of its class
    and its name."""
    if owner is not MemoryFormatEncoding or name not in MemoryFormatEncoding.__members__:
        raise UnknownClass(f"getattr of {name!r} is no part of a checkpoint, and was not run")
    return MemoryFormatEncoding[name]


def read_metadata(data: Union[bytes, memoryview]) -> Metadata:
    """Reads DCP's metadata from the bytes of a .metadata file.

    Raises UnknownClass for a pickle that asks for anything but DCP's own classes, before any of it is called, and
    ValueError for what is no metadata.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except UnknownClass:
        raise
    except Exception as error:  # whatever a wrong byte does to a pickle
        raise ValueError(f"not readable ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("not a list of tensors")
    return metadata
