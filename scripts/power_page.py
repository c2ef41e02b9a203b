"""Takes results of ``mutants.py`` into docs/power.json, and writes docs/power.md from it.

    python scripts/power_page.py RESULT.json …      later ones count
    python scripts/power_page.py                    the page alone

power.json has a judge as it was last tried. Of each file of the library it has the mutants that were tried, as
``mutations.key_of`` names them: ``noticed``; ``later``, noticed since tests were added; ``missed``, which no test
notices. The page counts those that the file has today. What no result speaks of stays.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from judges import NOTICED
from library import Library
from mutations import key_of, mutations

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "power.md"
KEPT = ROOT / "docs" / "power.json"
Entry = dict[str, Any]
"""What is said of one file: see :func:`summary`."""

GROUPS = ("noticed", "later", "missed")

PACKAGES = ("torch", "torch_npu", "transformers", "pytest")

TEXT = """# Power: is a rule held by a test?

Written by `scripts/power_page.py` on {date} from results of `scripts/mutants.py`, the last ones with
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
tox -e mutants -- --group library --slices 1 --pick untried --minutes 60   # what this page has no result of
tox -e mutants -- --group library --slices 1 --pick missed             # what it says that no test noticed
```

`--json RESULT.json` writes every result, and `python scripts/power_page.py RESULT.json` takes it into this page. After
tests were added, `--again RESULT.json` tries what had survived and takes the rest over. Results are kept by the names
of mutants: one whose text is another now counts as not tried.
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
- **{tried} of them were tried**, in no order that the files have, so they are a sample of the rest. "At first" is
  before tests were added for those that no test had noticed, and speaks for what was not tried; the interval is
  Wilson's, of 95 %. "Of all" takes its lower limit for what was not tried, and what is noticed now for the others.

Before names were kept, in November 2026, 1,309 of 8,844 were tried, of four slices: 90.0% were noticed at first (88.3%
to 91.6%). They are not counted here. The 850 of 30 November were tried with seconds of a machine that had other work:
213 with them as they were, the others with 0.4 of them; what the former left unnoticed was tried again with the latter.
What survived that was tried again with the fast unit tests of its file, not by the script.
"""

FILES = """
| file | mutants | tried | noticed at first | noticed | change no rule | not noticed |
|---|---:|---:|---:|---:|---:|---:|
"""


def interval(noticed: int, tried: int) -> tuple[float, float]:
    """Wilson's 95 % for the share of all, from a sample."""
    z = 1.959964
    share, spread = noticed / tried, z * z / tried
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / tried + spread / 4 / tried)
    return middle - half, middle + half


def digest(path: str) -> str:
    """Of the names of a file's mutants: where there are other ones now, they are to be tried again."""
    names = "\n".join(mutation.name for mutation in mutations((ROOT / path).read_bytes()))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def summary(path: str, result: dict[str, Any]) -> Entry:
    """What is kept of the result of a judge."""
    noticed = sum(each["outcome"] in NOTICED for each in result["results"])
    unnoticed = [
        {name: each[name] for name in ("name", "line", "outcome", "reason")}
        for each in result["results"]
        if each["outcome"] in ("equal", "survived")
    ]
    entry = {"mutants": result["mutants"], "tried": noticed + len(unnoticed), "noticed": noticed}
    return entry | {"digest": digest(path), "unnoticed": unnoticed}


def counts(entry: Entry) -> list[int]:
    """How many were tried, noticed, changed no rule, and were not noticed."""
    equal = sum(each["outcome"] == "equal" for each in entry["unnoticed"])
    return [entry["tried"], entry["noticed"], equal, len(entry["unnoticed"]) - equal]


def add(known: dict[str, list[str]], path: str, results: list[dict[str, Any]]) -> None:
    """Results of a file of the library: what was missed once and is noticed now is so ``later``."""
    keys = {group: set(known.get(group, ())) for group in GROUPS}
    for each in results:
        key = key_of(path, each["name"])
        if each["outcome"] in NOTICED:
            group = "later" if key in keys["missed"] | keys["later"] else "noticed"
        elif each["outcome"] in ("equal", "survived"):
            group = "missed"
        else:
            continue
        for name in GROUPS:
            keys[name].discard(key)
        keys[group].add(key)
    there = {key_of(path, mutation.name) for mutation in mutations((ROOT / path).read_bytes())}
    known.update({group: sorted(keys[group] & there) for group in GROUPS})


def count(path: str, known: dict[str, list[str]], reasons: dict[str, str]) -> Entry:
    """Of the mutants that a file of the library has now, as :func:`summary` says it of a judge."""
    group_of = {key: group for group, keys in known.items() for key in keys}
    every = mutations((ROOT / path).read_bytes())
    groups = [(mutation, group_of.get(key_of(path, mutation.name))) for mutation in every]
    first, later = (sum(group == name for _, group in groups) for name in ("noticed", "later"))
    unnoticed = [
        {"name": m.name, "line": m.line, "outcome": "equal" if m.name in reasons else "survived"}
        | {"reason": reasons.get(m.name, "")}
        for m, group in groups
        if group == "missed"
    ]
    tried = first + later + len(unnoticed)
    return {"mutants": len(every), "tried": tried, "first": first, "noticed": first + later, "unnoticed": unnoticed}


def changed_since(found: dict[str, Entry]) -> str:
    """Which files have other mutants now than when they were tried."""
    changed = [f"`{path}`" for path, entry in found.items() if entry["digest"] != digest(path)]
    if not changed:
        return ""
    line = f"Changed since, and not run again: {', '.join(changed)}. Their lines are of the files before."
    return "\n" + textwrap.fill(line, 118, break_on_hyphens=False, break_long_words=False) + "\n"


def area(path: str) -> str:
    parts = path.split("/")
    return parts[1].removesuffix(".py")


def judges_table(found: dict[str, Entry]) -> str:
    text, totals = "", [0] * 4
    for path, judge in found.items():
        row = counts(judge)
        totals = [total + number for total, number in zip(totals, row, strict=True)]
        text += f"| `{path}` | {' | '.join(map(str, row))} |\n"
    return f"{text}| together | {' | '.join(map(str, totals))} |\n"


def library_table(found: dict[str, Entry]) -> str:
    """Every file, then every area with its intervals."""
    text = ""
    areas: dict[str, list[int]] = {}
    for path, file in found.items():
        tried, noticed, equal, survived = counts(file)
        row = [file["mutants"], tried, file["first"], noticed, equal, survived]
        for name in (area(path), "together"):
            areas[name] = [a + b for a, b in zip(areas.get(name, [0] * 6), row, strict=True)]
        text += f"| `{path}` | {' | '.join(map(str, row))} |\n"
    text += "\n| area | mutants | tried | at first | interval | noticed now | not noticed | of all |\n"
    text += "|---|---:|---:|---:|---:|---:|---:|---:|\n"
    areas["together"] = areas.pop("together")
    for name, (mutants, tried, before, noticed, equal, survived) in areas.items():
        rules = tried - equal
        if not rules:
            text += f"| {name} | {mutants} | {tried} | – | – | – | {survived} | – |\n"
            continue
        low, high = interval(before, rules)
        text += f"| {name} | {mutants} | {tried} | {before / rules:.1%} | {low:.1%} to {high:.1%} "
        now, known = noticed / rules, tried / mutants
        text += f"| {now:.1%} | {survived} | {now * known + low * (1 - known):.1%} |\n"
    return text


def reasons_of(found: dict[str, Entry]) -> str:
    reasons: dict[str, list[str]] = {}
    text = ""
    for path, judge in found.items():
        for result in judge["unnoticed"]:
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


def page(kept: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = TEXT.format(date=datetime.date.today().isoformat(), versions=versions)
    judges: dict[str, Entry] = dict(sorted(kept["judges"].items()))
    text += JUDGES + judges_table(judges) + changed_since(judges) + REASONS + reasons_of(judges)
    table = Library.load(ROOT)
    library = {
        path: count(path, kept["library"].get(path, {}), table.equal.get(path, {})) for path in table.paths(ROOT)
    }
    mutants, tried = (sum(file[name] for file in library.values()) for name in ("mutants", "tried"))
    text += LIBRARY.format(mutants=mutants, budget=kept["budget"], tried=tried)
    return text + FILES + library_table(library) + REASONS + reasons_of(library)


def take(kept: dict[str, Any], results: dict[str, Any]) -> None:
    """The results of one run into what is kept."""
    for path, result in results.items():
        if result["group"] == "judges":
            kept["judges"][path] = summary(path, result)
        else:
            add(kept["library"].setdefault(path, {}), path, result["results"])
            kept["budget"] = result["budget"]


def written(kept: dict[str, Any]) -> str:
    """JSON with one line for each group of keys."""
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    return re.sub(r'(?<=\[)\s+((?:"[0-9a-f]{8}",?\s*)+)(?=\])', lambda m: " ".join(m[1].split()), text) + "\n"


def main(*files: str) -> None:
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    for file in files:
        take(kept, json.loads(Path(file).read_text(encoding="utf-8")))
    text = page(kept)
    KEPT.write_text(written(kept), encoding="utf-8")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
