"""Token mixing, y_c = A_c v: dispatch, a plain reference, and the fast versions."""

from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens, prepare

__all__ = ["mix_tokens", "prepare"]
