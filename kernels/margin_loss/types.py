"""Names of losses, and the dtypes that the Triton kernels take."""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["sigmoid", "hinge"]
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
