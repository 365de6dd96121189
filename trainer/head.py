"""`patch_head`, under the name that other trainers import; the code is in `model.head`."""

from .model.head import ScoredTokens, patch_head
from .model.trial import check_head

__all__ = ["ScoredTokens", "check_head", "patch_head"]
