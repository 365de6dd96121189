"""A script in TRL's style, with two names changed: `python examples/trl_script.py MODEL PAIRS OUT`.

PAIRS is a JSONL file with prompt, chosen and rejected.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from widemargin.trainer import PreferenceConfig, PreferenceTrainer  # were DPOConfig, DPOTrainer

model_name, pairs, output_dir = sys.argv[1:]
args = PreferenceConfig(
    objective="dpo", beta=0.1, learning_rate=1e-5, max_length=1024, output_dir=output_dir
)
trainer = PreferenceTrainer(
    AutoModelForCausalLM.from_pretrained(model_name),
    args,
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model_name),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model(output_dir)
