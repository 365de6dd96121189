"""`OutputTrainer`: the trained model, the merged one, the model card, and the hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..checkpoint.card import write_model_card
from ..checkpoint.hub import hub_refusals, push_checkpoint, upload
from ..model.adapters import bare_model, name_base
from ..model.folder import (
    MERGED,
    check_base_stays,
    copy_processor,
    with_generation_config,
    writing_model,
)
from ..model.merging import export_merged
from ..monitor.run_record import describe_run
from .arguments import check_deepspeed, check_saves_whole

if TYPE_CHECKING:
    from ..batching.pipeline import PairPipeline
    from ..objectives import Objective


class OutputTrainer(Trainer):
    """Writes the trained model and its card, and reads a model's weights again.

    Attributes:
        run_record: the content of ``run.json``, if there is one.
        engine_notes: what is worth saying of DeepSpeed's own file.
    """

    objective: Objective
    pipeline: PairPipeline
    run_record: dict[str, Any] | None = None
    _merges_files: bool
    _merged: Path | None = None
    _loading: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = bare_model(kwargs["model"])
        if hasattr(kwargs["model"], "peft_config"):
            check_base_stays(model.name_or_path, Path(kwargs["args"].output_dir), "output_dir")
        config = model.config
        self._use_cache = vars(config).get("use_cache")  # which transformers changes for training
        super().__init__(*args, **kwargs)
        check_saves_whole(self.accelerator.state)
        self.engine_notes = check_deepspeed(self.accelerator.state, self.args)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """With the weights that evaluations see; schedule-free optimizers train on others."""
        change_over: Any = getattr(self.optimizer, "eval", None)
        if callable(change_over):
            change_over()
        return super()._finalize_training(*args, **kwargs)

    def saves_use_cache(self, value: bool) -> None:
        """Save the model's config with this ``use_cache`` in place of the one it came with."""
        self._use_cache = value

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers'; with ``merge_adapter`` it also writes the merged model."""
        super().save_model(output_dir, _internal_call)
        args: Any = self.args
        if args.merge_adapter and args.should_save and not _internal_call:
            self.save_merged(Path(output_dir or args.output_dir))

    def save_merged(self, folder: Path) -> Path:
        """The model with the adapter saved in ``folder`` merged in; where it was written."""
        args: Any = self.args
        export_merged(args, folder, folder / MERGED, self.model, from_files=self._merges_files)
        self._merged = folder / MERGED
        return self._merged

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers', in place of any model that the folder holds."""
        args: Any = self.args
        if not args.should_save:
            super()._save(output_dir, state_dict)  # to take part in what gathers the weights
            return
        self._restore_use_cache()
        folder = Path(output_dir or args.output_dir)
        with writing_model(folder, keep_merged=self._merged == folder / MERGED) as written:
            with with_generation_config(self._lm, written):
                super()._save(str(written), state_dict)
            config, source = self._lm.config, self._lm.name_or_path
            revision = args.model_revision if source == args.model_name_or_path else "main"
            if (written / "adapter_config.json").is_file():
                name_base(written, revision)
            if self.pipeline.images is not None and not source:
                self.pipeline.images.processor.save_pretrained(written)
            else:
                copy_processor(config, source, revision, written)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loading = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loading = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load what transformers saves under the names of a family's first files.

        Image-text models and mixtures of experts are among them. By itself it would take none of
        these weights when it goes on from such a checkpoint.
        """
        if not load_result.unexpected_keys or self._loading is None:
            super()._issue_warnings_after_load(load_result)
            return
        model: Any = self.model
        saved = type(model).from_pretrained(
            self._loading, dtype=model.dtype, use_safetensors=True, local_files_only=True
        )
        model.load_state_dict(saved.state_dict())

    @property
    def _lm(self) -> Any:
        return bare_model(self.accelerator.unwrap_model(self.model))

    def _restore_use_cache(self) -> None:
        """In the config to save; the head's calls ask for no cache themselves."""
        config = self._lm.config
        if self._use_cache is not None:
            config.use_cache = self._use_cache
        else:
            vars(config).pop("use_cache", None)

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
        advice = "log in with hf auth login, or set it to false; the repository cannot be made"
        with hub_refusals(f"push_to_hub: {advice}"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """As transformers', of what `checkpoint.hub` shares; ``card`` is for the model card."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = str(self.args.hub_model_id or self.args.output_dir)
        self.create_model_card(**{"model_name": Path(name).name} | card)
        self._finish_current_push()
        given = {"token": token, "revision": revision}
        options: Any = {key: value for key, value in given.items() if value is not None}
        return upload(self, str(commit_message), blocking=blocking, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            push_checkpoint(self, Path(checkpoint_folder))
