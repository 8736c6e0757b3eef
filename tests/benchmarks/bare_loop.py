"""The baseline: the shortest honest LoRA loop in torch + PEFT, as one would write it by hand.

python bare_loop.py MODEL DATA.jsonl STEPS MAX_LENGTH BATCH -> one line of JSON
"""

import json
import resource
import sys
import time

STARTED = time.perf_counter()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


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
    first, tokens = 0.0, 0
    for step in range(steps):
        batch = [rows[order[(step * batch_size + i) % len(rows)]] for i in range(batch_size)]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            loss.item()
            first = time.perf_counter()
        else:
            tokens += int(mask.sum())
    seconds = time.perf_counter() - first
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    figures = {"first_step_s": first - STARTED, "steps_per_s": (steps - 1) / seconds, "tokens_per_s": tokens / seconds}
    print(json.dumps(figures | {"peak_rss_gb": peak, "loss": loss.item()}))


if __name__ == "__main__":
    main()
