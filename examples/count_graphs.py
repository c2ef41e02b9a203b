"""Compile the model, generate with prompts of several lengths, and count the graphs that were compiled.

    python examples/count_graphs.py [MODEL_DIR]
    TORCH_LOGS=recompiles python examples/count_graphs.py     # also prints why a graph was compiled again

One graph serves a prompt bucket, one a cache bucket (docs/graphs.md). Without MODEL_DIR it takes the tiny checkpoint of
the package. On an NPU, real or emulated, it compiles with torchair, elsewhere with inductor.
"""

import sys

from qwen2_npu import Qwen2ForCausalLM, compile_model  # before torch: then no NPU is needed
from qwen2_npu.conformance import tiny

import torch
from torch._dynamo.utils import counters

on_npu = hasattr(torch, "npu") and torch.npu.is_available()
device, mode = ("npu:0", "torchair") if on_npu else ("cpu", "inductor")
folder = sys.argv[1] if len(sys.argv) > 1 else tiny.path()
model = Qwen2ForCausalLM.from_pretrained(folder, dtype="bfloat16", device=device)
compile_model(model, mode=mode)

counters.clear()
for tokens in (9, 12, 30):
    compiled_before = counters["stats"]["unique_graphs"]
    prompt = torch.arange(1, tokens + 1, device=device)[None]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    compiled = counters["stats"]["unique_graphs"] - compiled_before
    print(f"{mode} on {device}, prompt of {tokens} tokens, 8 new tokens: {compiled} graphs compiled")
