"""Whether a run's evaluation data are those that its settings need."""

from __future__ import annotations

from ..errors import UserError
from .checks import check_metric
from .config import PreferenceConfig
from .names import METRICS


def check_evaluation(config: PreferenceConfig, evaluation: object) -> None:
    """Raise ``UserError`` where the settings ask for evaluations that the data do not allow.

    Args:
        evaluation: the evaluation data set, several by name, or None.
    """
    several = isinstance(evaluation, dict)
    missing = evaluation is None or (several and not evaluation)
    for name in ("eval_strategy", "eval_on_start"):
        if missing and getattr(config, name) not in ("no", False):
            raise UserError(
                f"{name}: there is no evaluation data; give some (a test split, eval_dataset) or "
                f"set {name}: {'no' if name == 'eval_strategy' else 'false'}"
            )
    if several and config.eval_samples:
        raise UserError(
            "eval_samples: answers are to the prompts of one evaluation set, and eval_dataset has "
            "several; give one, or set eval_samples: 0"
        )
    best = config.metric_for_best_model
    if best is not None:
        sets = [f"{name}_" for name in evaluation] if several else [""]
        check_metric(best, [f"{prefix}{metric}" for prefix in sets for metric in METRICS])
