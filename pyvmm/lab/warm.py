# SPDX-License-Identifier: Apache-2.0
"""Keep the standard library imported in the agent's interpreter. Python programs start in a fork of it.

Runs inside the lab only, beside the agent. Python needs two seconds to start under emulation, most of them for the
standard library. The agent imports nothing of pyvmm ahead: each fork imports the working tree's modules. All forks of
one saved lab share the seed of ``hash`` and the addresses of imported modules. ``random`` seeds itself again in each.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

HEADER = 16
"""Bytes before a module's code (PEP 552)."""
MODULES = """
_cffi_backend argparse array ast base64 binascii bisect codeop collections.abc concurrent.futures configparser
contextlib copy csv ctypes ctypes.util dataclasses datetime decimal difflib dis email.message encodings.idna enum
errno faulthandler fcntl fractions functools gc getpass glob gzip hashlib heapq html importlib.machinery
importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json linecache locale logging
math mmap numbers operator pathlib pickle platform queue random re readline resource runpy select selectors shlex
shutil signal socket stat statistics string struct structlog subprocess tempfile termios textwrap threading time
timeit tokenize tomllib traceback tty types typing unicodedata urllib.parse uuid warnings weakref zlib zoneinfo
"""
"""Modules of others that pyvmm's verbs import. Those that an image lacks are left out."""

pieces: list[bytes] = []
"""Byte code of the working tree, as bytecode.py makes it. A fork imports these modules from here."""

_ready = False


def prepare() -> None:
    """Import MODULES, and exclude them from garbage collection, which would copy their pages in a fork."""
    global _ready
    import gc
    from importlib import import_module

    for name in MODULES.split():
        try:
            import_module(name)
        except ImportError:
            continue
    gc.collect()
    gc.freeze()
    _ready = True


def is_ready(env: dict[bytes, bytes]) -> bool:
    """Whether a program with this environment can start here. Python reads its own variables only when it starts."""
    for_python = any(name.startswith(b"PYTHON") and name != b"PYTHONPATH" for name in env)
    return _ready and not for_python


class Become(BaseException):
    """Raised in a fork to leave the agent's stack. The module ``argv[0]`` then runs in its place."""

    def __init__(self, argv: list[bytes], env: dict[bytes, bytes]) -> None:
        super().__init__()
        self._argv = [os.fsdecode(word) for word in argv]
        self._env = {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}

    def run(self) -> None:
        """Run the module as ``python3 -P -m`` would. The interpreter handles what the module raises."""
        import runpy

        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the agent's descriptors
        os.environ.clear()
        os.environ.update(self._env)
        agent = sys.path.pop(0)
        sys.path[:0] = [path for path in self._env.get("PYTHONPATH", "").split(os.pathsep) if path]
        for name in [name for name in sys.modules if name == "pyvmm" or name.startswith("pyvmm.")]:
            del sys.modules[name]  # the agent's package has the same name
        sys.path_importer_cache.pop(agent, None)
        _import_from_pieces()
        _open_streams()
        sys.argv = list(self._argv)
        runpy.run_module(self._argv[0], run_name="__main__", alter_sys=True)


def _import_from_pieces() -> None:
    """Import the modules in the pieces from there, as if from their files."""
    import marshal
    from importlib.machinery import ModuleSpec, SourceFileLoader
    from importlib.util import MAGIC_NUMBER, spec_from_file_location

    modules: dict[str, tuple[str, bool, bytes]] = {}
    for piece in pieces:
        modules.update(marshal.loads(piece))

    class Loader(SourceFileLoader):
        """Loads a module's code from its piece, and everything else from its file."""

        def get_code(self, fullname: str) -> CodeType:
            code: CodeType = marshal.loads(memoryview(modules[fullname][2])[HEADER:])
            return code

    class Finder:
        """Finds modules that are in a piece and that this version of Python has compiled."""

        @staticmethod
        def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
            if name not in modules or modules[name][2][:4] != MAGIC_NUMBER:
                return None
            path, is_package, _ = modules[name]
            search = [os.path.dirname(path)] if is_package else None
            return spec_from_file_location(name, path, loader=Loader(name, path), submodule_search_locations=search)

    sys.meta_path.insert(0, Finder)


def _open_streams() -> None:
    """Open the standard streams as Python does when it starts, because the agent's are the console's."""
    for fd, name, mode, errors in (
        (0, "stdin", "r", "surrogateescape"),
        (1, "stdout", "w", "surrogateescape"),
        (2, "stderr", "w", "backslashreplace"),
    ):
        # Python buffers text by lines on a terminal, and always on stderr.
        stream = os.fdopen(fd, mode, buffering=1 if fd == 2 else -1, encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
