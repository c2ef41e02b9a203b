"""``qwen2-npu generate``: text from the optimised model, streamed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from qwen2_npu.cli import interrupts, options, ranks
from qwen2_npu.optimizations import Optimizations

TEMPERATURES = (1e-30, 1e30)
"""The smallest and the largest: logits divided by less overflow float32, and by more every token is as likely."""


def check_temperature(value: float, name: str = "") -> None:
    """Refuse a temperature outside of :data:`TEMPERATURES`.

    Raises:
        ValueError: with what to take.
    """
    low, high = TEMPERATURES
    if low <= value <= high:
        return
    way_out, given = f"give {low:g} to {high:g}", f"{name} {value:g}".strip()
    if value < low:
        raise ValueError(
            f"{given} is too small: logits divided by it overflow; leave --sample out, which takes the most "
            f"likely token, or {way_out}"
        )
    raise ValueError(f"{given} is {'too large' if value > high else 'not a number'}: {way_out}")


def _temperature(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None:
        try:
            check_temperature(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _probability(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number: give one above 0 and up to 1")
    return value


@click.command("generate")
@options.model_path_option(help="Hugging Face checkpoint folder.  [default: the trained tiny one of this package]")
@options.assume_tp_option()
@click.option("--prompt", "prompts", multiple=True, required=True, help="Repeat for a batch.")
@click.option("--chat", is_flag=True, help="Put each prompt through the checkpoint's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--steps",
    callback=options.parse_steps,
    metavar="STEP,…",
    help="Only these steps of the ladder.  [default: all, and of 8-bit weights the one that they are made for]",
)
@options.device_option()
@options.dtype_option()
@options.mode_option()
@click.option("--sample", is_flag=True, help="Sample in place of greedy decoding.")
@click.option(
    "--temperature", type=click.FloatRange(min=0, min_open=True), callback=_temperature, help="With --sample."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), callback=_probability, help="With --sample.")
@click.option("--top-k", type=click.IntRange(min=1), help="With --sample.")
@click.option("--seed", type=click.IntRange(-(2**63), 2**64 - 1), default=0, show_default=True, help="With --sample.")
@ranks.in_ranks
def command(
    model_path: Path | None,
    assume_tp: int | None,
    prompts: tuple[str, ...],
    chat: bool,
    max_new_tokens: int,
    steps: tuple[str, ...] | None,
    device: str | None,
    dtype: str,
    mode: str,
    sample: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
) -> None:
    """Generate text. One prompt is streamed; several run as one batch and are printed when done, as is one whose
    checkpoint asks for beams or several answers in its generation_config.json."""
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in chosen.items() if value is not None}
    if given and not sample:
        raise click.UsageError(
            f"--{next(iter(given)).replace('_', '-')} needs --sample: greedy decoding does not use it"
        )
    if any(not prompt for prompt in prompts):
        raise click.UsageError("--prompt is empty: give it at least one character")

    options.import_first("qwen2_npu.models.qwen2", "qwen2_npu.conformance.accuracy.model_pair")

    import torch
    from transformers import LogitsProcessorList

    from qwen2_npu import compile_model
    from qwen2_npu.conformance import tiny
    from qwen2_npu.models.arguments import check_capacity

    options.quiet_transformers()
    folder = Path(model_path or tiny.path())
    target = options.check_device(device)
    model, tokenizer, texts = _loaded(folder, prompts, chat, steps, target, dtype, mode, assume_tp)
    if sample and temperature is None:
        warmth = model.generation_config.temperature
        check_temperature(1.0 if warmth is None else warmth, f"{folder}/generation_config.json: temperature")
    inputs = _encoded(tokenizer, texts, folder).to(model.device)
    # generate() would cut what is too many; who types a number can type another.
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    check_capacity(model.config.max_position_embeddings, longest + max_new_tokens - 1)
    compile_model(model, mode)
    interrupts.check()
    own = model.generation_config
    beams, answers = own.num_beams or 1, own.num_return_sequences or 1
    finite = FiniteLogits(model.dtype)
    streamer = _streamer(tokenizer, finite, skip_prompt=chat) if len(texts) == beams == answers == 1 else None
    torch.manual_seed(seed)
    try:
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            logits_processor=LogitsProcessorList([finite]),
            **given,
        )
    except RuntimeError:  # sampling from such logits
        finite.check()
        raise
    interrupts.check()
    finite.check()
    if streamer is None:
        each = [prompt for prompt in prompts for _ in range(answers)]
        for prompt, row in zip(each, out[:, inputs["input_ids"].shape[1] :], strict=True):
            answer = tokenizer.decode(row, skip_special_tokens=True)
            click.echo(f"{prompt}\n→ {answer}\n" if chat else f"{prompt}{answer}\n")


def _loaded(
    folder: Path,
    prompts: tuple[str, ...],
    chat: bool,
    steps: tuple[str, ...] | None,
    device: str,
    dtype: str,
    mode: str,
    assume_tp: int | None,
) -> tuple[Any, Any, list[str]]:
    """The model, its tokenizer or None, and the texts to continue. The weights are read last, since that takes long."""
    import torch

    from qwen2_npu import Qwen2ForCausalLM, graph
    from qwen2_npu.checkpoint.configuration import read_config
    from qwen2_npu.checkpoint.quantization import quantization_of
    from qwen2_npu.checkpoint.tokenizer import chat_text, load_tokenizer

    # First: transformers reads config.json for the tokenizer, too.
    config = read_config(folder)
    asked, stored = Optimizations.of(steps, with_requirements=True) if steps else None, quantization_of(config)
    optimizations = Optimizations.for_model(asked, config, None if stored is None else stored.scheme)
    graph.check_mode(mode, torch.device(device), optimizations, config)
    tokenizer = load_tokenizer(folder)
    texts = [chat_text(tokenizer, prompt) for prompt in prompts] if chat and tokenizer is not None else list(prompts)
    model = Qwen2ForCausalLM.from_pretrained(
        folder, dtype=dtype, device=device, optimizations=optimizations, assume_tp=assume_tp
    ).eval()
    return model, tokenizer, texts


def _encoded(tokenizer: Any, texts: list[str], folder: Path) -> Any:
    """The texts as one batch, padded on the left."""
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer (tokenizer.json): fetch it with the checkpoint")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer(texts, return_tensors="pt", padding=True)


class FiniteLogits:
    """A processor of logits that notes, on the device, whether they were finite. Nothing waits for it: see
    :meth:`check`."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = str(dtype).removeprefix("torch.")
        self._wrong: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores`` as they are."""
        wrong = ~scores.amax(dim=-1).isfinite().all()
        self._wrong = wrong if self._wrong is None else self._wrong | wrong
        return scores

    def check(self) -> None:
        """Waits for the device: call it where the tokens are waited for anyway.

        Raises:
            ValueError: logits were infinite or not numbers, so that no token follows from them.
        """
        if self._wrong is None or not bool(self._wrong):
            return
        if self.dtype == "float16":
            raise ValueError(
                "the logits are not finite: float16 holds no more than 65504, and this checkpoint goes beyond; "
                "take --dtype bfloat16 or float32"
            )
        raise ValueError(
            f"the logits are not finite in {self.dtype}: is the checkpoint whole? qwen2-npu verify says where the "
            "numbers leave those of the stock model"
        )


def _streamer(tokenizer: Any, finite: FiniteLogits, *, skip_prompt: bool) -> Any:
    """Prints the prompt together with the first new token: an error that the prompt meets then has its own line."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        prompt: Any = None
        printing = False

        def put(self, value: Any) -> None:
            interrupts.check()
            if self.prompt is None:
                self.prompt = value
                return
            finite.check()
            if not self.printing:
                super().put(self.prompt)
                self.printing = True
            super().put(value)

    return Streamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
