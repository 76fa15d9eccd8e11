"""Adapters that put the fused head into Hugging Face models.

The folder installs as `hf_fused_head.patches`.
"""

if __name__ != "hf_fused_head.patches":
    raise ImportError(
        f"this folder must be imported as `hf_fused_head.patches`, got {__name__!r}: a second copy "
        "would patch with classes that the first does not know; run `pip install -e .`"
    )

from .adapter import apply_patch, last_stats, patched, remove_patch
from .errors import UnsupportedModelError
from .report import PatchReport, patch_report, require_fused
from .support import SupportRow, supported_models
from .trainers import patch_trainer

__all__ = [
    "PatchReport",
    "SupportRow",
    "UnsupportedModelError",
    "apply_patch",
    "last_stats",
    "patch_report",
    "patch_trainer",
    "patched",
    "remove_patch",
    "require_fused",
    "supported_models",
]
