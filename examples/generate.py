"""Generate text on an NPU, or on a laptop without one.

    python examples/generate.py [MODEL_DIR [PROMPT]]
    EXE_MODE=torchair python examples/generate.py     # compiled for NPUs; EXE_MODE=inductor for CPU and CUDA

Without MODEL_DIR it takes the tiny checkpoint of the package, which continues short English and Chinese sentences.
"""

import sys

from qwen2_npu import Qwen2ForCausalLM, compile_model  # before torch: then no NPU is needed
from qwen2_npu.conformance import tiny

import torch
from transformers import AutoTokenizer

on_npu = hasattr(torch, "npu") and torch.npu.is_available()
device = "npu:0" if on_npu else "cpu"
folder = sys.argv[1] if len(sys.argv) > 1 else tiny.path()
text = sys.argv[2] if len(sys.argv) > 2 else tiny.prompts()[0]

model = Qwen2ForCausalLM.from_pretrained(folder, dtype="bfloat16", device=device)
compile_model(model)  # as EXE_MODE says; by default nothing is compiled
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(text, return_tensors="pt").to(device)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
