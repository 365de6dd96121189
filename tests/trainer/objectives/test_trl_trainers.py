"""Five AdamW steps of TRL's trainers and of ours on the same rows: losses and weights agree.

pip install trl==1.16.0
python -m pytest -m slow tests/trainer/objectives/test_trl_trainers.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data.pairs import tokenize_pairs

from tests.support.tiny_models import TOKENIZER, parameters_of, tiny_config, tiny_model, tiny_pairs

trl = pytest.importorskip("trl", minversion="1.16", reason="pip install trl==1.16.0")
losses = pytest.importorskip("tests.trainer.objectives.test_against_trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")

pytestmark = pytest.mark.slow

PAIRS = 8
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": PAIRS,
    "max_steps": 5,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


def rows() -> Dataset:
    """Of unequal lengths; each step takes them all, so their order does not matter."""
    return tokenize_pairs(tiny_pairs(PAIRS), TOKENIZER, tiny_config(Path("unused")))[0]


def some_text() -> Dataset:
    """A row for TRL's trainers to prepare, before the token ids take its place."""
    return Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}])


def ours(
    folder: Path, name: Any, given: dict[str, Any], data: Dataset | None = None, **models: Any
) -> tuple[list[float], torch.Tensor]:
    fields = {key: given.pop(key, None) for key in ("beta", "gamma_beta_ratio")}
    settings = SETTINGS | {"objective": name, **fields, "objective_args": given}
    trainer = PreferenceTrainer(
        tiny_model(),
        tiny_config(folder, **settings, head_tail="exact"),
        train_dataset=rows() if data is None else data,
        processing_class=TOKENIZER,
        **models,
    )
    return trained(trainer)


def theirs(
    kind: Any, config: Any, columns: Any, text: Dataset | None = None, **models: Any
) -> tuple[list[float], torch.Tensor]:
    data = [columns(row) for row in rows().to_list()]  # before: settings reset accelerate's state
    text = some_text() if text is None else text
    trainer = kind(
        tiny_model(), args=config, train_dataset=text, processing_class=TOKENIZER, **models
    )
    trainer.train_dataset = Dataset.from_list(data)
    return trained(trainer)


def trained(trainer: Any) -> tuple[list[float], torch.Tensor]:
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, parameters_of(trainer.model)


def compare(
    mine: tuple[list[float], torch.Tensor], other: tuple[list[float], torch.Tensor]
) -> None:
    assert mine[0] == pytest.approx(other[0], rel=1e-5, abs=1e-5)
    assert len(set(mine[0])) == SETTINGS["max_steps"]
    update = (other[1] - parameters_of(tiny_model())).norm()
    assert (mine[1] - other[1]).norm() < 1e-3 * update


@pytest.mark.parametrize(("given", "name", "own"), losses.DPO, ids=lambda v: str(v)[:60])
def test_dpo_trainer(tmp_path, given, name, own):
    config = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, **given, **SETTINGS)
    other = theirs(trl.DPOTrainer, config, lambda row: row, ref_model=copy.deepcopy(tiny_model()))
    beta = {} if name == "sft" else {"beta": 0.3}
    compare(ours(tmp_path, name, own | beta), other)


def cpo_row(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A pair of token ids in the columns that TRL's CPO collator reads."""
    prompt, columns = row["prompt_ids"], {}
    for side in ("chosen", "rejected"):
        completion = row[f"{side}_ids"]
        columns[f"{side}_input_ids"] = prompt + completion
        columns[f"{side}_attention_mask"] = [1] * len(prompt + completion)
        columns[f"{side}_labels"] = [-100] * len(prompt) + completion
    return columns | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


@pytest.mark.parametrize(("given", "name", "own"), losses.CPO, ids=lambda v: str(v)[:60])
def test_cpo_trainer(tmp_path, given, name, own):
    given = {"cpo_alpha": 1.3, "alpha": 0.0, "simpo_gamma": 0.35, "beta": 0.7} | given
    config = cpo.CPOConfig(output_dir=str(tmp_path / "trl"), **given, **SETTINGS)
    other = theirs(cpo.CPOTrainer, config, cpo_row)
    weight, of_cpo = given["cpo_alpha"], name.startswith("cpo")
    own = own | ({"nll": "tokens", "alpha" if of_cpo else "sft_weight": weight} if weight else {})
    own |= {} if of_cpo else {"gamma_beta_ratio": 0.5}
    compare(ours(tmp_path, name, own | {"beta": 0.7}), other)


def test_orpo_trainer(tmp_path):
    """Its likelihood counts the tokens of prompts too."""
    config = orpo.ORPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, **SETTINGS)
    other = theirs(orpo.ORPOTrainer, config, cpo_row)
    compare(ours(tmp_path, "orpo", {"alpha": 0.3, "nll": "prompt_and_answer"}), other)


def kto_rows(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pair as two examples, and for TRL's KL term each prompt with another's answer."""
    examples = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{side}_ids"], "label": good}
        for side, good in (("chosen", True), ("rejected", False))
        for row in data
    ]
    others = [examples[-1], *examples[:-1]]
    return [
        example | {"KL_completion_ids": other["completion_ids"]}
        for example, other in zip(examples, others, strict=True)
    ]


def test_kto_trainer_on_pairs(tmp_path):
    """Where no KL term is above 0: theirs is one, of mismatched pairs, ours one of either side.

    The frozen model is nearer to uniform than the one that trains, so every answer's log-ratio is
    far below 0.
    """
    settings = SETTINGS | {"per_device_train_batch_size": 2 * PAIRS}
    config = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, train_sampling_strategy="sequential", **settings
    )
    data = kto_rows(rows().to_list())
    trainer = trl.KTOTrainer(
        tiny_model(),
        ref_model=tiny_model(initializer_range=0.05),
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": "a b", "completion": " c d", "label": n % 2 == 0} for n in range(4)]
        ),
        processing_class=TOKENIZER,
    )
    trainer.train_dataset = Dataset.from_list(data)
    other = trained(trainer)
    assert all(entry["kl"] == 0 for entry in trainer.state.log_history if "kl" in entry)
    frozen = tiny_model(initializer_range=0.05)
    compare(ours(tmp_path, "kto", {"beta": 0.3}, ref_model=frozen), other)


KTO: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"loss_type": "kto"}, "kto", {"kl_estimate": "mismatched"}),
    (
        {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
        "kto",
        {"kl_estimate": "mismatched", "desirable_weight": 1.5, "undesirable_weight": 0.7},
    ),
    ({"loss_type": "apo_zero_unpaired"}, "apo-zero-unpaired", {}),
]


@pytest.mark.parametrize(("given", "name", "own"), KTO, ids=lambda v: str(v)[:60])
def test_kto_trainer(tmp_path, given, name, own):
    """Its rotation is that of a batch which has all rows, in their order, as ours has them."""
    answers = [row["chosen_ids" if i % 3 else "rejected_ids"] for i, row in enumerate(rows())]
    labels = [i % 3 > 0 for i in range(PAIRS)]
    number = iter(range(PAIRS))

    def columns(row: dict[str, list[int]]) -> dict[str, Any]:
        i = next(number)
        ids = {"prompt_ids": row["prompt_ids"], "completion_ids": answers[i], "label": labels[i]}
        return ids | ({} if name != "kto" else {"KL_completion_ids": answers[i - 1]})

    single = [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": answer, "rejected_ids": answer,
         "desirable": float(label)}
        for row, answer, label in zip(rows().to_list(), answers, labels, strict=True)
    ]  # fmt: skip
    config = trl.KTOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, **given, **SETTINGS)
    text = Dataset.from_list([{"prompt": "a b", "completion": " c d", "label": True}] * 2)
    reference = copy.deepcopy(tiny_model())
    other = theirs(trl.KTOTrainer, config, columns, text, ref_model=reference)
    compare(ours(tmp_path, name, own | {"beta": 0.3}, Dataset.from_list(single)), other)
