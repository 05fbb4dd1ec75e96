"""Loads the program files of a folder: one file, or one package, is one module named `programs.NAME`.

A folder is read as it would be if it were a package called `programs`, whatever it is really called: its files may
import one another with `from .shared import x` (or `from programs.shared import x`), a folder in it that has an
`__init__.py` is one program module, and what starts with `_` or `test_`, and `conftest.py`, is not loaded by itself
(but may be imported: `_shared.py` is the place for what several programs share). Because of the name in front, a file
cannot hide a module of the standard library; it may not try either: it would, as soon as its folder is on the path.

Every load reads every file anew, past `sys.modules` and past byte code, and writes no byte code. It loads all or
nothing: the first mistake ends it, and what was loaded before stays as it was.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from asmodel.errors import ConfigurationError
from asmodel.mistakes import did_you_mean
from asmodel.plugins import failure

PACKAGE = "programs"


def load_folder(folder: Path) -> list[ModuleType]:
    """`load_folders` of one folder."""
    return load_folders([folder])


def load_folders(folders: Sequence[Path]) -> list[ModuleType]:
    """Load the program files of all folders, in the order of the folders and then of the names.

    What an earlier call loaded is replaced in `sys.modules`; the module objects that it returned keep working.

    Raises ConfigurationError, naming file and line: for a folder that is not there, a name that cannot be a module's
    or is the standard library's, one name in two folders, and whatever the files themselves raise.
    """
    # Absolute, but with symbolic links as they are: in a mounted ConfigMap each file is a link into a dated folder.
    roots = list(dict.fromkeys(Path(os.path.abspath(folder.expanduser())) for folder in folders))
    files: dict[str, Path] = {}
    for root in roots:
        for name, file in _program_files(root):
            if name in files:
                raise ConfigurationError(f'two program files are named "{name}": {files[name]} and {file}; rename one')
            files[name] = file

    before = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    package = before.get(PACKAGE)
    if package is not None and getattr(package, "__file__", None):
        raise ConfigurationError(
            f'a package "{PACKAGE}" is imported already, from {package.__file__}; '
            f"program files are loaded under that name, so rename that package"
        )
    finders = list(sys.meta_path)
    for name in before:
        del sys.modules[name]
    sys.meta_path[:] = [_Finder(), *(finder for finder in finders if not isinstance(finder, _Finder))]
    sys.modules[PACKAGE] = _package(roots)
    try:
        return [_load(name, file, roots) for name, file in files.items()]
    except BaseException:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.meta_path[:] = finders
        raise


class _Loader(SourceFileLoader):
    """From the source, always: byte code is told apart by whole seconds and size, and an edit may change neither."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Finder(MetaPathFinder):
    """Finds what is under `programs.`, and nothing else; it stays, for imports made while a program runs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None or not fullname.startswith(f"{PACKAGE}."):
            return None
        for entry in path:
            spec = FileFinder(entry, (_Loader, [".py"])).find_spec(fullname)
            if spec is not None and spec.loader is not None:
                return spec
        return None


def _is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _package(roots: Sequence[Path]) -> ModuleType:
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(root) for root in roots]
    package = ModuleType(PACKAGE, "The program files that the server was given.")
    package.__spec__ = spec
    package.__package__ = PACKAGE
    package.__path__ = spec.submodule_search_locations
    return package


def _program_files(root: Path) -> list[tuple[str, Path]]:
    """Name and file of each program module right in the folder, by name; of a package, its `__init__.py`."""
    if not root.is_dir():
        what = "is a file; give the folder it is in" if root.exists() else "does not exist"
        raise ConfigurationError(f"program folder {root} {what}")
    found: list[tuple[str, Path]] = []
    for entry in sorted(root.iterdir()):
        if entry.name.startswith((".", "_", "test_")) or entry.name == "conftest.py":
            continue
        if entry.suffix == ".py" and entry.is_file():
            name, file = entry.stem, entry
        elif (entry / "__init__.py").is_file():
            name, file = entry.name, entry / "__init__.py"
        else:
            continue
        if "." in name:
            raise ConfigurationError(
                f'program file {file}: a module name has no dot, so call it "{name.replace(".", "_")}"'
            )
        if name in sys.stdlib_module_names:
            raise ConfigurationError(
                f'program file {file}: "{name}" is a module of the standard library; '
                f'call the file "{name}_program" (the name of its program need not change)'
            )
        found.append((name, file))
    return found


def _load(name: str, file: Path, roots: Sequence[Path]) -> ModuleType:
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except (Exception, SystemExit) as error:
        places = [failure(error, within=f"{root}{os.sep}") for root in roots]
        place, reason = next(((place, reason) for place, reason in places if place), (str(file), places[0][1]))
        raise ConfigurationError(f"program file {place}: {reason}{_hint(error, roots)}") from error


def _hint(error: BaseException, roots: Sequence[Path]) -> str:
    """What to write where a file of the same folder was imported without the dot."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return ""
    siblings = [entry.stem for root in roots for entry in root.iterdir() if entry.suffix in {"", ".py"}]
    if error.name in siblings:
        return f"; write `from .{error.name} import …` for a file of the same folder"
    package, _, rest = error.name.rpartition(".")
    return did_you_mean(rest, siblings) if package == PACKAGE else ""
