"""From settings, or a raw data set, to tokenized pairs and the report of what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from ..settings.data import DataSettings
from . import chat
from .assembling import assemble
from .mixing import Part, checked_columns, gather
from .report import DataReport, SplitReport
from .sources import WHOLE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass
class PairData:
    """Pairs with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``pair_id``, the row number.

    A split that the settings do not name is None.
    """

    train: Dataset | None
    evaluation: Dataset | None
    report: DataReport


def load_pairs(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PairData:
    """Load, mix, tokenize and check the data sets that ``settings`` names.

    ``vocab_size`` is the model's (rows of its embedding); a token id past it is an error. A
    ``chat_template`` in the settings becomes the tokenizer's, so that it is saved with the model.
    """
    settings.check()
    report = DataReport()
    parts = gather(settings, report.notes)
    if not any(parts):
        raise UserError(
            "no data: set dataset: (or dataset_mixer:) to a file, a folder or a hub name, "
            "and dataset_splits: to the splits to use"
        )
    _use_chat_template(settings, tokenizer)
    report.notes += _tokenizer_notes(tokenizer, settings)

    def build(parts: list[Part], training: bool) -> tuple[Dataset | None, SplitReport | None]:
        if not parts:
            return None, None
        return assemble(
            parts,
            tokenizer,
            settings,
            training=training,
            shuffle=settings.shuffle,
            vocab_size=vocab_size,
        )

    train, report.train = build(parts[0], True)
    evaluation, report.evaluation = build(parts[1], False)
    return PairData(train, evaluation, report)


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings | None = None,
    *,
    training: bool = True,
    vocab_size: int | None = None,
    name: str = "train_dataset",
) -> tuple[Dataset, SplitReport]:
    """The pairs of a raw (or tokenized) data set, in its own order, and their report.

    ``training`` says which of the settings apply: ``flip`` and ``max_train_samples``, or
    ``max_eval_samples``. ``name`` is what messages call the data set.
    """
    settings = settings or DataSettings()
    settings.check()
    _use_chat_template(settings, tokenizer)
    part = Part(name, WHOLE, checked_columns(name, dataset), len(dataset))
    return assemble(
        [part], tokenizer, settings, training=training, shuffle=False, vocab_size=vocab_size
    )


def _use_chat_template(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    if settings.chat_template is not None:
        tokenizer.chat_template = chat.read_chat_template(settings.chat_template)


def _tokenizer_notes(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[str]:
    """What is unusual about the tokenizer's template and worth a look."""
    if not tokenizer.chat_template:
        return []
    notes = []
    if chat.plain_text_prefix(tokenizer) and not chat.template_writes_bos(tokenizer):
        notes.append(
            "the tokenizer puts BOS before plain text but the chat template writes none, so "
            "conversations have none; put {{ bos_token }} at the start of chat_template: to have it"
        )
    if chat.end_of_turn_id(tokenizer) is None:
        notes.append(
            "the chat template writes no special token after an answer, so answers are learnt "
            "without an end; give chat_template: one that does"
        )
    return notes + _rendering_notes(tokenizer, settings)


def _rendering_notes(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[str]:
    """What the settings of rendering do that their names do not tell."""
    notes = []
    if settings.auto_insert_empty_system_msg and not chat.takes_empty_system(tokenizer):
        why = "refuses system messages" if chat.mentions_system(tokenizer) else "mentions none"
        notes.append(f"auto_insert_empty_system_msg does nothing: the chat template {why}")
    if settings.chat_rendering == "separate":
        preamble = chat.answer_preamble(tokenizer)
        if isinstance(preamble, str) and preamble:
            notes.append(
                f"chat_rendering: separate puts {preamble!r} at the start of each answer, which is "
                "scored on it, as in the published runs; chat_rendering: joint does not"
            )
    return notes
