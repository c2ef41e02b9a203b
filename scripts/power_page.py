"""Writes docs/power.md from results of ``mutants.py``: ``python scripts/power_page.py RESULT.json …``

Of a judge that is in several files, the last one counts.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "power.md"
PACKAGES = ("torch", "torch_npu", "transformers", "pytest")

TEXT = """# Power: is a rule that judges held by a test?

Written by `scripts/power_page.py` from results of `scripts/mutants.py` on {date}:
{versions}.
On the CPU and the emulated NPU, not on a real one.

A judge is a file that decides whether something else is right. The script changes one small thing in it (a comparison,
`and` and `or`, a limit, a loop that sees the first element only, an element left out of a list, a refusal dropped, an
answer given at once) and runs the judge's own tests of `scripts/mutants.toml`. A mutant that no test notices needs a
test, or a reason why it changes no rule. Texts, types, `__str__` and `describe` are not mutated, and neither is what
runs on the way to a judge: the score says that these rules cannot be weakened unseen by one such change, not more.

```bash
tox -e mutants                          # every judge
tox -e mutants -- --changed main        # judges that changed, or whose tests did
tox -e mutants -- --only accuracy/compare
```

On two cores that other work used as well, a judge took from 12 s (`rows.py`) to 11 minutes (`locate_error.py`, whose
tests build models). After tests were added, `--again RESULT.json` tries what had survived and takes the rest over; so
it was done for eight judges of this page.

| judge | mutants | noticed | change no rule | not noticed |
|---|---:|---:|---:|---:|
"""


def page(found: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = TEXT.format(date=datetime.date.today().isoformat(), versions=versions)
    totals = [0] * 4
    for path, judge in found.items():
        score = {"killed": 0, "timeout": 0, "equal": 0, "survived": 0} | judge["score"]
        noticed = score["killed"] + score["timeout"]
        row = [sum(judge["score"].values()), noticed, score["equal"], score["survived"]]
        totals = [total + number for total, number in zip(totals, row, strict=True)]
        text += f"| `{path}` | {' | '.join(map(str, row))} |\n"
    text += f"| together | {' | '.join(map(str, totals))} |\n\n## Not noticed, by reason\n"
    reasons: dict[str, list[str]] = {}
    for path, judge in found.items():
        for result in judge["results"]:
            if result["outcome"] in ("equal", "survived"):
                reason = result["reason"] or "**a test is missing**"
                reasons.setdefault(reason, []).append(f"`{Path(path).name}`, {result['name'].partition(':')[0]}")
    for reason, places in reasons.items():
        line = f"{reason[0].upper()}{reason[1:]}: {', '.join(dict.fromkeys(places))}."
        text += textwrap.fill(line, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) + "\n"
    return text


def main(*files: str) -> None:
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        found |= json.loads(Path(file).read_text(encoding="utf-8"))
    PAGE.write_text(page(dict(sorted(found.items()))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
