# SPDX-License-Identifier: Apache-2.0
"""The public API is the names that the page python lists: each is there, documented, annotated and used by an example.

A docstring names in double backticks what a signature takes, unless the page's table of words explains it. It names the
errors that its function raises itself, or through helpers of its module.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple

import pytest

from pyvmm.cli.help import page
from pyvmm.errors import PyvmmError
from tests import notebooks
from tests.documents import ROOT, blocks

LISTED = [
    (module, name)
    for module, names in re.findall(r"^\| `(pyvmm\.[a-z_.]+)` \| (`[^|]*`) \|", page("python"), re.MULTILINE)
    for name in re.findall(r"`(\w+)`", names)
]
WORDS = {
    word
    for row in re.findall(r"^\| (`[^|]*`) \|", page("python").split("| word | is |")[1].split("\n\n")[0], re.MULTILINE)
    for word in re.findall(r"`(\w+)`", row)
}
"""Parameters that mean the same in every signature."""


class Public(NamedTuple):
    """A function of the API: how it is called, the function, and the docstring that a caller reads."""

    name: str
    function: Callable[..., Any]
    doc: str
    bound: bool

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """What a caller passes."""
        found = list(inspect.signature(self.function).parameters.values())
        return found[1:] if self.bound else found


def functions(module: str, name: str) -> Iterator[Public]:
    """Yield every function that a listed name gives its caller: itself, or a class's public methods and constructor."""
    listed = getattr(import_module(module), name)
    if isinstance(listed, FunctionType):
        yield Public(f"{module}.{name}", listed, listed.__doc__ or "", False)
    if not inspect.isclass(listed):
        return
    members = {key: value for kind in reversed(listed.__mro__) for key, value in vars(kind).items()}
    for key, value in members.items():
        function = raw(value)
        if function is None or not function.__module__.startswith("pyvmm.") or is_generated(function):
            continue
        bound = not isinstance(value, staticmethod)
        if key == "__init__":
            yield Public(f"{module}.{name}()", function, f"{listed.__doc__ or ''}\n{function.__doc__ or ''}", bound)
        elif not key.startswith("_"):
            yield Public(f"{module}.{name}.{key}", function, with_references(listed, key), bound)


def with_references(owner: type, method: str) -> str:
    """Return a method's docstring, and those of the methods of its class that it refers a reader to."""
    doc = inspect.getdoc(getattr(owner, method)) or ""
    others = re.findall(r":meth:`(\w+)`", doc)
    return "\n".join([doc, *(inspect.getdoc(getattr(owner, other)) or "" for other in others)])


def raw(member: object) -> FunctionType | None:
    """Return the function behind a method of any kind, or a property."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, classmethod | staticmethod):
        member = member.__func__
    found = inspect.unwrap(member) if callable(member) else None
    return found if isinstance(found, FunctionType) else None


def is_generated(function: FunctionType) -> bool:
    """Whether a dataclass or a NamedTuple made it."""
    return function.__code__.co_filename.startswith("<")


PUBLIC = [each for module, name in LISTED for each in functions(module, name)]
each_function = pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)


@cache
def module_functions(module: str) -> dict[str, ast.FunctionDef]:
    """Return every function and method of a module by its qualified name."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(inspect.getsource(import_module(module))).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}": each for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def raised(function: Callable[..., Any]) -> set[str]:
    """Return the names of the exceptions that a function raises, itself or through helpers of its module and class."""
    known, owner = module_functions(function.__module__), function.__qualname__.rpartition(".")[0]
    found, seen, ahead = set[str](), set[str](), [function.__qualname__]
    while ahead:
        name = ahead.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        for node in ast.walk(known[name]):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                found.add(node.exc.func.id)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                ahead.append(node.func.id)
            # A public method that is called documents its own errors.
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._"):
                ahead.append(f"{owner}.{ast.unparse(node.func).removeprefix('self.')}")
    return {each for each in found if each[:1].isupper()} - {"AssertionError"}  # that is a bug, no answer to a caller


def named(doc: str, error: str, module: str) -> bool:
    """Whether a docstring names an exception, or a class that it is derived from."""
    kind = getattr(import_module(module), error, None)
    names = [each.__name__ for each in kind.__mro__[:-3]] if inspect.isclass(kind) else []
    return any(re.search(rf"\b{each}\b", doc) for each in {error, *names})


# ---- the rules


def test_list_is_long_and_each_name_is_there() -> None:
    assert len(LISTED) > 25
    assert [f"{module}.{name}" for module, name in LISTED if not hasattr(import_module(module), name)] == []
    assert len(PUBLIC) > 150


@pytest.mark.parametrize(("module", "name"), LISTED, ids=lambda part: part)
def test_name_has_a_docstring(module: str, name: str) -> None:
    listed = getattr(import_module(module), name)
    if inspect.isclass(listed) or inspect.ismodule(listed) or callable(listed):
        assert listed.__doc__
        assert not listed.__doc__.startswith(f"{name}("), "it is the dataclass's own"
    else:  # a constant, whose docstring is a string below it
        body = ast.parse(inspect.getsource(import_module(module))).body
        [at] = [index for index, node in enumerate(body) if name in assigned(node)]
        below = body[at + 1]
        assert isinstance(below, ast.Expr)
        assert isinstance(ast.literal_eval(below.value), str)


def assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


@each_function
def test_function_has_a_docstring(public: Public) -> None:
    assert public.doc.strip()


@each_function
def test_signature_is_annotated_completely(public: Public) -> None:
    bare = [each.name for each in public.parameters if each.annotation is each.empty]
    signature = inspect.signature(public.function)
    assert bare == []
    assert signature.return_annotation is not signature.empty


@each_function
def test_docstring_says_what_the_function_takes(public: Public) -> None:
    names = [each.name for each in public.parameters]
    assert [name for name in names if name not in WORDS and f"``{name}``" not in public.doc] == []


@each_function
def test_docstring_says_what_the_function_raises(public: Public) -> None:
    module = public.function.__module__
    assert [error for error in sorted(raised(public.function)) if not named(public.doc, error, module)] == []


def test_errors_of_the_page_are_all_there_are_in_errors() -> None:
    errors = import_module("pyvmm.errors")
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, PyvmmError)}
    assert {name for module, name in LISTED if module == "pyvmm.errors"} <= kinds


# ---- examples


def examples() -> Iterator[str]:
    """Yield the source of every example: the documents' blocks, the files of pyvmm/examples, and notebooks' cells."""
    yield from (block.text for block in blocks("python"))
    yield from (path.read_text() for path in sorted((ROOT / "pyvmm" / "examples").glob("*.py")))
    for path in notebooks.NOTEBOOKS:
        yield from (source for _, source in notebooks.code_cells(notebooks.load(path)))


@cache
def used() -> frozenset[tuple[str, str]]:
    """Return (module, name) of every name that an example imports and then uses."""
    found = set()
    for source in examples():
        tree = ast.parse(source)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                found |= {(str(node.module), each.name) for each in node.names if each.name in names}
    return frozenset(found)


def test_every_name_of_pyvmms_that_an_example_uses_is_listed() -> None:
    own = {(module, name) for module, name in used() if module.partition(".")[0] == "pyvmm"}
    assert len(own) > 30
    assert sorted(own - set(LISTED)) == []


@pytest.mark.parametrize("module", dict.fromkeys(module for module, _ in LISTED))
def test_an_example_uses_each_module(module: str) -> None:
    assert [name for listed, name in LISTED if listed == module and (listed, name) in used()]


# ---- whether these would notice


def sample(path: str, *, width: int) -> None:
    """Do it with ``path``."""
    if path and width:
        _refuse()


def _refuse() -> None:
    raise ValueError("too wide")


def test_helper_that_raises_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {node.name: node for node in ast.parse(inspect.getsource(sample)).body if isinstance(node, ast.FunctionDef)}
    here |= {
        node.name: node for node in ast.parse(inspect.getsource(_refuse)).body if isinstance(node, ast.FunctionDef)
    }
    monkeypatch.setitem(globals(), "module_functions", lambda _module: here)
    assert raised(sample) == {"ValueError"}


@pytest.mark.parametrize("check", [test_docstring_says_what_the_function_takes, test_signature_is_annotated_completely])
def test_incomplete_function_is_noticed(check: Callable[[Public], None]) -> None:
    def bare(path, *, width):  # type: ignore[no-untyped-def]
        """Do it with ``path``."""

    with pytest.raises(AssertionError):
        check(Public("bare", bare, bare.__doc__ or "", False))
