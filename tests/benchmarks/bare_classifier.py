"""The plain script that ours is held against: transformers' Trainer over tokenised rows, in the same image.

bare_classifier.py MODEL ROWS STEPS max-length|grouped: prints non-padding tokens a second from the second step on.
"""

import csv
import sys
import time

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

model_path, rows_path, steps, padding = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
tokenizer = AutoTokenizer.from_pretrained(model_path)
with open(rows_path, newline="") as file:
    rows = list(csv.DictReader(file))
names = sorted({row["label"] for row in rows})
model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(names))
data = Dataset.from_list([{"text": row["text"], "labels": names.index(row["label"])} for row in rows])
whole = padding == "max-length"
data = data.map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=512, padding="max_length" if whole else False),
    batched=True,
    remove_columns=["text"],
)
counted = {"tokens": 0, "since": 0.0}


class Count(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            counted.update(tokens=0, since=time.monotonic())
        elif state.global_step == state.max_steps:
            print("tokens/s", counted["tokens"] / (time.monotonic() - counted["since"]), flush=True)


class Counting(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        counted["tokens"] += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, num_items_in_batch)


torch.manual_seed(42)
arguments = TrainingArguments(
    output_dir="/tmp/bare", max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-5, save_strategy="no",
    report_to="none", use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_steps=100,
    train_sampling_strategy="random" if whole else "group_by_length", dataloader_pin_memory=False,
)  # fmt: skip
Counting(
    model=model, args=arguments, train_dataset=data, processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer), callbacks=[Count()],
).train()  # fmt: skip
