"""SimPO in a loop of your own: `python examples/own_loop.py MODEL PAIRS`.

PAIRS is a JSONL file with prompt, chosen and rejected.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from widemargin.kernels.margin_loss import margin_loss
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.head import check_head, patch_head
from widemargin.trainer.packing import PairCollator, model_inputs

model_name, pairs = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
patch_head(model)
check_head(model)
rows, _ = tokenize_pairs(
    load_dataset("json", data_files=pairs, split="train"), tokenizer, DataSettings(max_length=512)
)
collate = PairCollator(tokenizer.pad_token_id, layout="prefix_shared", rows="varlen")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
for batch in torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate):
    logps = model(**model_inputs(batch)).token_logps
    margins = torch.full((len(batch["pair_ids"]),), 1.0)
    loss = margin_loss(logps, batch["cu_seqlens"], margins, beta=2.0).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
