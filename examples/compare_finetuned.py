"""Compare your fine-tuned model, optimised, with the stock transformers model on the same weights.

    python examples/compare_finetuned.py [MODEL_DIR]

Both see the same tokens. A different best token is accepted only where the stock model's own rounding could have made
it (docs/accuracy.md). Exit status: 0 all passed, 1 otherwise. Without MODEL_DIR it takes the tiny checkpoint of the
package. `qwen2-npu verify --model-path MODEL_DIR` does the same for every step, and shows more.
"""

import sys
from pathlib import Path

import qwen2_npu  # before torch: then no NPU is needed
from qwen2_npu.conformance import tiny

import torch
from qwen2_npu.conformance.accuracy.verify import verify

device = "npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu"
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny.path()

result = verify(folder, device=device, dtype="bfloat16", steps=[qwen2_npu.LADDER[-1]])
for row in result.rows:
    print(f"all steps up to {row.step}, {row.positions} positions: {row.agreement:.2%} with the same best token,")
    print(f"  {len(row.excused)} near-ties, largest error of a logit {row.max_logit_error:.2g}")
for sample in result.samples:
    print(f"{sample.prompt!r}: {'the same text' if sample.baseline == sample.optimised else sample.divergence}")
print(f"computed by {result.environment.verified}")
for failure in result.failures:
    print(f"FAILED: {failure}")
print("passed" if result.passed else "FAILED")
sys.exit(0 if result.passed else 1)
