"""MemGen: latent memory woven into any frozen decoder (arXiv 2509.24704)."""

from memgen.backbone import DecoderBackbone
from memgen.checkpoint import load_params, trained_params
from memgen.config import LoRAConfig, MemGenConfig, TriggerConfig, WeaverConfig
from memgen.decoding import begin, generate, make_request, observe, replay, respond
from memgen.delimiters import boundary_table, is_boundary
from memgen.insertion import Plan, plan_from_decisions, plan_insertions
from memgen.invocations import invocation_penalty
from memgen.lora import make_adapter
from memgen.losses import decision_log_probs, sft_loss, token_log_probs, trigger_loss
from memgen.model import MemGen
from memgen.nnx_layers import apply_lora, linear_layers, merge_lora
from memgen.response import Response
from memgen.trigger import (
    AlwaysInvoke,
    LearnedInvoke,
    NeverInvoke,
    RandomInvoke,
    Trigger,
    TriggerParam,
    TriggerPolicy,
)
from memgen.uncached import Uncached
from memgen.weaver import Snippets, Weaver, WeaverParam

__all__ = [
    "AlwaysInvoke",
    "DecoderBackbone",
    "LearnedInvoke",
    "LoRAConfig",
    "MemGen",
    "MemGenConfig",
    "NeverInvoke",
    "Plan",
    "RandomInvoke",
    "Response",
    "Snippets",
    "Trigger",
    "TriggerConfig",
    "TriggerParam",
    "TriggerPolicy",
    "Uncached",
    "Weaver",
    "WeaverConfig",
    "WeaverParam",
    "apply_lora",
    "begin",
    "boundary_table",
    "decision_log_probs",
    "generate",
    "invocation_penalty",
    "is_boundary",
    "linear_layers",
    "load_params",
    "make_adapter",
    "make_request",
    "merge_lora",
    "observe",
    "plan_from_decisions",
    "plan_insertions",
    "replay",
    "respond",
    "sft_loss",
    "token_log_probs",
    "trained_params",
    "trigger_loss",
]
