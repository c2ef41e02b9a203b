"""Writes docs/power.md from results of ``mutants.py``: ``python scripts/power_page.py RESULT.json …``

Of a file that is in several results, the last one counts; of the library, the first one says how much was noticed
before tests were added. What no result speaks of, judges or the library, stays on the page as it is.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from mutations import mutations

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "power.md"
First = dict[str, dict[str, str]]
"""Path -> name of a mutant -> what became of it when it was tried first."""

PACKAGES = ("torch", "torch_npu", "transformers", "pytest")

TEXT = """# Power: is a rule held by a test?

Written by `scripts/power_page.py` from results of `scripts/mutants.py` on {date}:
{versions}.
On the CPU and the emulated NPU, not on a real one.

The script changes one small thing in a file (a comparison, `and` and `or`, a limit, a loop that sees the first element
only, an element left out of a list, a refusal dropped, an answer given at once) and runs tests. A mutant that no test
notices needs a test, or a reason why it changes no rule. Texts, types, `__str__` and `describe` are not mutated. The
score says that a rule cannot be weakened unseen by one such change, not more.

```bash
tox -e mutants                                              # every judge, and one slice of 14 of the library
tox -e mutants -- --changed main                            # what a branch changed; begins none after 4 minutes
tox -e mutants -- --only accuracy/compare
tox -e mutants -- --group library --slice 3                 # another slice
tox -e mutants -- --group library --slice tonight           # that of this day: all of them in two weeks
```

`--json RESULT.json` writes every result. After tests were added, `--again RESULT.json` tries what had survived and
takes the rest over.
"""

JUDGES = """
## Judges
A judge is a file that decides whether something else is right. All of its mutants are tried, by its own tests of
`scripts/mutants.toml`. What runs on the way to a judge is not mutated with it. On two cores that other work used as
well, a judge takes from 12 s (`rows.py`) to 11 minutes (`locate_error.py`, whose tests build models).

| judge | mutants | noticed | change no rule | not noticed |
|---|---:|---:|---:|---:|
"""

REASONS = "\n### Not noticed, by reason\n"

LIBRARY = """
## The library
`scripts/library.toml` names the files: models, cache, checkpoints, operators and graphs. They have {mutants} mutants,
and the fast lane has thousands of tests; so two things are left out:

- **A mutant is tried by the tests that reach it.** coverage records once which test of the fast lane reaches which
  line, in its own process or in one that it starts, and how long it takes. The tests of the file's own name go first,
  short ones before long ones, up to {budget:g} recorded seconds; then other tests of the same files, since what a
  fixture keeps is built by the first of them alone. What they do not notice counts as not noticed, whatever slower
  tests would have said. A test that fails must pass without the mutant, and fail with it alone.
- **A sample of one in {slices}**, by a hash of the mutant's name. "At first" is before tests were added for what the
  sample had shown, and speaks for the rest of the mutants; the interval is Wilson's, of 95 %.
"""

NOT_TRIED = """
{left} mutants of this slice were left for want of time: the columns say how many were tried. Where that is so, files
may have been tried in their order, and not at random: the intervals are of the files that were tried.
"""

FILES = """
| files | mutants | tried | noticed at first | noticed | change no rule | not noticed |
|---|---:|---:|---:|---:|---:|---:|
"""


def interval(noticed: int, tried: int) -> tuple[float, float]:
    """Wilson's 95 % for the share of all, from a sample."""
    z = 1.959964
    share, spread = noticed / tried, z * z / tried
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / tried + spread / 4 / tried)
    return middle - half, middle + half


def counts(judge: dict[str, Any]) -> list[int]:
    """How many were tried, noticed, changed no rule, and were not noticed."""
    score = {"killed": 0, "timeout": 0, "equal": 0, "survived": 0} | judge["score"]
    noticed = score["killed"] + score["timeout"]
    return [noticed + score["equal"] + score["survived"], noticed, score["equal"], score["survived"]]


def noticed_at_first(first: dict[str, str], last: dict[str, Any]) -> int:
    """Of what the last run tried: with a reason that holds then as now, a mutant could not be noticed."""
    equal = {result["name"] for result in last["results"] if result["outcome"] == "equal"}
    tried = {result["name"] for result in last["results"] if result["outcome"] != "left"} - equal
    return sum(outcome in ("killed", "timeout") and name in tried for name, outcome in first.items())


def changed_since(found: dict[str, dict[str, Any]]) -> str:
    """Which files have other mutants now than when they were tried."""
    changed = []
    for path, file in found.items():
        there = {mutation.name for mutation in mutations((ROOT / path).read_bytes())}
        if not {result["name"] for result in file["results"] if result["line"]} <= there:
            changed.append(f"`{path}`")
    if not changed:
        return ""
    line = f"Changed since, and not run again: {', '.join(changed)}. Their lines are of the files before."
    return "\n" + textwrap.fill(line, 118, break_on_hyphens=False, break_long_words=False) + "\n"


def area(path: str) -> str:
    parts = path.split("/")
    return parts[1].removesuffix(".py")


def judges_table(found: dict[str, dict[str, Any]]) -> str:
    text, totals = "", [0] * 4
    for path, judge in found.items():
        row = counts(judge)
        totals = [total + number for total, number in zip(totals, row, strict=True)]
        text += f"| `{path}` | {' | '.join(map(str, row))} |\n"
    return f"{text}| together | {' | '.join(map(str, totals))} |\n"


def library_table(found: dict[str, dict[str, Any]], first: First) -> str:
    """Every file, then every area with its intervals."""
    text = ""
    areas: dict[str, list[int]] = {}
    for path, file in found.items():
        tried, noticed, equal, survived = counts(file)
        row = [file["mutants"], tried, noticed_at_first(first.get(path, {}), file), noticed, equal, survived]
        for name in (area(path), "together"):
            areas[name] = [a + b for a, b in zip(areas.get(name, [0] * 6), row, strict=True)]
        text += f"| `{path}` | {' | '.join(map(str, row))} |\n"
    text += "\n| area | mutants | tried | at first | of all mutants that change a rule | noticed now | not noticed |\n"
    text += "|---|---:|---:|---:|---:|---:|---:|\n"
    areas["together"] = areas.pop("together")
    for name, (mutants, tried, before, noticed, equal, survived) in areas.items():
        rules = tried - equal
        if not rules:
            text += f"| {name} | {mutants} | {tried} | – | – | – | {survived} |\n"
            continue
        low, high = interval(before, rules)
        text += f"| {name} | {mutants} | {tried} | {before / rules:.1%} | {low:.1%} to {high:.1%} "
        text += f"| {noticed / rules:.1%} | {survived} |\n"
    return text


def reasons_of(found: dict[str, dict[str, Any]]) -> str:
    reasons: dict[str, list[str]] = {}
    text = ""
    for path, judge in found.items():
        for result in judge["results"]:
            place = f"`{Path(path).name}`, {result['name'].partition(':')[0]}"
            if result["outcome"] == "equal":
                reasons.setdefault(result["reason"], []).append(place)
            elif result["outcome"] == "survived":
                name = textwrap.shorten(result["name"], 200)
                text += _item(f"**A test is missing**: `{path}:{result['line']}`: `{name}`")
    for reason, places in reasons.items():
        text += _item(f"{reason[0].upper()}{reason[1:]}: {', '.join(dict.fromkeys(places))}.")
    return text


def _item(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) + "\n"


def page(found: dict[str, dict[str, Any]], first: First, before: str) -> str:
    """The whole page: a part without results stays as it is in the page ``before``."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = TEXT.format(date=datetime.date.today().isoformat(), versions=versions)
    kept = {part.partition("\n")[0]: part for part in before.split("\n## ")[1:]}
    judges = {path: file for path, file in found.items() if file.get("group", "judges") == "judges"}
    library = {path: file for path, file in found.items() if path not in judges}
    if judges:
        text += JUDGES + judges_table(judges) + changed_since(judges) + REASONS + reasons_of(judges)
    elif "Judges" in kept:
        text += f"\n## {kept['Judges'].rstrip()}\n"
    if library:
        one = next(iter(library.values()))
        mutants = sum(file["mutants"] for file in library.values())
        text += LIBRARY.format(mutants=mutants, budget=one["budget"], slices=one["slices"])
        left = sum(file["score"].get("left", 0) for file in library.values())
        text += NOT_TRIED.format(left=left) if left else ""
        text += FILES + library_table(library, first) + changed_since(library) + REASONS + reasons_of(library)
    elif "The library" in kept:
        text += f"\n## {kept['The library'].rstrip()}\n"
    return text


def main(*files: str) -> None:
    first: First = {}
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        found |= content
        for path, judge in content.items():
            for result in judge["results"]:
                if result["outcome"] != "left":
                    first.setdefault(path, {}).setdefault(result["name"], result["outcome"])
    PAGE.write_text(page(dict(sorted(found.items())), first, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
