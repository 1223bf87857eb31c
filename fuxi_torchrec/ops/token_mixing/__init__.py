"""Token mixing, y_c = A_c v: dispatch, a plain reference, and the fast versions."""

from fuxi_torchrec.ops.token_mixing.dispatch import MixingPlan, mix_by_plan, mix_tokens, plan_mixing

__all__ = ["MixingPlan", "mix_by_plan", "mix_tokens", "plan_mixing"]
