"""What other libraries say to a user who can do nothing about it."""

import logging
import os
import warnings

MESSAGES = (
    # DCP, at every save: of the ShardedTensors that TorchRec gives it.
    (r"Please use DTensor instead", FutureWarning),
    # The chunked softmax's products with the drawn candidates are sparse.
    (r"Sparse CSR tensor support is in beta state", UserWarning),
)
LOGGERS = (
    # TorchRec's planner, of what it does by design: no timeout, no GPU.
    "torchrec.distributed.planner",
    "torchrec.distributed.logger",
    # TorchRec asks is_fx_tracing() at every forward, and torch warns about the name once.
    "torch.fx._symbolic_trace",
)


def quiet() -> None:
    """Silences those messages, for the whole process: the command line alone may do that, before torch is imported."""
    for message, category in MESSAGES:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch's C++ side warns on every rank of a search for unused parameters that found none, as it should. Set this to
    # WARNING to see all.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
