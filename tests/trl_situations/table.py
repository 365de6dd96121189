"""All situations, by name."""

from __future__ import annotations

from tests.trl_situations import cpo_orpo, dpo, kto

TABLE = [*dpo.TABLE, *cpo_orpo.TABLE, *kto.TABLE]
