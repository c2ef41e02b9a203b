"""Train the tiny checkpoint that the conformance suite and ``qwen2-npu verify`` use by default.

    python scripts/train_tiny.py                          # writes qwen2_npu/conformance/tiny/
    python scripts/train_tiny.py --steps 60 --output DIR  # a quick look at the pipeline

Text (``tiny_corpus``), tokenizer and weights follow from ``--seed``. The model is the stock Qwen2 of transformers in
float32 on two threads; the weights are rounded to bfloat16 at the end. ``prompts.json``, ``README.md`` and
``__init__.py`` of the output folder are written by hand and left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_corpus
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import qwen2_npu  # noqa: F401 - before torch: then no NPU is needed

import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip
from transformers import Qwen2Config, Qwen2ForCausalLM  # isort: skip

OUTPUT = Path(__file__).parents[1] / "qwen2_npu" / "conformance" / "tiny"
# In the order of their ids, which follow the ordinary tokens, as in Qwen2.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 2048
END, IM_END = VOCABULARY - 3, VOCABULARY - 1
HELDOUT_SEED, HELDOUT_PER_LANGUAGE = 1_000_003, 20

# Both releases of transformers read this file, so it keeps the keys of 4.37 (`rope_theta`, `torch_dtype`).
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": END,
    "eos_token_id": IM_END,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 448,
    "max_position_embeddings": 2048,
    "max_window_layers": 4,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
GENERATION_CONFIG = {
    "bos_token_id": END,
    "do_sample": False,
    "eos_token_id": [IM_END, END],
    "pad_token_id": END,
    "transformers_version": "4.37.0",
}

# The pattern of Qwen2's tokenizer: words, single digits, punctuation, line ends.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In bytes: an English word or four Chinese characters. Without a limit, whole phrases of the grammar would merge.
LONGEST_TOKEN = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + tiny_corpus.SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with Qwen2's normaliser and pattern; the special tokens take the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for special in SPECIAL:
        texts = [text.replace(special, "\n") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    if tokenizer.get_vocab_size() != VOCABULARY or tokenizer.token_to_id(SPECIAL[-1]) != IM_END:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"the text gives {size} tokens, not {VOCABULARY}: add text or lower VOCABULARY")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json with merges written as strings, the only form that tokenizers 0.15 (transformers 4.37) reads."""
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(END + i): {"content": token} | flags for i, token in enumerate(SPECIAL)},
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents, each ended by <|endoftext|>, as one row of ids (N,)."""
    encoded = tokenizer.encode_batch([document + tiny_corpus.END for document in documents])
    return torch.tensor([token for one in encoded for token in one.ids])


def batches(tokens: torch.Tensor, length: int, rows: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """(rows, length) windows in random order; after all were seen, again from another offset."""
    while True:
        start = int(torch.randint(length, (), generator=generator))
        windows = tokens[start:].unfold(0, length, length)
        for chosen in torch.randperm(len(windows), generator=generator).split(rows):
            if len(chosen) == rows:
                yield windows[chosen]


@torch.no_grad()
def mean_loss(model: Qwen2ForCausalLM, tokens: torch.Tensor, length: int = 1024) -> float:
    """Mean negative log-likelihood in nats per token, over windows of ``length``."""
    model.eval()
    total, count = 0.0, 0
    for window in tokens.split(length):
        if len(window) > 1:
            loss = model(window[None], labels=window[None]).loss
            total, count = total + loss.item() * (len(window) - 1), count + len(window) - 1
    return total / count


def train(
    model: Qwen2ForCausalLM,
    tokens: torch.Tensor,
    heldout: torch.Tensor,
    steps: int,
    rate: float,
    generator: torch.Generator,
) -> float:
    """AdamW with a cosine schedule, the last quarter of the steps at twice the length; returns the last mean loss."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
    )
    warmup = max(1, min(100, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    short = steps - steps // 4
    stream = itertools.chain(
        itertools.islice(batches(tokens, 512, 4, generator), short), batches(tokens, 1024, 2, generator)
    )
    begun = time.monotonic()
    recent: list[float] = []
    for step, batch in enumerate(itertools.islice(stream, steps), start=1):
        model.train()
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - begun
            print(
                f"step {step}/{steps}  loss {sum(recent) / len(recent):.4f}  held-out {mean_loss(model, heldout):.4f}"
                f"  {seconds:.0f} s  {step * batch.numel() / seconds:.0f} tokens/s",
                flush=True,
            )
    return sum(recent) / len(recent)


def round_to_bfloat16(model: Qwen2ForCausalLM) -> dict[str, torch.Tensor]:
    """Rounds the parameters in place and returns them under their Hugging Face names, without the tied lm_head."""
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = parameter.detach().to(torch.bfloat16).contiguous()
        parameter.data.copy_(state[name])
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps of 2048 tokens")
    parser.add_argument("--documents", type=int, default=24_000, help="documents of training text")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
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
    tokenizer = build_tokenizer(texts[:8000])
    tokens, heldout_tokens = encode(tokenizer, texts), encode(tokenizer, heldout)
    print(
        f"{len(tokens)} training tokens from {sum(map(len, texts))} characters, {len(heldout_tokens)} held-out tokens"
    )

    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})).float()
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    begun = time.monotonic()
    loss = train(model, tokens, heldout_tokens, arguments.steps, arguments.rate, generator)
    state = round_to_bfloat16(model)
    heldout_loss = mean_loss(model, heldout_tokens)

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    save_tokenizer(tokenizer, folder)
    (folder / "heldout.txt").write_text("\n\n".join(heldout) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    print(
        f"training loss {loss:.4f}, held-out loss {heldout_loss:.4f} (perplexity {math.exp(heldout_loss):.3f}) with"
        f" bfloat16 weights, {time.monotonic() - begun:.0f} s, {size} bytes"
    )


if __name__ == "__main__":
    main()
