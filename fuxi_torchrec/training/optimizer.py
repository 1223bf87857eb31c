"""The optimizers of a run: AdamW for dense parameters, beside fused ones of sharded tables."""

from typing import Optional

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from fuxi_torchrec.config import OptimizerConfig
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import AGAINST_DIVERGENCE, UserError
from fuxi_torchrec.sharding.model_parallel import local_parts


def build_optimizer(
    model: DistributedModelParallel, config: OptimizerConfig, table_rate_ratio: float = 1.0
) -> CombinedOptimizer:
    """Builds the run's optimizers: AdamW on all dense parameters, beside whatever optimizers run inside backward for
    sharded tables.

    Args:
        table_rate_ratio: learning rate of a sharded table over that of the dense parameters.
    """
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        ),
    )
    for groups, ratio in ((model.fused_optimizer.param_groups, table_rate_ratio), (dense.param_groups, 1.0)):
        for group in groups:
            group["rate_ratio"] = ratio
    return CombinedOptimizer([model.fused_optimizer, dense])


def prepare_step(optimizer: CombinedOptimizer, learning_rate: float) -> None:
    """Sets the step's learning rate and clears gradients. It must come before *forward*: zero_grad() is where a sharded
    table's optimizer hands its rate to fbgemm, whose lookup takes the rate along to backward."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_ratio"]
    optimizer.zero_grad()


def clip_gradients(model: DistributedModelParallel, max_norm: Optional[float]) -> None:
    """Scales the dense parameters' gradients down to a norm of at most max_norm; None leaves them as they are."""
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def check_parameters(model: DistributedModelParallel, world: World, step: int) -> None:
    """Checks that the model's parameters are finite. Raises UserError, on all ranks, where any is not."""
    dense = in_backward_optimizer_filter(model.named_parameters())
    parts = [*(parameter for _, parameter in dense), *(part for _, _, part in local_parts(model))]
    # min and max tell it in one pass without a tensor of the table's size.
    extremes = [x for part in parts if part.numel() for x in torch.aminmax(part.detach())]
    broken = 1.0 - torch.isfinite(torch.stack(extremes)).all().double()
    if world.max(broken[None]).item():
        raise UserError(
            f"step {step}: the model's parameters are not finite, and not saved; "
            f"{AGAINST_DIVERGENCE}, and go on from the last checkpoint"
        )
