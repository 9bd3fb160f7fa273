# SPDX-License-Identifier: Apache-2.0
"""The documents are correct: commands parse, files exist, links have targets, facts agree with the claims."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from pyvmm import cli
from pyvmm.atlas.claim import GROUPS, all_claims
from pyvmm.atlas.expected import Key, expected
from pyvmm.cli import ctl
from pyvmm.cli.help import TOPICS, page
from pyvmm.errors import PyvmmError
from pyvmm.experiment import Experiment, Verdict
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import Machine
from pyvmm.options.contradictions import check_run, kernel_of
from pyvmm.protection import Protection
from tests.documents import DOCUMENTS, ROOT, Block, blocks, commands, cut

FOREIGN = {"truncate", "socat", "gdb-multiarch", "dmesg", "grep", "echo", "ls", "git", "pip", "sh", "cat", "apt"}
"""Commands of other programs that documents name."""
EXAMPLES = {"example.py", "mine.py"}
"""Files that a reader is told to write."""
PREFIXES = ("time", "./.run")
SOURCES = {".py", ".pyi", ".c", ".h", ".S", ".ld", ".sh", ".toml", ".config", ""}


def test_readme_has_200_lines_at_most() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_readme_has_the_two_commands() -> None:
    said = [words for block in blocks("sh") if block.document == "README.md" for words in commands(block.text)]
    assert ["./.run", "pyvmm", "demo"] in said
    assert ["./.run", "pytest"] in said


# ---- shell


def check_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fail if a command of a document is not valid."""
    while words[0] in PREFIXES:
        words = words[1:]
    program, *rest = words
    if program == "pyvmm":
        check_pyvmm(rest, capsys)
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "pytest":
        for word in rest:
            check_test(word)
    elif "/" in program:
        assert (ROOT / program).is_file(), program
    else:
        assert program in FOREIGN | {"ruff", "mypy", "pyright"}, program


def check_pyvmm(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Parse a pyvmm command, and have its verb check it as far as possible without KVM or a lab."""
    try:
        args = cli.make_parser(words).parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if not args.lab:
        cli.refuse_lab_options(args, words)
    own = list(args.verb_argv)
    if args.verb in ("run", "map", "trace") and args.restore is None:
        check_run(args)
        if kernel_of(args).startswith("payload:") and args.verb == "run":
            assert cli.main([*own, "--dry-run"]) == 0, capsys.readouterr().err
    elif args.verb == "help" and args.topic is not None:
        assert args.topic in TOPICS
    elif args.verb == "ctl":
        ctl.parse(args.words)
    elif args.verb in ("atlas", "bench") and own[1:2] not in (["diff"], ["compare"], ["report"], ["sweep"]):
        assert cli.main([*own, "--list"]) == 0, capsys.readouterr().err
    elif args.verb == "lab" and getattr(args, "command", None):
        check_command(args.command[args.command[0] == "--" :], capsys)


def check_python(words: list[str]) -> None:
    """Fail if a module or file does not exist, or if its source lacks an option."""
    if words[0] == "-c":
        imports = [node for node in ast.parse(words[1]).body if isinstance(node, ast.ImportFrom)]
        assert imports
        for node in imports:
            assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names)
        return
    if words[0] != "-m":
        assert words[0] in EXAMPLES or (ROOT / words[0]).is_file(), words[0]
        return
    path = ROOT / words[1].replace(".", "/")
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__main__.py"
    text = source.read_text()
    for word in words[2:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{source.name} knows no {word}"


def check_test(word: str) -> None:
    """Fail if a test does not exist."""
    path, _, name = word.partition("::")
    if not word.startswith("-"):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), word


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.name)
def test_commands_in_blocks_are_valid(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(commands(block.text))
    assert found
    for words in found:
        check_command(words, capsys)


@pytest.mark.parametrize(
    "line",
    [
        "pyvmm run --no-such-option payload:hello",
        "pyvmm --lab frobnicate",
        "pyvmm --lab-icount run payload:hello",
        "pyvmm run payload:nobody",
        "pyvmm run --trace-faults payload:hello",
        "pyvmm help nothing",
        "pyvmm ctl explode",
        "pyvmm --lab atlas share/nothing-of-the-kind",
        "pyvmm --lab bench fault --axis colour=red",
        "pyvmm lab exec -- python3 -m tests.bench.nothing",
        "python -m tests.bench.exit_cost --no-such-option",
        "python native/nothing.py",
        "pytest tests/unit/test_start.py::test_of_nothing",
        "frobnicate",
        ".ci/nothing",
    ],
)
def test_a_wrong_command_is_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    [words] = commands(line)
    with pytest.raises((AssertionError, pytest.fail.Exception, PyvmmError, OSError)):
        check_command(words, capsys)


def test_the_words_of_commands_are_found() -> None:
    text = "A=1 time pyvmm x 'a b' # why\n\necho 1 > /dev/null && pyvmm y \\\n  z | grep q\n# only why\n"
    assert list(commands(text)) == [
        ["time", "pyvmm", "x", "a b"],
        ["echo", "1"],
        ["pyvmm", "y", "z"],
        ["grep", "q"],
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_sentences_are_valid(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in re.findall(r"`((?:python|pytest) [^`]*)`", document.read_text()):
        for words in commands(line):
            if "-P" not in words:  # a measurement starts those
                check_command(words, capsys)


# ---- other blocks


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.name)
def test_toml_blocks_can_be_read(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n\n    code\n", "a.md:3: code that is not fenced"),
        ("```\ncode\n```\n", "a.md:1: a block is one of"),
        ("```sh\nls\n", "a.md:1: a block without an end"),
    ],
)
def test_code_without_a_fence_is_noticed(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        cut("a.md", text)


def test_python_block_has_the_output_that_follows_it() -> None:
    block, output = cut("a.md", "```python\nprint(1)\n```\n\nIt prints:\n\n```text\n1\n```\n")
    assert (block.text, block.output, output.language) == ("print(1)\n", "1\n", "text")
    block, _ = cut("a.md", "```python\nprint(1)\n```\n\nSomething else:\n\n```text\n1\n```\n")
    assert block.output is None


# ---- links


def links(document: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, anchor) of every relative link of a document, pictures included."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_targets(document: Path) -> None:
    for path, anchor in links(document):
        target = document.parent / path if path else document
        assert target.exists(), f"{path} does not exist"
        assert not anchor or anchor in anchors(target), f"{path} has no {anchor}"


def test_readme_links_to_every_page() -> None:
    leads = {path for path, _ in links(ROOT / "README.md")}
    assert {f"pyvmm/docs/{topic}.md" for topic in TOPICS} <= leads


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_verbs_and_topics_in_sentences_exist(document: Path) -> None:
    for verb, topic in re.findall(r"`pyvmm (help ([a-z-]+)|[a-z]+)", document.read_text()):
        assert topic in TOPICS if topic else verb in cli.VERBS, verb


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_in_sentences_exist(document: Path) -> None:
    pattern = r"`((?:pyvmm|native|firmware|tests|\.ci|\.github)/[\w./-]*)`"
    named = [path for path in re.findall(pattern, document.read_text()) if "NAME" not in path]
    assert [path for path in named if not (ROOT / path).exists()] == []


def sources() -> Iterator[tuple[str, str]]:
    """Yield (path, text) of every source."""
    for path in ROOT.rglob("*"):
        parts = set(path.relative_to(ROOT).parts)
        others = {".venv", ".git", ".hypothesis", "corpus"} & parts or any(part.endswith("cache") for part in parts)
        if path.suffix in SOURCES and path.is_file() and not others:
            yield str(path.relative_to(ROOT)), path.read_text(errors="replace")


def test_no_source_cites_a_missing_document() -> None:
    found = []
    for path, text in sources():
        cited = set(re.findall(r"[\w./-]+\.md\b", text)) - {"a.md"}
        found += [f"{path}: {name}" for name in cited if not is_there(name)]
    assert found == []


def test_no_source_names_a_missing_page() -> None:
    named = [topic for _, text in sources() for topic in re.findall(r"pyvmm help ([a-z][a-z-]+)", text)]
    assert "private-memory" in named
    assert set(named) - set(TOPICS) == {"nothing"}  # used above as a wrong page


def is_there(name: str) -> bool:
    return any((ROOT / home / name).exists() for home in (".", "pyvmm/docs", ".github"))


# ---- facts


CLAIMS = {claim.id: claim for claim in all_claims()}
ON_7_3 = expected({"kernel": "7.3", "mode": "protected"}, CLAIMS.values())
FACTS = {"fact under `pkvm`": Protection.PKVM, "fact in a plain VM": Protection.NONE}
"""The head of a table of facts, and the protection that its claims are told of."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_claims_in_sentences_exist(document: Path) -> None:
    names = re.findall(rf"`((?:{'|'.join(GROUPS)})/[a-z0-9-]+)`", document.read_text())
    assert [name for name in names if name not in CLAIMS] == []


def rows(document: Path) -> Iterator[tuple[Protection, str]]:
    """Yield every row of a table of facts, with the protection that the table is about."""
    about = None
    for line in document.read_text().splitlines():
        if not line.startswith("|"):
            about = None
        elif line.split("|")[1].strip() in FACTS:
            about = FACTS[line.split("|")[1].strip()]
        elif about is not None and not line.startswith("|---"):
            yield about, line


def verdicts(name: str, protection: Protection) -> set[Verdict]:
    found: dict[Key, Verdict] = {key: verdict for key, verdict in ON_7_3.items() if key[:2] == (name, protection.value)}
    return set(found.values())


def test_facts_agree_with_the_expectations_of_the_atlas() -> None:
    told = 0
    for protection, row in (row for document in DOCUMENTS for row in rows(document)):
        for name, denied in re.findall(r"`([a-z-]+/[a-z0-9-]+)`( does not hold)?", row):
            assert (Verdict.FAILS if denied else Verdict.HOLDS) in verdicts(name, protection), (row, name)
            told += 1
    assert told > 30


@pytest.mark.parametrize(
    ("owner", "head"), [(Machine, "## Machine"), (Experiment, "## Experiment"), (Puppet, "## Give a live guest orders")]
)
def test_documented_public_members_exist(owner: type, head: str) -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", page("python").split(head)[1].split("\n## ")[0], re.MULTILINE)
    members = re.findall(r"`(\w+)", " ".join(rows))
    assert len(members) > 7
    assert [member for member in members if member not in vars_of(owner)] == []


def vars_of(owner: type) -> set[str]:
    """Return the attributes of a class, and those that its methods set on an instance."""
    own = {name for kind in owner.__mro__ for name in vars(kind)}
    return own | set(re.findall(r"\bself\.(\w+)", "".join(map(inspect.getsource, owner.__mro__[:-1]))))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_counts_of_claims_are_right(document: Path) -> None:
    for claims, experiments in re.findall(r"(\d+) claims(?: and|,) (\d+) experiments", document.read_text()):
        assert int(claims) == len(CLAIMS)
        assert int(experiments) == sum(len(claim.places) for claim in CLAIMS.values())
