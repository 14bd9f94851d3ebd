"""Run at the start of every Python process of a test: transformers reads its own sources once.

At each import it looks for `__all__` in some 2,700 files, which is half the CPU time that a stage
worker needs to start, and stage workers are most of what these tests cost. Here the result is
stored in the file that UNICLUSTER_TESTS_IMPORTS names; nothing else differs from a start without.
"""

import hashlib
import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MODULE = "transformers.utils.import_utils"


# What an object needs to be there, and the names of each module that needs it.
Structure = dict[frozenset[str], dict[str, set[str]]]


def write(file: Path, structure: Structure) -> None:
    rows = [
        [sorted(needs), {module: sorted(names) for module, names in modules.items()}]
        for needs, modules in structure.items()
    ]
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(rows))
    part.replace(file)  # others start at the same time


def read(file: Path) -> Structure:
    rows = json.loads(file.read_text())
    return {
        frozenset(needs): {module: set(names) for module, names in modules.items()}
        for needs, modules in rows
    }


class Loader(importlib.abc.Loader):
    """Loads MODULE as `inner` does, and stores what `define_import_structure` returns."""

    def __init__(self, inner: importlib.abc.Loader, folder: Path) -> None:
        self._inner = inner
        self._folder = folder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        define = module.define_import_structure

        def stored(module_path: str, prefix: str | None = None) -> Structure:
            key = hashlib.sha256(f"{module_path} {prefix}".encode()).hexdigest()
            file = self._folder / f"{key[:16]}.json"
            if not file.is_file():
                write(file, define(module_path, prefix))
            return read(file)

        module.define_import_structure = stored  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, self._folder)
        return spec


if folder := os.environ.get("UNICLUSTER_TESTS_IMPORTS"):
    sys.meta_path.insert(0, Finder(Path(folder)))
