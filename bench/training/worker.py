"""One contender of `bench.training` in a process of its own, which takes a step when told to.

`python -m bench.training.worker SPEC.json` builds the trainer and then, for every line that comes
in, takes one optimizer step and answers with a line of JSON; the line "stop" ends it early. Peak
memory is the process's own.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

Spec = dict[str, Any]
MIB = 2**20


class Turns(TrainerCallback):
    """Holds training between steps until a line comes in; a turn includes fetching its batch."""

    def __init__(self, answers: Any, cuda: bool) -> None:
        self.answers, self.cuda = answers, cuda
        self.begin = 0.0
        self.tokens = self.tokens_before = 0

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A decoder's pre-forward hook: tokens computed, padding included."""
        ids = kwargs.get("input_ids")
        self.tokens += (args[0] if ids is None else ids).numel()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens = 0  # without those of checks made while the trainer was built
        self.answer(ready=True, peak_mib=self.peak_mib())
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - self.begin)
        self.answer(step=state.global_step, ms=ms, tokens=self.tokens - self.tokens_before)
        if state.global_step < state.max_steps:
            self.wait(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.answer(losses=losses, peak_mib=self.peak_mib(), tokens=self.tokens)

    def wait(self, control: Any) -> None:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("the benchmark that asked for steps is gone")
        control.should_training_stop = line.strip() == "stop"
        self.tokens_before = self.tokens
        self.begin = time.perf_counter()

    def answer(self, **facts: Any) -> None:
        self.answers.write(json.dumps(facts) + "\n")
        self.answers.flush()

    def peak_mib(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / MIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(spec: Spec) -> Any:
    """The model, its weights from a folder, or random ones of a config's shape."""
    dtype = getattr(torch, spec["dtype"])
    attention = spec["attention"]
    if spec["model"]:
        model = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=dtype, attn_implementation=attention
        )
        return model.to(spec["device"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(**spec["shape"])
    with torch.device(spec["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def load_tokenizer(spec: Spec) -> Any:
    """The model's; for random weights, which come without one, a tokenizer that knows a few words.

    The benchmark's rows are token ids already: trainers only ask it for its padding token.
    """
    if spec["model"]:
        return AutoTokenizer.from_pretrained(spec["model"])
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *"abcdef"))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def adapter(spec: Spec) -> dict[str, Any]:
    """The argument for a trainer that adds an adapter, if the benchmark asks for one."""
    if not spec["lora"]:
        return {}
    peft = importlib.import_module("peft")
    settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    return {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **settings)}


def common_arguments(spec: Spec) -> dict[str, Any]:
    """What every trainer is told alike."""
    cpu = spec["device"] == "cpu"
    return {
        "output_dir": spec["output_dir"],
        "per_device_train_batch_size": spec["pairs"],
        "gradient_accumulation_steps": spec["accumulation"],
        "max_steps": spec["steps"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": spec["optimizer"],
        "max_grad_norm": 1.0,
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": spec["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": cpu,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not cpu,
        "seed": 0,
    }


def ours(spec: Spec, model: Any, rows: list[dict[str, list[int]]], tokenizer: Any) -> Any:
    """`PreferenceTrainer` with the contender's settings; it draws the order by its own seed."""
    from widemargin.trainer import PreferenceConfig, PreferenceTrainer

    arguments = common_arguments(spec)
    if not spec["checkpointing"]:
        del arguments["gradient_checkpointing_kwargs"]
    dpo = spec["objective"] == "dpo"
    reference = {"ref_model": load(spec)} if dpo and not spec["lora"] else {}
    margin = {} if dpo else {"gamma_beta_ratio": spec["gamma_beta_ratio"]}
    config = PreferenceConfig(
        **arguments,
        objective=spec["objective"],
        beta=spec["beta"],
        max_length=spec["max_length"],
        max_prompt_length=None,
        **margin,
        **spec["settings"],
    )
    data = Dataset.from_list(rows)
    return PreferenceTrainer(
        model, config, train_dataset=data, processing_class=tokenizer, **reference, **adapter(spec)
    )


def trl_cpo(spec: Spec, model: Any, rows: list[dict[str, list[int]]], tokenizer: Any) -> Any:
    """TRL's SimPO: `CPOTrainer` without its NLL term, on the same token ids in the same order."""
    trl = importlib.import_module("trl.experimental.cpo")
    config = trl.CPOConfig(
        **common_arguments(spec),
        train_sampling_strategy="sequential",
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=spec["beta"],
        simpo_gamma=spec["beta"] * spec["gamma_beta_ratio"],
        max_length=spec["max_length"],
    )
    trainer = trl.CPOTrainer(
        model, config, train_dataset=some_text(), processing_class=tokenizer, **adapter(spec)
    )
    trainer.train_dataset = Dataset.from_list([cpo_row(row) for row in rows])
    return trainer


def cpo_row(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A pair of token ids in the columns that TRL's CPO collator reads."""
    prompt = row["prompt_ids"]
    columns = {}
    for side in ("chosen", "rejected"):
        completion = row[f"{side}_ids"]
        columns[f"{side}_input_ids"] = prompt + completion
        columns[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
        columns[f"{side}_labels"] = [-100] * len(prompt) + completion
    return columns | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def trl_dpo(spec: Spec, model: Any, rows: list[dict[str, list[int]]], tokenizer: Any) -> Any:
    """TRL's `DPOTrainer` on the same token ids in the same order.

    Its reference is a frozen copy, or the base under the adapter.
    """
    trl = importlib.import_module("trl")
    config = trl.DPOConfig(
        **common_arguments(spec),
        train_sampling_strategy="sequential",
        beta=spec["beta"],
        max_length=spec["max_length"],
    )
    trainer = trl.DPOTrainer(
        model,
        None if spec["lora"] else load(spec),
        args=config,
        train_dataset=some_text(),
        processing_class=tokenizer,
        **adapter(spec),
    )
    trainer.train_dataset = Dataset.from_list(rows)
    return trainer


def some_text() -> Dataset:
    """A row for TRL's trainers to prepare, before the benchmark's own token ids take its place."""
    return Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}])


TRAINERS = {"ours": ours, "trl-cpo": trl_cpo, "trl-dpo": trl_dpo}


def main(path: str) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what the libraries print is not an answer
    spec: Spec = json.loads(Path(path).read_text())
    rows = json.loads(Path(spec["rows"]).read_text())
    if spec["order"]:
        rows = [rows[i] for i in spec["order"]]
    tokenizer = load_tokenizer(spec)
    model = load(spec)
    trainer = TRAINERS[spec["trainer"]](spec, model, rows, tokenizer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    cuda = spec["device"] == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    turns = Turns(answers, cuda)
    model.get_decoder().register_forward_pre_hook(turns.count, with_kwargs=True)
    trainer.add_callback(turns)
    with head_of(spec):
        trainer.train()


def head_of(spec: Spec) -> contextlib.AbstractContextManager[None]:
    """Inside, TRL's trainers score by this project's head if the contender is to."""
    if spec["our_head"] is None:
        return contextlib.nullcontext()
    trl = importlib.import_module("widemargin.integrations.trl")
    return trl.use_widemargin_head(tail=spec["our_head"])


if __name__ == "__main__":
    main(sys.argv[1])
