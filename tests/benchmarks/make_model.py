"""A random Llama of 6.4M parameters with another model's tokenizer: make_model.py TOKENIZER_FOLDER TARGET_FOLDER."""

import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ends))
model.save_pretrained(target)
tokenizer.save_pretrained(target)
print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
