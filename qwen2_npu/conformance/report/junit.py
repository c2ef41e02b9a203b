"""pytest's JUnit files, read back as cases."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Outcome = Literal["passed", "failed", "skipped"]

_BAD = {"failure": "failed", "error": "failed", "skipped": "skipped"}


@dataclass(frozen=True)
class JUnitCase:
    """One test.

    Attributes:
        module: dotted, as ``tests.graph.test_census``.
        parameters: what stands in the brackets of its id, or empty.
        message: of a failure or skip, whole.
    """

    module: str
    function: str
    parameters: str
    outcome: Outcome
    message: str
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Parts of the parameters, ``up_to_`` and ``only_`` taken off: steps stand alone then."""
        parts = self.parameters.split("-")
        return tuple(part.removeprefix("up_to_").removeprefix("only_") for part in parts)


@dataclass(frozen=True)
class Session:
    """One file. ``properties``: of the whole session, see ``junit_plugin``. ``created``: ISO 8601."""

    path: Path
    properties: dict[str, str]
    created: str
    cases: tuple[JUnitCase, ...]


def read(path: Path) -> Session:
    """A JUnit file.

    Raises:
        ValueError: it is damaged: the session that wrote it was killed, or it is something else.
    """
    if not path.is_file() and path.exists():
        raise ValueError("it is not a regular file")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"{path} is not a complete JUnit file ({error}): was pytest stopped while it ran?") from error
    suites = list(root.iter("testsuite"))
    if not suites:
        raise ValueError(f"{path} is not a JUnit file: it holds no testsuite")
    properties = {name: value for suite in suites for name, value in _properties(suite)}
    cases = tuple(_case(element) for suite in suites for element in suite.iter("testcase"))
    return Session(path, properties, suites[0].get("timestamp", ""), cases)


def _properties(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for properties in element.findall("properties"):
        for entry in properties.findall("property"):
            yield entry.get("name", ""), entry.get("value", "")


def _case(element: ElementTree.Element) -> JUnitCase:
    name, _, rest = element.get("name", "").partition("[")
    outcome: Outcome = "passed"
    messages = []
    for child in element:
        if child.tag not in _BAD:
            continue
        outcome = "failed" if "failed" in (outcome, _BAD[child.tag]) else "skipped"
        message, text = child.get("message", ""), child.text or ""
        # A failure's text is its source and traceback, mostly with the message in it; a skip's only its place.
        whole = text if text.startswith(message) else f"{message}\n{text}"
        messages.append(message if child.tag == "skipped" else whole)
    return JUnitCase(
        module=element.get("classname", ""),
        function=name,
        parameters=rest.removesuffix("]"),
        outcome=outcome,
        message="\n".join(messages).strip(),
        properties=dict(_properties(element)),
    )
