# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w.*{}$-])[\w.-]+(?:/[\w.-]+)+\.py\b")
SPAN = re.compile(r"`([^`]+)`")

of_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def links(text: str) -> list[str]:
    """Where the links of a document go that stay in the repository."""
    found = LINK.findall(CODE.sub("", text))
    return [link for link in found if not re.match(r"[a-z]+:|#", link)]


def modules(text: str) -> list[str]:
    """The Python files with a folder that a document names in backticks or in blocks of code."""
    code = CODE.findall(text) + SPAN.findall(CODE.sub("", text))
    return [path for each in code for path in PATH.findall(each)]


def anchors(document: Path) -> set[str]:
    """What links may name behind ``#``, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ +(.+)$", CODE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_each_document
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in links(document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = document.parent / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@of_each_document
def test_python_files_that_are_named_exist(document: Path) -> None:
    places = (ROOT, ROOT / "vllm_medusa")
    named = modules(document.read_text(encoding="utf-8"))
    assert [path for path in named if not any((place / path).exists() for place in places)] == []


def test_the_checks_can_fail() -> None:
    text = "[a](b.md) [c](https://d/e) [f](#g)\n`h/i.py`, `j.py`\n```bash\npython k/l/m.py\n[n](o)\n```\n"
    assert links(text) == ["b.md"]
    assert modules(text) == ["k/l/m.py", "h/i.py"]
