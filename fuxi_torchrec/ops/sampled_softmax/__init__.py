"""The sampled softmax loss: dispatch, a plain reference, and the fast versions."""

from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax

__all__ = ["per_token_sampled_softmax", "shared_sampled_softmax"]
