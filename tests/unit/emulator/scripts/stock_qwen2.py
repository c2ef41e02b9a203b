"""The stock Qwen2 of transformers, as its documentation runs it on any device.

python stock_qwen2.py npu|cpu CHECKPOINT RESULTS.json
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    device, path, results = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    prompts = tokenizer(["The cat sat on the", "One two three"], return_tensors="pt", padding=True).to(device)
    tokens = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=attention)
        model = model.to(device).eval()
        tokens[attention] = model.generate(**prompts, max_new_tokens=24, do_sample=False).tolist()
    with open(results, "w") as file:
        json.dump(tokens, file)
