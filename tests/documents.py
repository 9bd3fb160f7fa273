# SPDX-License-Identifier: Apache-2.0
"""The code blocks of this repository's documents. Code must be fenced, and each block must name its language."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvmm.cli.help import DIRECTORY, TOPICS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *(DIRECTORY / f"{topic}.md" for topic in TOPICS))
LANGUAGES = ("sh", "python", "toml", "c", "text")
OUTPUT = "It prints:"
"""The line that stands between a Python block and its output, a text block with ``...`` for what varies."""

_OPERATORS = ("|", "||", "&&", ";", "&")
_REDIRECTIONS = (">", ">>", "<")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; ``line`` is the line of its fence. ``output`` is the documented output of a Python block."""

    document: str
    line: int
    language: str
    text: str
    output: str | None = None

    @property
    def name(self) -> str:
        """The place of the block, for the name of a test."""
        return f"{self.document}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return every block of that language in all documents."""
    return [block for path in DOCUMENTS for block in cut(path.name, path.read_text()) if block.language == language]


def cut(name: str, document: str) -> list[Block]:
    """Return the blocks of one document. Raises ValueError for code without a fence or a fence without a language."""
    found: list[Block] = []
    lines = document.splitlines()
    start = 0
    for number, line in enumerate(lines, 1):
        fence = line.strip().startswith("```")
        if fence and not start:
            start = number
            if line.strip("` ") not in LANGUAGES:
                raise ValueError(f"{name}:{number}: a block is one of {', '.join(LANGUAGES)}: {line}")
        elif fence:
            indent = len(lines[start - 1]) - len(lines[start - 1].lstrip())
            text = "".join(f"{each[indent:]}\n" for each in lines[start : number - 1])
            found.append(Block(name, start, lines[start - 1].strip("` "), text))
            start = 0
        elif not start and line.startswith("    ") and not lines[number - 2].strip():
            raise ValueError(f"{name}:{number}: code that is not fenced: {line}")
    if start:
        raise ValueError(f"{name}:{start}: a block without an end")
    return list(_with_outputs(found, lines))


def _with_outputs(found: list[Block], lines: list[str]) -> Iterator[Block]:
    for block, following in itertools.zip_longest(found, found[1:]):
        output = None
        if block.language == "python" and following is not None and following.language == "text":
            end = block.line + block.text.count("\n") + 1
            if [line for line in lines[end : following.line - 1] if line] == [OUTPUT]:
                output = following.text
        yield Block(block.document, block.line, block.language, block.text, output)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command in a shell block: without comments, redirections, and settings before it."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        tokens = iter(lexer)
        for token in tokens:
            if token in _OPERATORS:
                yield words
                words = []
            elif token in _REDIRECTIONS:
                next(tokens)
            elif words or not token.partition("=")[0].isidentifier() or "=" not in token:
                words.append(token)
        if words:
            yield words
