"""`docs/api.md`, made from the docstrings.

    python -m tools.api_reference > docs/api.md

Signatures are parsed from the sources, so that the page does not depend on Python's version.
Docstrings are those of the imported objects, so that a decorator may complete them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "bifrost_rt"
BASE_ERROR = "BifrostError"
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
WIDTH = 88

TOP = """# Python API

Made from the docstrings by `python -m tools.api_reference`. The
[guide](guides/python.md) shows how to use it. What is not on this page may change without notice.
"""

# Public modules beside the package itself: heading, module, what it is for.
MODULES = (
    ("Latents files", "bifrost_rt.latents_file", "CLIP latents of a run as a file."),
    ("Warnings of a run", "bifrost_rt.notes", "What `Result.notes` holds."),
    (
        "Backends",
        "bifrost_rt.backends.base",
        "What a backend implements ([guide](guides/add-a-backend.md)).",
    ),
)
# Of these modules, the names that a user meets; of the others, every public one.
ONLY = {
    "bifrost_rt.notes": ("Note", "Truncation"),
    "bifrost_rt.backends.base": ("Buffer", "Engine", "Backend", "HostMemory", "check_bindings"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class Entry:
    """A definition under the name by which users reach it, and the object that it makes."""

    name: str
    node: Definition
    made: Any


def document() -> str:
    """Return the page, in Markdown.

    Raises:
        ValueError: a name of `__all__` has no definition in the package.
    """
    parts = [TOP, f"## {PACKAGE}\n"]
    parts += [text for entry in exported() for text in described(entry, 3)]
    for heading, module, purpose in MODULES:
        parts.append(f"## {heading}\n\n`{module}`. {purpose}\n")
        parts += [text for entry in public(module) for text in described(entry, 3)]
    return "\n".join(parts)


def exported() -> Iterator[Entry]:
    """Yield the definitions that `bifrost_rt.__all__` names: classes first, then errors."""
    tree = parsed(PACKAGE)
    imported = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    names = [name for name in all_names(tree) if not name.startswith("__")]
    for name in sorted(names, key=lambda name: (name.endswith("Error"), name != BASE_ERROR, name)):
        if name not in imported:
            raise ValueError(f"{PACKAGE}.__all__ names `{name}`, which it does not import")
        yield entry(imported[name], name)


def public(module: str) -> Iterator[Entry]:
    """Yield the definitions of a module: those of `ONLY`, else all that are public."""
    names = ONLY.get(module) or tuple(
        node.name
        for node in parsed(module).body
        if isinstance(node, Definition) and not node.name.startswith("_")
    )
    for name in names:
        yield entry(module, name)


def entry(module: str, name: str) -> Entry:
    """Return what a module defines under a name.

    Raises:
        ValueError: it defines no such class or function.
    """
    return Entry(name, definition(module, name), getattr(importlib.import_module(module), name))


def parsed(module: str) -> ast.Module:
    """Return the syntax tree of a module of this checkout."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def all_names(tree: ast.Module) -> list[str]:
    """Return what `__all__` lists."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("the module has no `__all__`")


def definition(module: str, name: str) -> Definition:
    """Return the class or function called `name`.

    Raises:
        ValueError: the module has none.
    """
    for node in parsed(module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
    raise ValueError(f"`{module}` defines no class or function `{name}`")


def described(entry: Entry, level: int) -> Iterator[str]:
    """Yield a heading, the signature and the docstring; of a class also its fields and methods."""
    node = entry.node
    yield f"{'#' * level} {entry.name}\n\n```python\n{signature(entry)}\n```\n"
    if ast.get_docstring(node):  # of its own: neither inherited nor made by `dataclass`
        yield prose(entry.made.__doc__) + "\n"
    if isinstance(node, ast.ClassDef):
        if fields := "\n".join(described_fields(node)):
            yield f"**Attributes**\n\n{fields}\n"
        for member in node.body:
            if isinstance(member, Function) and not member.name.startswith("_"):
                made = getattr(entry.made, member.name)
                yield from described(Entry(f"{entry.name}.{member.name}", member, made), level + 1)


def described_fields(node: ast.ClassDef) -> Iterator[str]:
    """Yield the fields of a class that a string below them explains."""
    for field, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            text = " ".join(below.value.value.split())
            yield f"- `{ast.unparse(field.target)}`: {text}"


def signature(entry: Entry) -> str:
    """Say how it is called; of a class without a constructor, its bases and fields."""
    node, name = entry.node, entry.name
    if isinstance(node, Function):
        if "property" in map(ast.unparse, node.decorator_list):
            return f"{name}: {ast.unparse(node.returns)}" if node.returns else name
        return called(name, node, entry.made)
    for member in node.body:
        if isinstance(member, Function) and member.name == "__init__":
            return called(name, member, entry.made)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [
        "    " + ast.unparse(member) for member in node.body if isinstance(member, ast.AnnAssign)
    ]
    head = f"class {name}({bases})" if bases else f"class {name}"
    return "\n".join([head + (":" if fields else ""), *fields])


def called(name: str, node: Function, made: Any) -> str:
    """`name(arguments) -> type`, one argument a line where one line is too narrow."""
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    texts = [
        argument(a, default)
        for a, default in zip(positional, defaults, strict=True)
        if a.arg not in ("self", "cls")
    ]
    if arguments.vararg:
        texts.append("*" + argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        texts.append("*")
    typed = arguments.kwarg and unpacked(arguments.kwarg, made)
    texts += typed or []
    texts += [
        argument(a, default)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg and not typed:
        texts.append("**" + argument(arguments.kwarg, None))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(texts)}){returns}"
    if len(line) <= WIDTH:
        return line
    lines = "".join(f"    {text},\n" for text in texts)
    return f"{name}(\n{lines}){returns}"


def unpacked(node: ast.arg, made: Any) -> list[str]:
    """Return the arguments that `**name: Unpack[T]` stands for, none of which must be given."""
    found = (
        re.fullmatch(r"Unpack\[(\w+)\]", ast.unparse(node.annotation)) if node.annotation else None
    )
    if found is None:
        return []
    fields = getattr(inspect.getmodule(made), found[1])
    body = definition(fields.__module__, fields.__name__).body
    return [f"{ast.unparse(field)} = None" for field in body if isinstance(field, ast.AnnAssign)]


def argument(node: ast.arg, default: ast.expr | None) -> str:
    """`name: type = default`."""
    text = f"{node.arg}: {ast.unparse(node.annotation)}" if node.annotation else node.arg
    if default is None:
        return text
    return (
        f"{text} = {ast.unparse(default)}" if node.annotation else f"{text}={ast.unparse(default)}"
    )


def prose(docstring: str) -> str:
    """Return a docstring as Markdown: its sections become lists, the rest stays as it is."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            blocks.append(f"**{head.rstrip(':')}**\n\n{listed(rest)}")
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


def listed(section: str) -> str:
    """Return the entries of a section, each `name: text` with its continuation indented."""
    items: list[str] = []
    for line in inspect.cleandoc(section).splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
            continue
        found = re.match(r"([*\w]+(?:, [*\w]+)*): (.*)", line)
        if found:
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            items.append(f"- {names}: {found[2]}")
        elif items:
            items[-1] += " " + line.strip()
        else:
            items.append(f"- {line}")
    return "\n".join(items)


if __name__ == "__main__":
    print(document(), end="")
