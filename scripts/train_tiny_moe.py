"""Train the tiny mixture of experts that stands beside the tiny checkpoint, from that checkpoint.

    python scripts/train_tiny_moe.py                          # writes qwen2_npu/conformance/tiny_moe/
    python scripts/train_tiny_moe.py --steps 20 --output DIR  # a quick look at the pipeline

As Qwen2-57B-A14B was made from Qwen2-7B: embedding, attention and norms are those of the dense model, and the columns
of its MLPs are dealt to the experts at random. Then it is trained on the same text with the same tokenizer. Text and
weights follow from ``--seed``. ``README.md`` and ``__init__.py`` of the output folder are written by hand and left
alone. Needs transformers 5.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import time
from pathlib import Path
from typing import Any

import tiny_corpus
from tokenizers import Tokenizer

from qwen2_npu.checkpoint.experts import one_by_one  # before torch: then no NPU is needed

import torch  # isort: skip
from safetensors.torch import load_file, save_file  # isort: skip
from train_tiny import (  # isort: skip
    CONFIG,
    HELDOUT_PER_LANGUAGE,
    HELDOUT_SEED,
    encode,
    mean_loss,
    round_to_bfloat16,
    train,
    write_json,
)
from train_tiny import OUTPUT as DENSE  # isort: skip
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM  # isort: skip

OUTPUT = DENSE.with_name("tiny_moe")
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Files that are those of the dense checkpoint."""

EXPERTS, COLUMNS, SHARED = 8, 48, 96
MOE_CONFIG: dict[str, Any] = CONFIG | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "model_type": "qwen2_moe",
    "moe_intermediate_size": COLUMNS,
    "norm_topk_prob": False,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "qkv_bias": True,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": SHARED,
    "transformers_version": "4.40.1",
}
BALANCE = 0.01
"""Weight of the loss by which the experts come to serve as many tokens each, in training."""

LOGITS = 0.95
"""What the logits are multiplied by in the end, in the final norm: see README.md."""


def from_dense(dense: dict[str, torch.Tensor], model: Qwen2MoeForCausalLM, generator: torch.Generator) -> None:
    """Fill ``model`` in place."""
    own = model.state_dict()
    for name, tensor in dense.items():
        if name in own:  # all but the MLPs of the sparse layers
            own[name].copy_(tensor)
    for index, layer in enumerate(model.model.layers):
        if index in model.config.mlp_only_layers:
            continue
        gate, up, down = (
            dense[f"model.layers.{index}.mlp.{name}.weight"].float() for name in ("gate_proj", "up_proj", "down_proj")
        )
        mlp = layer.mlp
        order = torch.randperm(len(gate), generator=generator)
        chosen = order[:SHARED]
        for linear, values in (
            (mlp.shared_expert.gate_proj, gate[chosen]),
            (mlp.shared_expert.up_proj, up[chosen]),
            (mlp.shared_expert.down_proj, 2 * down[:, chosen]),  # its gate is 1/2 at first
        ):
            linear.weight.data.copy_(values)
        torch.nn.init.zeros_(mlp.shared_expert_gate.weight)
        torch.nn.init.normal_(mlp.gate.weight, std=0.02, generator=generator)
        for expert in range(EXPERTS):
            chosen = order[SHARED + torch.randperm(len(gate) - SHARED, generator=generator)[:COLUMNS]]
            mlp.experts.gate_up_proj.data[expert] = torch.cat((gate[chosen], up[chosen]))
            mlp.experts.down_proj.data[expert] = 4 * down[:, chosen]  # the router's weight is about 1/4 at first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument("--steps", type=int, default=240, help="optimiser steps of 2048 tokens")
    parser.add_argument("--documents", type=int, default=8_000, help="documents of training text")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)

    heldout = tiny_corpus.heldout(HELDOUT_SEED, HELDOUT_PER_LANGUAGE)
    texts = list(
        itertools.islice(tiny_corpus.documents(arguments.seed, without=frozenset(heldout)), arguments.documents)
    )
    tokenizer = Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    tokens, heldout_tokens = encode(tokenizer, texts), encode(tokenizer, heldout)
    print(f"{len(tokens)} training tokens, {len(heldout_tokens)} held-out tokens")

    config = Qwen2MoeConfig(**{name: value for name, value in MOE_CONFIG.items() if name != "torch_dtype"})
    config.output_router_logits, config.router_aux_loss_coef = True, BALANCE
    model = Qwen2MoeForCausalLM(config).float()
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    with torch.no_grad():
        from_dense(load_file(DENSE / "model.safetensors"), model, generator)
    begun = time.monotonic()
    loss = train(model, tokens, heldout_tokens, arguments.steps, arguments.rate, generator)
    model.model.norm.weight.data.mul_(LOGITS)
    # Copies: a file holds no two views of one tensor.
    state = {name: part.clone() for name, part in one_by_one(round_to_bfloat16(model)).items()}
    model.config.output_router_logits = False  # the loss of the text alone
    heldout_loss = mean_loss(model, heldout_tokens)

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", MOE_CONFIG)
    for name in KEPT:
        shutil.copyfile(DENSE / name, folder / name)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    print(
        f"training loss {loss:.4f}, held-out loss {heldout_loss:.4f} (perplexity {math.exp(heldout_loss):.3f}) with"
        f" bfloat16 weights, {time.monotonic() - begun:.0f} s, {size} bytes"
    )


if __name__ == "__main__":
    main()
