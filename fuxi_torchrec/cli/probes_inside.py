"""What `fuxi-torchrec doctor` asks in children of its own: each function answers with what JSON can hold."""

import logging
import os
from typing import List

from fuxi_torchrec.files import JsonObject


def torch_inside() -> JsonObject:
    """Imports torch, and tells what it was built with and sees."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}")
    has_nccl = torch.version.cuda is not None and torch.distributed.is_nccl_available()
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "gpus": gpus if torch.cuda.is_available() else [],
    }


def torchrec_inside() -> JsonObject:
    """Imports torchrec as training does, and looks for an operator of fbgemm's."""
    import torch
    import torchrec
    from torchrec.distributed import model_parallel as _  # noqa: F401 (what training needs of it)

    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(1, dtype=torch.int64))
    return {"torchrec": torchrec.__version__}


def kernels_inside() -> JsonObject:
    """Loads the CPU kernels, and tells what was said meanwhile."""
    said: List[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fuxi_torchrec").addHandler(handler)
    from fuxi_torchrec.ops.kernel_choice import kept_ratios, losing
    from fuxi_torchrec.ops.native import cache, library

    loaded, folder = library.library() is not None, cache.own_folder()
    return {
        "loaded": loaded,
        "switched_off": os.environ.get(library.SWITCH) == "0",
        "fixed_by": os.environ.get(library.SWITCH),
        "measured": [[ratios, losing(ratios)] for ratios in kept_ratios()],
        "compiler": library.find_compiler(),
        "flags": library.compile_flags(),
        "folder": None if folder is None else str(folder),
        "kept": 0 if folder is None else len(list(folder.glob("kernels-*.so"))),
        "said": "; ".join(dict.fromkeys(said)),
    }
