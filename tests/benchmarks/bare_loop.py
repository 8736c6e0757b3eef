"""The baseline: the shortest honest LoRA loop in torch + PEFT, as one would write it by hand.

bare_loop.py MODEL DATA.jsonl STEPS MAX_LENGTH BATCH -> the loss and the non-padding tokens so far, at step 1 and
every ten steps, a line of JSON each
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_dir, data, steps, max_length, batch_size = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with open(data) as file:
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in file]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_length] for text in texts]
    order = torch.randperm(len(rows)).tolist()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()
    tokens = 0
    for step in range(1, steps + 1):
        batch = [rows[order[((step - 1) * batch_size + i) % len(rows)]] for i in range(batch_size)]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(mask.sum())
        if step == 1 or step % 10 == 0:
            print(json.dumps({"step": step, "loss": loss.item(), "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
