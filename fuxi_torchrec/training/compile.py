"""torch.compile of an encoder's blocks: one block's code for all of them and for every number of tokens.

What mixes the rows of a user (a block's `mix` or `mix_channels`, which `torch.compiler.disable` marks) stays out of it: its
loops follow the lengths of the batch, and it has kernels of its own. What is compiled is row by row: norms, gates, dropout
and products.
"""

import os
import shutil

import torch

from fuxi_torchrec.encoders.base import SequenceEncoder
from fuxi_torchrec.errors import UserError, one_line

BACKEND = "inductor"


def check_compiler(device_type: str) -> None:
    """Compiles a line, to see whether that works. Raises UserError where it fails: no C++ compiler for a CPU, no
    Triton for a GPU, ….

    Takes some seconds the first time, and little once torch's cache is filled.
    """
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:  # asked here since the line below may be in the cache
            raise UserError(
                f"trainer.compile: there is no C++ compiler {compiler!r}; install g++ or name another one in CXX, or set "
                "trainer.compile to false"
            )
    try:
        torch.compile(_line, dynamic=True)(torch.ones(3, device=device_type))
    except Exception as error:  # whatever a tool chain can do
        raise UserError(
            f"trainer.compile: torch.compile fails here ({one_line(error)}); set trainer.compile to false"
        ) from None


def _line(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1


def compile_blocks(encoder: SequenceEncoder) -> None:
    """Compiles the blocks, in place and when training first runs them; parameters and their names stay as they are."""
    # Inductor of torch 2.13 can repeat a CUDA dropout mask four times over (pytorch issue 198333): PyTorch draws there.
    is_cuda = encoder.position_embedding_ND.device.type == "cuda"
    options = {"fallback_random": True} if is_cuda else None
    for block in encoder.blocks:
        block.compile(dynamic=True, backend=BACKEND, options=options)
    encoder.is_compiled = True
