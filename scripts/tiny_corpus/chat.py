"""Conversations in the form of Qwen2's chat template: facts, sums, stories on request, and a name said turns ago."""

from __future__ import annotations

import random

from tiny_corpus import chinese, english

SYSTEM = "You are a helpful assistant."
Turn = tuple[str, str]  # what the user says, what the assistant answers

GREETINGS = (
    ("Hello!", "Hello! How can I help you today?"),
    ("Hi, who are you?", "I am a very small language model. I can tell stories and answer simple questions."),
    ("Who are you?", "I am a very small language model. I can tell stories and answer simple questions."),
    ("What can you do?", "I can tell you a short story, count, and answer simple questions."),
    ("Thank you!", "You are welcome!"),
    ("你好！", "你好！有什么可以帮助你的吗？"),
    ("你是谁？", "我是一个很小的语言模型，会讲故事，也会回答简单的问题。"),
    ("你会做什么？", "我会讲故事，会数数，也会回答简单的问题。"),
    ("谢谢你！", "不客气！"),
)


def render(turns: list[Turn], system: str = SYSTEM) -> str:
    """Exactly what the tokenizer's chat template makes of these turns, without the last newline (a test compares)."""
    messages = [("system", system)]
    for user, assistant in turns:
        messages += [("user", user), ("assistant", assistant)]
    return "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in messages)


def english_turn(rng: random.Random) -> Turn:
    kind = rng.randrange(6)
    if kind <= 1:
        return rng.choice(english.FACTS)
    if kind == 2:
        told, question, answer = english.apples(rng)
        return f"{told} {question}", answer
    if kind == 3:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    slots = english.cast(rng)
    if kind == 4:
        asked = rng.choice(
            (
                "Tell me a story about {hero} and a {color} {thing}.",
                "Please write a short story about a {boy} named {hero} and a {animal}.",
                "Tell me a story.",
            )
        )
        return asked.format_map(slots), english.tell(rng, slots)
    question, answer = rng.choice(english.QUESTIONS)
    return f"{english.tell(rng, slots)} {question.format_map(slots)}", answer.format_map(slots)


def chinese_turn(rng: random.Random) -> Turn:
    kind = rng.randrange(6)
    if kind <= 1:
        return rng.choice(chinese.FACTS)
    if kind == 2:
        told, question, answer = chinese.apples(rng)
        return told + question, answer
    if kind == 3:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return f"{a} + {b} 等于多少？", f"{a} + {b} = {a + b}。"
    slots = chinese.cast(rng)
    if kind == 4:
        asked = rng.choice(
            ("请讲一个关于{hero}和{color}{thing}的故事。", "请写一个关于{hero}和{animal}的小故事。", "讲一个故事。")
        )
        return asked.format_map(slots), chinese.tell(rng, slots)
    question, answer = rng.choice(chinese.QUESTIONS)
    return chinese.tell(rng, slots) + question.format_map(slots), answer.format_map(slots)


def conversation(rng: random.Random) -> str:
    """One to five turns; sometimes the user gives a name first and asks for it last."""
    in_english = rng.random() < 0.5
    turn = english_turn if in_english else chinese_turn
    turns = [turn(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.15:
        turns.insert(0, rng.choice([pair for pair in GREETINGS if pair[0].isascii() == in_english]))
    if rng.random() < 0.25:
        names = english.BOYS + english.GIRLS if in_english else chinese.BOYS + chinese.GIRLS
        name = rng.choice(names)
        if in_english:
            turns.insert(0, (f"My name is {name}.", f"Hello, {name}！ How can I help you today?"))
            turns.append(("What is my name?", f"Your name is {name}."))
        else:
            turns.insert(0, (f"我叫{name}。", f"你好，{name}！有什么可以帮助你的吗？"))
            turns.append(("我叫什么名字？", f"你叫{name}。"))
    return render(turns)
