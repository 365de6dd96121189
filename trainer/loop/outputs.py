"""`OutputTrainer`: the trained model, the merged one, the model card, and the hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..checkpoint.card import write_model_card
from ..checkpoint.hub import hub_refusals
from ..model.merging import export_merged
from ..monitor.run_record import describe_run

if TYPE_CHECKING:
    from ..batching.pipeline import PairPipeline
    from ..objectives import Objective


class OutputTrainer(Trainer):
    """Writes the trained model and its card.

    Attributes:
        run_record: the content of ``run.json``, if there is one.
    """

    objective: Objective
    pipeline: PairPipeline
    run_record: dict[str, Any] | None = None
    _merges_files: bool

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', and with ``merge_adapter`` the merged model beside what it writes."""
        super().save_model(output_dir, _internal_call)
        args: Any = self.args
        if args.merge_adapter and args.should_save and not _internal_call:
            self.save_merged(Path(output_dir or args.output_dir))

    def save_merged(self, folder: Path) -> Path:
        """The model with the adapter saved in ``folder`` merged in; where it was written."""
        args: Any = self.args
        base = None if self._merges_files else self.model
        export_merged(args, folder, folder / "merged", base)
        return folder / "merged"

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', from the run's settings, data, results and versions."""
        if not self.is_world_process_zero():
            return
        settings: Any = self.args
        data = {name: asdict(report) for name, report in self.pipeline.reports.items()}
        record = self.run_record or describe_run(settings, self.objective, data)
        names = ("language", "license", "tags", "model_name", "finetuned_from")
        given = dict(zip(names, args, strict=False)) | kwargs
        write_model_card(self, self.objective, record, **given)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with hub_refusals("push_to_hub: the repository cannot be made; or set push_to_hub: false"):
            super().init_hf_repo(*args, **kwargs)
