"""``qwen2-npu generate``: what it prints, and when it cannot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import qwen2_npu
from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint.quantizing import quantize
from qwen2_npu.cli import main
from qwen2_npu.cli.generate import FiniteLogits
from qwen2_npu.conformance import tiny
from qwen2_npu.models import arguments
from qwen2_npu.optimizations import QUANTIZED


def generate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path(), tmp_path / "model"))


def small_vocabulary(folder: Path) -> None:
    """A model of 300 tokens with the tokenizer of a larger one."""
    from qwen2_npu import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder)
    weights = {name: t[:300].clone() if "embed" in name else t for name, t in model.stock_state_dict().items()}
    model.config.vocab_size = 300
    Qwen2ForCausalLM.from_state_dict(model.config, weights).save_pretrained(folder)


def quantise(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)


def spoil_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_8_bit_weights(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits unless other steps are asked for."""
    quantize(tiny.path(), tmp_path / "written", scheme=scheme)
    models = []
    load = Qwen2ForCausalLM.from_pretrained

    def loaded(*arguments: Any, **named: Any) -> Any:
        models.append(load(*arguments, **named))
        return models[-1]

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", loaded)
    words = ("--model-path", tmp_path / "written", "--prompt", "The cat", "--max-new-tokens", 3, "--device", "cpu")
    for steps, expected in (((), scheme), (("--steps", "w8a16"), "w8a16"), (("--steps", "swiglu"), None)):
        result = generate(*words, *steps)
        assert result.exit_code == 0, result.output
        assert models[-1].optimizations.scheme == expected
    assert models[0].optimizations == Optimizations.up_to(scheme).of_model(models[0].config, scheme)
    result = generate(*words, "--model-path", tiny.path(), "--steps", scheme)
    assert result.exit_code == 2
    assert f"error: {scheme}: the weights of this checkpoint are not quantised" in result.output


@pytest.mark.parametrize("option", [["--chat"], []])
def test_the_prompt_is_printed_once_unless_it_is_a_chat(option: list[str]) -> None:
    result = generate("--prompt", "Let us count: two, three,", "--max-new-tokens", 4, *option)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("count: two") == (not option)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (small_vocabulary, "is outside the vocabulary of 300"),
        (quantise, "is stored as I8, which is quantised or no weight; use the checkpoint in bf16"),
        (spoil_generation_config, "generation_config.json is not valid JSON"),
    ],
)
def test_a_checkpoint_that_does_not_serve(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    result = generate("--model-path", folder, "--prompt", "Once upon")
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: "), "the prompt stands before the error, on its line"
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "99999999999999999999999"], "'--seed': 99999999999999999999999 is not in the range"),
        (["--device", "meta"], "error: --device meta: not usable here"),
        (["--max-new-tokens", 100000], "max_position_embeddings=2048"),
    ],
)
def test_bad_options(arguments: list[object], message: str) -> None:
    result = generate("--prompt", "Once upon", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Once upon" not in result.output


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(
            ("--temperature", value, f"{value} is too small: logits divided by it overflow; leave --sample out")
            for value in ("1e-40", "9.99989e-321", "1e-31")
        ),
        ("--temperature", "inf", "inf is too large: give 1e-30 to 1e+30"),
        ("--temperature", "1e+39", "1e+39 is too large: give 1e-30 to 1e+30"),
        ("--temperature", "nan", "nan is not a number: give 1e-30 to 1e+30"),
        ("--temperature", "0", "0.0 is not in the range x>0"),
        ("--temperature", "-1", "-1.0 is not in the range x>0"),
        ("--top-p", "nan", "nan is not a number: give one above 0 and up to 1"),
        ("--top-p", "inf", "inf is not in the range"),
        ("--top-k", "nan", "'nan' is not a valid integer range"),
    ],
)
def test_sampling_options_that_no_probabilities_come_of(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", lambda *given, **named: pytest.fail("a model was built"))
    result = generate("--prompt", "Once upon", "--sample", option, value)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("value", [1e-30, 1e-6, 1e30])
def test_extreme_temperatures_that_are_taken(value: float) -> None:
    assert generate("--prompt", "x", "--max-new-tokens", 2, "--sample", "--temperature", value).exit_code == 0


def test_a_small_temperature_takes_the_most_likely_token() -> None:
    call = ("--prompt", "Let us count: two, three,", "--max-new-tokens", 4)
    assert generate(*call, "--sample", "--temperature", 1e-30).stdout == generate(*call).stdout


def test_a_checkpoint_with_such_a_temperature(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 1e-40, "do_sample": true}')
    result = generate("--model-path", folder, "--prompt", "Once upon", "--sample")
    assert result.exit_code == 2
    assert "generation_config.json: temperature 1e-40 is too small" in result.output
    assert generate("--model-path", folder, "--prompt", "x", "--sample", "--temperature", 1).exit_code == 0


def test_the_largest_seed() -> None:
    assert generate("--prompt", "x", "--max-new-tokens", 1, "--sample", "--seed", 2**64 - 1).exit_code == 0


def overflow(folder: Path) -> None:
    """Finite weights whose products are beyond float16, as some checkpoints' activations are."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t * 60000 if "down_proj" in name else t for name, t in tensors.items()}, path, {"format": "pt"})


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t * float("nan") if "down_proj" in name else t for name, t in tensors.items()}, path)


@pytest.mark.parametrize("more", [[], ["--sample"], ["--prompt", "b"], ["--steps", "fixed_kv_cache"]], ids=str)
@pytest.mark.parametrize(
    ("spoil", "dtype", "message"),
    [
        (overflow, "float16", "the logits are not finite: float16 holds no more than 65504.* take --dtype bfloat16"),
        (break_weights, "float32", "the logits are not finite in float32: is the checkpoint whole"),
    ],
    ids=["overflow", "nan"],
)
def test_logits_that_no_token_follows_from(folder: Path, spoil, dtype: str, message: str, more: list[str]) -> None:
    spoil(folder)
    arguments = ["--model-path", folder, "--prompt", "a", "--max-new-tokens", 3, "--dtype"]
    result = generate(*arguments, dtype, *more)
    assert result.exit_code != 0
    assert re.search(message, " ".join(result.output.split())), result.output
    assert "!!" not in result.stdout
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    if spoil is overflow:
        assert generate(*arguments, "float32", *more).exit_code == 0


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("wanted", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_a_checkpoint_that_asks_for_beams(folder: Path, wanted: dict[str, int], prompts: int) -> None:
    """What no streamer takes is printed when done."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wanted}))
    given = [option for number in range(prompts) for option in ("--prompt", f"prompt {number}:")]
    result = generate("--model-path", folder, "--max-new-tokens", 3, *given)
    assert result.exit_code == 0, result.output
    for number in range(prompts):
        assert result.stdout.count(f"prompt {number}:") == wanted.get("num_return_sequences", 1)


def test_every_option_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def asked(self: Any, **how: Any) -> None:
        given.update(how, seed=torch.initial_seed(), dtype=self.dtype, steps=self.optimizations.names())
        raise ValueError("enough")

    right = Qwen2ForCausalLM.from_pretrained

    def loaded(folder: Path, *, assume_tp: int, **how: Any) -> Any:
        given.update(assume_tp=assume_tp)
        return right(folder, **how)

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", asked)
    monkeypatch.setattr(qwen2_npu, "compile_model", lambda model, mode: given.update(mode=mode))
    monkeypatch.setattr(arguments, "check_capacity", lambda positions, tokens: given.update(tokens=tokens))
    options = (
        "--sample --temperature 0.5 --top-p 0.25 --top-k 3 --seed 7 --max-new-tokens 9 --device cpu --mode inductor"
    )
    options += " --assume-tp 4 --dtype bfloat16 --steps fixed_kv_cache --prompt a --prompt three"
    assert generate(*options.split(), "--prompt", "a b c d").exit_code == 2
    longest = given["attention_mask"].sum(dim=1).max()
    assert given["attention_mask"].sum(dim=1).argmax() == 2, "the first prompt is not the longest"
    assert given["attention_mask"][:, -1].all(), "padded on the left"
    wanted = {
        "do_sample": True, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": 7, "max_new_tokens": 9,
        "mode": "inductor", "assume_tp": 4, "dtype": torch.bfloat16, "steps": ("fixed_kv_cache",), "streamer": None,
        "tokens": longest + 9 - 1,
    }  # fmt: skip
    assert {name: given[name] for name in wanted} == wanted
    given.clear()
    generate("--sample", "--seed", 8, "--prompt", "a")
    assert (given["seed"], given["mode"]) == (8, "eager")
    assert not given.keys() & {"temperature", "top_p", "top_k"}, "the checkpoint's own"


def test_several_answers_stand_below_their_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 2, "num_return_sequences": 2}))
    monkeypatch.setattr(
        Qwen2ForCausalLM,
        "generate",
        lambda self, input_ids, **how: torch.cat([input_ids] * 2, 1).repeat_interleave(2, 0),
    )
    done = generate("--model-path", folder, "--device", "cpu", "--prompt", "one", "--prompt", "two")
    assert done.output.split() == ["oneone", "oneone", "twotwo", "twotwo"]


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_of_any_step_that_are_not_finite_are_noted(place: int, value: float) -> None:
    noted = FiniteLogits(torch.bfloat16)
    for step in range(3):
        scores = torch.zeros(2, 4)
        scores[0, 1] = -float("inf")  # a token that is ruled out
        if step == place:
            scores[1] = value
        assert noted(None, scores) is scores
    with pytest.raises(ValueError, match="the logits are not finite in bfloat16"):
        noted.check()
