"""The LM head's loss without logits: one line, `apply_patch(model)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hf_fused_head.version import __version__

if TYPE_CHECKING:
    from hf_fused_head.divergence.functional import (
        KLStats,
        linear_kl_div,
        linear_kl_div_with_stats,
    )
    from hf_fused_head.divergence.sparse import sparse_kl_div
    from hf_fused_head.functional import (
        LossStats,
        linear_cross_entropy,
        linear_cross_entropy_with_stats,
    )
    from hf_fused_head.log_probs import TokenLogProbs, token_log_probs
    from hf_fused_head.nn import LinearCrossEntropyLoss
    from hf_fused_head.patches import (
        UnsupportedModelError,
        apply_patch,
        last_stats,
        patch_report,
        patch_trainer,
        patched,
        remove_patch,
        supported_models,
    )
    from hf_fused_head.trainer import FusedHeadTrainer

# Imported at first use: transformers when a name needs it, and torch too, so that
# `hf-fused-head --help` starts at once.
_LAZY = {
    "FusedHeadTrainer": "hf_fused_head.trainer",
    "KLStats": "hf_fused_head.divergence.functional",
    "LinearCrossEntropyLoss": "hf_fused_head.nn",
    "LossStats": "hf_fused_head.functional",
    "TokenLogProbs": "hf_fused_head.log_probs",
    "UnsupportedModelError": "hf_fused_head.patches",
    "apply_patch": "hf_fused_head.patches",
    "last_stats": "hf_fused_head.patches",
    "linear_cross_entropy": "hf_fused_head.functional",
    "linear_cross_entropy_with_stats": "hf_fused_head.functional",
    "linear_kl_div": "hf_fused_head.divergence.functional",
    "linear_kl_div_with_stats": "hf_fused_head.divergence.functional",
    "patch_report": "hf_fused_head.patches",
    "patch_trainer": "hf_fused_head.patches",
    "patched": "hf_fused_head.patches",
    "remove_patch": "hf_fused_head.patches",
    "sparse_kl_div": "hf_fused_head.divergence.sparse",
    "supported_models": "hf_fused_head.patches",
    "token_log_probs": "hf_fused_head.log_probs",
}

__all__ = [
    "FusedHeadTrainer",
    "KLStats",
    "LinearCrossEntropyLoss",
    "LossStats",
    "TokenLogProbs",
    "UnsupportedModelError",
    "__version__",
    "apply_patch",
    "last_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "linear_kl_div",
    "linear_kl_div_with_stats",
    "patch_report",
    "patch_trainer",
    "patched",
    "remove_patch",
    "sparse_kl_div",
    "supported_models",
    "token_log_probs",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
