"""What `asmodel new` writes: a program that works as it is, and a test of it that needs no model."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from asmodel.errors import ConfigurationError
from asmodel.programs import NAME

_PROGRAM = '''"""{title}: say what a text is about, then write a haiku about that.

Each step shows the model only what its own arguments hold; everything else stays in Python.
"""

from asmodel import Run, program, step


@step(model="writer", temperature=0, max_tokens=16)
def subject(text: str) -> str:
    return f"Name the subject of this text in one or two words, and nothing else.\\n\\n{{text}}"


@step(model="writer", max_tokens=60)
def haiku(subject: str) -> str:
    return f"Write a haiku about {{subject}}. Three lines, nothing else."


@program("{name}")
async def {function}(run: Run) -> str:
    """Write a haiku about whatever the text is about."""
    about = await run(subject, run.question)
    return await run.reply(haiku, about)
'''

_TEST = '''"""{title} with a function in the model's place: what it is shown, and what is done with its answers."""

import asyncio
import importlib.util
from pathlib import Path

from asmodel.testing import FunctionUpstream, run_program

spec = importlib.util.spec_from_file_location("{module}", Path(__file__).with_name("{module}.py"))
assert spec and spec.loader
written = importlib.util.module_from_spec(spec)
spec.loader.exec_module(written)


def model(call):
    return "the sea" if "Name the subject" in call.messages[-1].text else "waves fold into waves"


def test_the_haiku_is_about_the_subject_and_never_sees_the_text():
    upstream = FunctionUpstream(model)
    answer = asyncio.run(run_program(written.{function}, "Salt, gulls, a long grey line.", upstream=upstream))
    assert answer.text == "waves fold into waves"
    shown = [call.messages[-1].text for call in upstream.calls]
    assert "the sea" in shown[1]
    assert "gulls" not in shown[1]


def test_what_a_step_shows_needs_no_model_at_all():
    assert "fog" in written.haiku("fog")
'''


def write(name: str, folder: Path) -> list[Path]:
    """Write the program's file and its test into the folder. Raises ConfigurationError if one is there already."""
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f'"{name}" cannot be a program\'s name: lower-case letters, digits and single hyphens, such as my-program'
        )
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise ConfigurationError(f'"{name}" begins with a digit, which a Python module cannot; put a letter first')
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        module += "_program"  # A file may not be called so; the program may.
    # The names that the file uses itself, for its steps and what it imports.
    function = f"{module}_program" if module in ("haiku", "subject", "program", "step") else module
    files = {folder / f"{module}.py": _PROGRAM, folder / f"test_{module}.py": _TEST}
    for path in files:
        if path.exists():
            raise ConfigurationError(f"{path} is there already; choose another name, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    title = name.replace("-", " ").capitalize()
    for path, text in files.items():
        path.write_text(text.format(name=name, title=title, module=module, function=function))
    return list(files)
