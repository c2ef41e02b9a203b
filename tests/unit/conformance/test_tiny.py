"""The tiny checkpoint: its size, its layout, its tokenizer, and that its predictions are worth comparing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from qwen2_npu.conformance import tiny

LARGEST_BYTES = 6_000_000
HIGHEST_HELDOUT_LOSS = 0.90  # nats per token; a uniform guess has ln 2048 = 7.6
LOWEST_MEDIAN_MARGIN = 2.0  # logits; random weights of this shape have about 0.1
SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
SAMPLES = (
    "Once upon a time, there was a girl named Lily.",
    "从前，有一个男孩叫小明。“你好！”他说。",
    "Ünïcödé 12345 + 678 =\n\n  tabs\tand 火车 🚂",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    """The checkpoint's bfloat16 values, computed in float32."""
    return Qwen2ForCausalLM.from_pretrained(tiny.path(), torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout(model: Qwen2ForCausalLM, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) that predict the ids (N,) of the first 1024 held-out tokens."""
    ids = tokenizer(tiny.heldout_text(), return_tensors="pt").input_ids[:, :1024]
    with torch.no_grad():
        return model(ids).logits[0, :-1], ids[0, 1:]


def greedy(model: Qwen2ForCausalLM, tokenizer: Any, text: str, tokens: int) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def chat(tokenizer: Any, user: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )


def test_folder_is_small_enough() -> None:
    files = [file for file in tiny.path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST_BYTES


def test_helpers_need_no_torch() -> None:
    code = (
        "import sys; from qwen2_npu.conformance import tiny;"
        "assert tiny.path().is_dir() and tiny.prompts() and tiny.chat_prompts() and tiny.heldout_text();"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_and_heldout_text_are_in_both_languages() -> None:
    for texts in (tiny.prompts(), tiny.chat_prompts(), tiny.heldout_documents()):
        assert any(text.isascii() for text in texts)
        assert any("\u4e00" <= character <= "\u9fff" for text in texts for character in text)
    assert 8 <= len(tiny.prompts()) <= 12


def test_config() -> None:
    config = AutoConfig.from_pretrained(tiny.path())
    assert config.model_type == "qwen2"
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (256, 4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (2048, 2048)
    assert config.tie_word_embeddings
    assert not config.use_sliding_window
    rope = getattr(config, "rope_parameters", None)  # transformers 5
    assert (rope["rope_theta"] if rope else config.rope_theta) == 1_000_000
    assert getattr(config, "dtype", config.torch_dtype) == torch.bfloat16


def test_rotary_frequencies_use_the_theta_of_the_config(model: Qwen2ForCausalLM) -> None:
    inner = getattr(model.model, "rotary_emb", None) or model.model.layers[0].self_attn.rotary_emb  # 5.x, 4.37
    expected = 1_000_000 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(inner.inv_freq.double(), expected, rtol=1e-6, atol=0)


def test_generation_config_is_greedy_and_ends_turns(tokenizer: Any) -> None:
    config = GenerationConfig.from_pretrained(tiny.path())
    assert not config.do_sample
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(config.pad_token_id) == "<|endoftext|>"


def test_weights_are_bfloat16_under_the_stock_names(model: Qwen2ForCausalLM) -> None:
    with safe_open(tiny.path() / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert names == {name for name, _ in model.named_parameters()}
        assert "lm_head.weight" not in names
        tensors = {name: file.get_tensor(name) for name in names}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    for name in ("q_proj", "k_proj", "v_proj"):
        assert tensors[f"model.layers.0.self_attn.{name}.bias"].abs().max() > 0


def test_all_weights_are_read(model: Qwen2ForCausalLM) -> None:
    loaded, info = Qwen2ForCausalLM.from_pretrained(tiny.path(), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("text", [*SAMPLES, tiny.heldout_text()], ids=["english", "chinese", "mixed", "held-out"])
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert max(ids) < 2048
    assert tokenizer.decode(ids) == text


def test_tokenizer_ids_do_not_depend_on_the_release(tokenizer: Any) -> None:
    """The expected ids are those of both transformers 4.37.0 and 5.23.0."""
    expected = json.loads((Path(__file__).parent / "tiny_ids.json").read_text(encoding="utf-8"))
    assert {text: tokenizer(text).input_ids for text in (*SAMPLES, *tiny.prompts())} == expected


def test_special_tokens_are_single_ids_at_the_end(tokenizer: Any) -> None:
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>").input_ids == [2045, 2046, 2047]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == 2048


def test_chat_template(tokenizer: Any) -> None:
    assert chat(tokenizer, "Hi") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_heldout_loss(heldout: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = heldout
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    assert loss < HIGHEST_HELDOUT_LOSS, f"held-out perplexity {math.exp(loss):.3f}"


def test_margins_are_real(heldout: tuple[torch.Tensor, torch.Tensor]) -> None:
    top = heldout[0].topk(2).values
    assert (top[:, 0] - top[:, 1]).median().item() > LOWEST_MEDIAN_MARGIN


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Let us count: two, three, four,", "five, six, seven"),
        ("中国的首都是", "北京"),
    ],
    ids=["count", "chinese-fact"],
)
def test_greedy_text_makes_sense(model: Qwen2ForCausalLM, tokenizer: Any, prompt: str, expected: str) -> None:
    assert expected in greedy(model, tokenizer, prompt, 12)


def test_corpus_gives_the_same_text_again(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """heldout.txt follows from its seed, and the training text of the default seed leaves it out."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import itertools

    import tiny_corpus

    heldout = tiny_corpus.heldout(1_000_003, 20)
    assert tuple(heldout) == tiny.heldout_documents()
    documents = tiny_corpus.documents(2024, without=frozenset(heldout))
    assert not set(itertools.islice(documents, 24_000)) & set(heldout)
    assert tiny_corpus.SYSTEM in chat(tokenizer, "Hi")
