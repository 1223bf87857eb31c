"""Where the item table's rows lie: the choice, the plan, and the model under DistributedModelParallel."""

from fuxi_torchrec.sharding.model_parallel import build_distributed, distribute, is_sharded, local_parts

__all__ = ["build_distributed", "distribute", "is_sharded", "local_parts"]
