"""How plug-ins and program files are found, made from their settings, and complained about."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from asmodel.errors import ConfigurationError
from asmodel.folders import load_folder, load_folders
from asmodel.plugins import find, make, names, resolve

FACTORIES = """
from __future__ import annotations
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from pydantic import BaseModel, SecretStr

if TYPE_CHECKING:
    from nowhere import Ghost

class Region(BaseModel):
    name: str
    size: int = 1

class Store:
    def __init__(self, *, path: Path, base_url: str = "", size: int | None = None, mode: Literal["a", "b"] = "a",
                 headers: dict[str, str] | None = None, region: Region | None = None, api_key: str = "",
                 name: str = "?", ghost: Ghost | None = None) -> None:
        self.given = dict(locals())
        del self.given["self"]

def everything(path: str, **others: int) -> dict[str, Any]:
    return {"path": path, **others}

def hidden(token: SecretStr) -> SecretStr:
    return token

def angry(api_key: str = "") -> None:
    raise ValueError(f"the key {api_key} is too short\\nand more")

def picky() -> None:
    from asmodel.errors import ConfigurationError
    raise ConfigurationError("model.gguf: is no model")

half = functools.partial(everything, path="here")
number = 3
"""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, with a module `factories` in it; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()
    modules, finders = dict(sys.modules), list(sys.meta_path)
    yield folder
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.meta_path[:] = finders


def install(site: Path, distribution: str, group: str, **entries: str) -> None:
    """A distribution as an installer leaves it, with entry points."""
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}", encoding="utf-8")
    importlib.invalidate_caches()


def refusal(kind: str, plugin: str, options: dict[str, Any] | None = None, /, **more: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        make(kind, plugin, options or {}, **more)
    return str(caught.value)


# Finding


def test_a_plug_in_is_found_by_the_name_of_its_entry_point(site: Path) -> None:
    install(site, "acme-store", "asmodel.caches", acme="factories:Store")
    assert inspect.isclass(find("caches", "acme"))


def test_listing_plug_ins_imports_none_of_them(site: Path) -> None:
    install(site, "acme-store", "asmodel.caches", acme="factories:Store")
    assert names("caches")["acme"].value == "factories:Store"
    assert "factories" not in sys.modules


def test_anything_importable_is_a_plug_in_by_module_and_attribute() -> None:
    assert find("upstreams", "factories:Store").__name__ == "Store"
    assert find("upstreams", "factories:Store.__init__").__name__ == "__init__"


def test_an_entry_point_may_be_a_module() -> None:
    install(Path(sys.path[0]), "acme-programs", "asmodel.programs", acme="factories")
    assert inspect.ismodule(resolve("programs", "acme"))


def test_an_unknown_name_is_answered_with_those_there_are(site: Path) -> None:
    install(site, "acme-store", "asmodel.caches", acme="factories:Store")
    told = refusal("caches", "acne")
    assert told.startswith('no plug-in of the kind "caches" is named "acne" (did you mean "acme"?); known are acme')


def test_there_are_no_other_kinds() -> None:
    with pytest.raises(
        ValueError, match="'hats' is no kind of plug-in; the kinds are caches, programs, tools, upstreams"
    ):
        names("hats")


def test_two_plug_ins_of_one_name_are_an_error_that_names_both_distributions(site: Path) -> None:
    install(site, "acme-store", "asmodel.caches", acme="factories:Store")
    install(site, "other-store", "asmodel.caches", acme="factories:everything")
    told = refusal("caches", "acme")
    assert "factories:Store of acme-store 1.0" in told
    assert "factories:everything of other-store 1.0" in told


def test_an_attribute_that_is_not_there_is_named() -> None:
    assert refusal("caches", "factories:Stor") == (
        'plug-in "factories:Stor": factories has no "Stor" (did you mean "Store"?)'
    )


def test_what_cannot_be_called_is_no_factory() -> None:
    assert refusal("caches", "factories:number") == (
        'plug-in "factories:number" of the kind "caches" is a int; a class or function is wanted'
    )


def test_a_failed_import_names_the_entry_point_the_line_and_the_reason(site: Path) -> None:
    (site / "broken.py").write_text("import factories\n\nimport not_there_at_all\n", encoding="utf-8")
    install(site, "acme-store", "asmodel.caches", acme="broken:Store")
    assert refusal("caches", "acme") == (
        f'plug-in "acme" (broken:Store of acme-store 1.0) cannot be imported: {site / "broken.py"}, line 3: '
        "ModuleNotFoundError: No module named 'not_there_at_all'"
    )


def test_a_syntax_error_is_told_with_its_own_line(site: Path) -> None:
    (site / "broken.py").write_text("x = 1\ny = = 2\n", encoding="utf-8")
    assert refusal("caches", "broken:x") == (
        f'plug-in "broken:x" cannot be imported: {site / "broken.py"}, line 2: SyntaxError: invalid syntax'
    )


def test_a_module_that_is_not_installed_is_told_so() -> None:
    assert refusal("caches", "no_such_module:x") == (
        "plug-in \"no_such_module:x\" cannot be imported: ModuleNotFoundError: No module named 'no_such_module' "
        "(is it installed, or its folder on PYTHONPATH?)"
    )


# Making


def test_options_are_given_as_keyword_arguments_of_the_annotated_types() -> None:
    options = {"path": "/x", "size": "3", "headers": {"a": "b"}, "region": {"name": "eu", "size": "2"}}
    store: Any = make("caches", "factories:Store", options)
    assert store.given["path"] == Path("/x")
    assert store.given["size"] == 3
    assert store.given["headers"] == {"a": "b"}
    assert (store.given["region"].name, store.given["region"].size) == ("eu", 2)


def test_context_goes_to_those_that_take_it() -> None:
    store: Any = make("upstreams", "factories:Store", {"path": "/x"}, name="fast", timeout=5)
    assert store.given["name"] == "fast"
    assert make("upstreams", "factories:everything", {"path": "/x"}, name="fast") == {"path": "/x"}


def test_every_option_that_is_wrong_is_told_with_its_place() -> None:
    options = {"bse_url": "http://x", "size": "many", "mode": "c", "region": {"name": 1}, "name": "me"}
    assert refusal("upstreams", "factories:Store", options, name="fast").splitlines() == [
        'upstreams.fast.bse_url: plug-in "factories:Store" has no such option (did you mean "base_url"?); '
        "it takes api_key, base_url, ghost, headers, mode, path, region, size",
        'upstreams.fast.size: a whole number is expected, got "many"',
        "upstreams.fast.mode: 'a' or 'b' is expected, got \"c\"",
        "upstreams.fast.region.name: text is expected, got 1",
        "upstreams.fast.name: is given by asmodel itself and cannot be set",
        'upstreams.fast.path: is missing, and plug-in "factories:Store" needs it',
    ]


def test_an_unknown_option_may_be_a_misspelt_setting_of_asmodels_own() -> None:
    told = refusal("caches", "factories:Store", {"path": "x", "progams": True}, where="cache", beside=["programs"])
    assert told.startswith('cache.progams: plug-in "factories:Store" has no such option (did you mean "programs"?)')


def test_a_factory_that_takes_anything_is_given_anything_of_its_type() -> None:
    assert make("upstreams", "factories:everything", {"path": "x", "n": "2"}) == {"path": "x", "n": 2}
    told = refusal("upstreams", "factories:everything", {"path": "x", "n": "two"}, where="upstreams.a")
    assert told == 'upstreams.a.n: a whole number is expected, got "two"'


def test_a_partial_function_is_a_factory() -> None:
    assert isinstance(find("upstreams", "factories:half"), functools.partial)
    assert make("upstreams", "factories:half", {"n": "2"}) == {"path": "here", "n": 2}


def test_a_secret_reaches_the_plug_in_as_it_wants_it() -> None:
    store: Any = make("upstreams", "factories:Store", {"path": "x", "api_key": SecretStr("s3cret")})
    assert store.given["api_key"] == "s3cret"
    assert make("upstreams", "factories:hidden", {"token": SecretStr("s3cret")}) == SecretStr("s3cret")


def test_a_secret_is_in_no_refusal() -> None:
    options = {"path": "x", "size": SecretStr("s3cret"), "headers": {"a": [SecretStr("s3cret")]}, "api_key": 5}
    told = refusal("upstreams", "factories:Store", options, name="fast")
    assert told.splitlines() == [
        "upstreams.fast.size: a whole number is expected, got a secret",
        "upstreams.fast.headers.a: text is expected, got a secret",
        "upstreams.fast.api_key: text is expected, got a secret",
    ]
    for key in (SecretStr("s3cret"), "s3cret"):
        told = refusal("upstreams", "factories:angry", {"api_key": key}, name="fast")
        assert told.endswith("ValueError: the key … is too short")


def test_a_factory_that_raises_is_told_with_its_line_and_reason(site: Path) -> None:
    line = FACTORIES.splitlines().index('def angry(api_key: str = "") -> None:') + 2
    assert refusal("caches", "factories:angry", where="cache") == (
        f'cache: plug-in "factories:angry" cannot be made: {site / "factories.py"}, line {line}: '
        "ValueError: the key  is too short"
    )


def test_what_a_factory_says_about_its_settings_is_passed_on() -> None:
    assert refusal("caches", "factories:picky", where="cache") == "model.gguf: is no model"


# Program files


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / f"{name.replace('__in__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def complaint(*folders: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_folders(folders)
    return str(caught.value)


def test_each_file_is_a_module_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", haiku="x = 1", answer="x = 2")
    (folder / "notes.txt").write_text("no program", encoding="utf-8")
    (folder / "data").mkdir()
    assert [(m.__name__, m.x) for m in load_folder(folder)] == [("programs.answer", 2), ("programs.haiku", 1)]


def test_files_for_tests_and_for_sharing_are_not_programs(tmp_path: Path) -> None:
    boom = "raise RuntimeError"
    folder = write(tmp_path / "p", _shared=boom, test_haiku=boom, conftest=boom, __init__=boom, haiku="")
    assert [m.__name__ for m in load_folder(folder)] == ["programs.haiku"]


def test_a_file_may_have_the_name_of_its_program(tmp_path: Path) -> None:
    (module,) = load_folder(write(tmp_path / "p", **{"evidence-qa": "x = 1"}))
    assert (module.__name__, module.x) == ("programs.evidence-qa", 1)


def test_files_share_what_is_in_a_sibling(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "p", _shared="thing = object()", a="from ._shared import thing", b="from programs.a import thing"
    )
    a, b = load_folder(folder)
    assert a.thing is b.thing


def test_a_sibling_imported_without_the_dot_is_answered_with_the_dot(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", shared_things="x = 1", a="\nfrom shared_things import x")
    assert complaint(folder) == (
        f"program file {folder / 'a.py'}, line 2: ModuleNotFoundError: No module named 'shared_things'; "
        "write `from .shared_things import …` for a file of the same folder"
    )


def test_a_package_is_one_program_with_relative_imports(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "p",
        big__in____init__="from .inner.deep import x\nfrom .part import y",
        big__in__part="from .. import big\ny = 2",
        big__in__inner__in____init__="",
        big__in__inner__in__deep="from ..part import y\nx = y + 1",
    )
    (module,) = load_folder(folder)
    assert (module.__name__, module.x, module.y) == ("programs.big", 3, 2)


def test_dataclasses_and_sources_work_in_program_files(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from pydantic import BaseModel\n@dataclass\nclass A:\n    b: ClassVar[B]\nclass B:\n    pass\n"
        "class M(BaseModel):\n    n: N | None = None\nclass N(BaseModel):\n    k: int\n"
    )
    (module,) = load_folder(write(tmp_path / "p", a=text))
    assert module.M.model_validate({"n": {"k": "1"}}).n.k == 1
    assert inspect.getsource(module.N) == "class N(BaseModel):\n    k: int\n"


def test_a_reload_runs_what_is_in_the_files_now(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", _shared="x = 1", a="from ._shared import x", gone="")
    first, _ = load_folder(folder)
    write(folder, _shared="x = 2")  # as long as before, and within the same second
    (folder / "gone.py").unlink()
    (second,) = load_folder(folder)
    assert (first.x, second.x) == (1, 2)
    assert sys.modules["programs.a"] is second
    assert "programs.gone" not in sys.modules


def test_a_load_writes_nothing_into_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", _shared="x = 1", a="from ._shared import x")
    load_folder(folder)
    assert {entry.name for entry in folder.iterdir()} == {"_shared.py", "a.py"}


def test_a_failed_reload_leaves_what_was_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a="def later():\n    from ._shared import x\n    return x", _shared="x = 1")
    (first,) = load_folder(folder)
    write(folder, b="1 / 0")
    assert complaint(folder) == f"program file {folder / 'b.py'}, line 1: ZeroDivisionError: division by zero"
    assert sys.modules["programs.a"] is first
    assert first.later() == 1


def test_a_syntax_error_in_a_program_is_told_with_file_and_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a="x = 1\n\ndef f(:\n")
    assert complaint(folder) == f"program file {folder / 'a.py'}, line 3: SyntaxError: invalid syntax"


def test_a_mistake_in_a_sibling_is_told_where_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a="from ._shared import x", _shared="import json\n\nx = json.loads('{')")
    told = complaint(folder)
    assert told.startswith(f"program file {folder / '_shared.py'}, line 3: JSONDecodeError: Expecting property name")


def test_a_program_that_exits_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a="import sys\nsys.exit(0)")
    assert complaint(folder) == f"program file {folder / 'a.py'}, line 2: SystemExit: 0"


@pytest.mark.parametrize("name", ["json", "asyncio__in____init__"])
def test_a_name_of_the_standard_library_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "p", **{name: "raise RuntimeError"})
    assert "is a module of the standard library; call the file" in complaint(folder)


def test_a_name_with_a_dot_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", **{"a.b": ""})
    assert complaint(folder).endswith('a module name has no dot, so call it "a_b"')


def test_two_folders_are_one_set_of_programs(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", a="from .b import x"), write(tmp_path / "2", b="x = 1")
    assert [m.__name__ for m in load_folders([one, two, one])] == ["programs.a", "programs.b"]
    write(two, a="")
    assert complaint(one, two) == (f'two program files are named "a": {one / "a.py"} and {two / "a.py"}; rename one')


def test_links_as_a_mounted_config_map_has_them_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder / "..2025_01_01", a="x = 1")
    (folder / "..data").symlink_to("..2025_01_01")
    (folder / "a.py").symlink_to("..data/a.py")
    (module,) = load_folder(folder)
    assert module.__file__ == str(folder / "a.py")


def test_a_folder_must_be_there(tmp_path: Path) -> None:
    assert complaint(tmp_path / "gone") == f"program folder {tmp_path / 'gone'} does not exist"
    file = write(tmp_path / "p", a="") / "a.py"
    assert complaint(file) == f"program folder {file} is a file; give the folder it is in"


def test_a_package_that_is_called_programs_already_is_not_hidden(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Program files that another test has loaded would be found in its place.
    monkeypatch.delitem(sys.modules, "programs", raising=False)
    write(site / "programs", __init__="")
    importlib.import_module("programs")
    told = complaint(write(tmp_path / "p", a=""))
    assert told.startswith(f'a package "programs" is imported already, from {site / "programs" / "__init__.py"}')
