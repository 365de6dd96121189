"""The plain Trainer with the head: the same steps as without it."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from widemargin.integrations.transformers import CompletionCollator, patch_head, token_nll
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs
from tests.support.two_ranks import launch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8")


def rows(count: int = 12) -> Dataset:
    """Answers after their prompts; the third row's labels are all masked."""
    found = []
    for i, pair in enumerate(tiny_pairs(count).to_list()):
        prompt, answer = (TOKENIZER(pair[k]).input_ids for k in ("prompt", "rejected"))
        labels = [-100] * len(prompt) + ([-100] * len(answer) if i == 2 else answer)
        ids = prompt + answer
        columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        found.append(columns | {"text": pair["prompt"]})  # which the Trainer leaves out
    return Dataset.from_list(found)


def steps(folder: Path, *, patched: bool, batch: int = 1) -> list[dict[str, float]]:
    """Logs of six optimizer steps and an evaluation."""
    model = tiny_model(vocab_size=700)
    collator: Any = DataCollatorForSeq2Seq(TOKENIZER)
    ours: dict[str, Any] = {}
    if patched:
        patch_head(model)
        collator, ours = CompletionCollator(collator), {"compute_loss_func": token_nll}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=2,
        max_steps=6, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, prediction_loss_only=True, seed=1,
        learning_rate=1e-3, per_device_eval_batch_size=4,
    )  # fmt: skip
    data = rows()
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collator, **ours
    )
    trainer.train()
    kept = ("loss", "grad_norm", "eval_loss")
    logs = [*trainer.state.log_history, trainer.evaluate()]
    return [{k: v for k, v in log.items() if k in kept} for log in logs if {*kept} & {*log}]


def test_steps_are_those_of_the_plain_trainer(tmp_path):
    plain = steps(tmp_path, patched=False)
    ours = steps(tmp_path, patched=True)
    assert len(plain) == 7
    assert all(log["grad_norm"] > 0 for log in ours[:6])
    for mine, expected in zip(ours, plain, strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)


@pytest.mark.costly
def test_two_ranks_equal_one(tmp_path):
    one = steps(tmp_path, patched=True, batch=2)
    code = (
        "import json, os, pathlib, sys\n"
        "from tests.integrations.test_transformers import steps\n"
        "logs = steps(pathlib.Path('out'), patched=True)\n"
        "if os.environ['RANK'] == '0': pathlib.Path('logs.json').write_text(json.dumps(logs))\n"
    )
    (tmp_path / "two.py").write_text(code)
    done = launch(tmp_path, "two.py")
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "logs.json").read_text())
    for mine, expected in zip(two[:6], one[:6], strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_labelled_tokens():
    model = tiny_model()
    patch_head(model)
    batch = CompletionCollator(DataCollatorForSeq2Seq(TOKENIZER))(
        [rows().remove_columns("text")[2]]
    )
    assert len(batch["targets"]) == 0
    labels = batch.pop("labels")
    loss = token_nll(model(**batch), labels, torch.tensor(7))
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match=r"give CompletionCollator one that makes labels"):
        CompletionCollator(lambda rows: {"input_ids": torch.zeros(1, 3)})([])
    model = tiny_model()
    batch = CompletionCollator(DataCollatorForSeq2Seq(TOKENIZER))(
        [rows().remove_columns("text")[0]]
    )
    labels = batch["labels"]
    outputs = model(input_ids=batch["input_ids"])
    with pytest.raises(UserError, match=r"call patch_head\(model\) before the Trainer"):
        token_nll(outputs, labels, 3)


def test_the_auxiliary_loss_of_experts_is_not_left_out():
    model = tiny_model("mixtral", output_router_logits=True)
    with pytest.raises(UserError, match="set output_router_logits to false"):
        patch_head(model)
    model.config.output_router_logits = False
    patch_head(model)


@pytest.mark.costly
@pytest.mark.parametrize("library", ["trl", "transformers"])
def test_the_pages_example_runs(library, tmp_path, monkeypatch):
    if library == "trl":
        trl = pytest.importorskip("trl")
        on_a_cpu = partial(trl.DPOConfig, use_cpu=True, bf16=False)
        monkeypatch.setattr(trl, "DPOConfig", on_a_cpu)
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    code = re.search(rf"^```python\n(from {library} .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert code is not None
    model = type(tiny_model()).from_pretrained("model")
    given = {"model": model, "tokenizer": TOKENIZER, "pairs": tiny_pairs(4), "rows": rows(4)}
    scope: dict[str, Any] = dict(given)
    exec(code[1], scope)
    assert scope["trainer"].state.global_step > 0
