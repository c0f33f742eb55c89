"""What the pack takes of ComfyUI by name, and which of it a ComfyUI lacks, by the sources: nothing is imported.

Seen are imports, chains from an imported module such as `comfy.samplers.sampler_object`, and names of classes such as
`WrappersMP.APPLY_MODEL`. What an object has, such as a method of a ModelPatcher, is not seen.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

_NOT_MODULES = {"tests", "utils", "models", "input", "output", "temp", "user", "custom_nodes"}


@dataclasses.dataclass(frozen=True, order=True)
class Reference:
    """A dotted name of ComfyUI's, and the first line that needs it."""

    name: str
    file: str
    line: int


class Host:
    """The modules of a ComfyUI's folder, and what each defines."""

    def __init__(self, root: Path):
        self.root = root
        folders = {path.name for path in root.iterdir() if path.is_dir() and path.name.isidentifier()}
        self.names = {path.stem for path in root.glob("*.py")} | folders - _NOT_MODULES

    def lacks(self, name: str) -> str:
        """What is missing of a dotted name, as the end of a sentence; empty where nothing is."""
        parts = name.split(".")
        length = 0
        while length < len(parts) and self._file(tuple(parts[: length + 1])):
            length += 1
        module, rest = tuple(parts[:length]), parts[length:]
        if not rest or rest[0].startswith("__"):  # each module has __file__
            return ""
        defined = self._defined(module)
        if defined is None:
            return ""
        where = ".".join(module)
        if rest[0] not in defined:
            return f"{where} has no {rest[0]}" if where else f"there is no {rest[0]}"
        node = defined[rest[0]]
        if isinstance(node, str) and len(rest) > 1:  # taken from another module
            return self.lacks(".".join([node, *rest[1:]])) if node.split(".")[0] in self.names else ""
        if isinstance(node, ast.ClassDef) and len(rest) > 1 and all(_is_plain(base) for base in node.bases):
            if rest[1] not in _bound(node.body):
                return f"{where}.{rest[0]} has no {rest[1]}"
        return ""

    def _file(self, module: tuple[str, ...]) -> Path | None:
        path = self.root.joinpath(*module)
        files = (path / "__init__.py", path.with_suffix(".py"))
        return next((file for file in files if file.is_file()), path if path.is_dir() else None)

    @functools.cache  # noqa: B019 - lives as long as a test
    def _defined(self, module: tuple[str, ...]) -> dict[str, ast.AST | str | None] | None:
        """Its names, each with its class or where it comes from; None where a `*` or `__getattr__` may add more."""
        file = self._file(module)
        if file.is_dir():
            return {}
        tree = ast.parse(file.read_text(encoding="utf-8"))
        package = module if file.name == "__init__.py" else module[:-1]
        names = _bound(tree.body, package)
        for node in ast.walk(tree):  # Kind.name = …, anywhere
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(kind := names.get(getattr(node.value, "id", None)), ast.ClassDef):
                kind.body.extend(ast.parse(f"{node.attr} = 0").body)
        return None if "*" in names or "__getattr__" in names else names


def _is_plain(base: ast.expr) -> bool:
    """Whether a base class adds no names that the source of the class does not show."""
    return isinstance(base, ast.Name) and base.id in ("object", "str", "int")


def _bound(body: list[ast.stmt], package: tuple[str, ...] = ()) -> dict[str, ast.AST | str | None]:
    """The names that statements bind, those inside if, try, with and for included."""
    names: dict[str, ast.AST | str | None] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] = None
        elif isinstance(node, ast.Import):
            names.update({(alias.asname or alias.name).split(".")[0]: None for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            source = [*package[: len(package) - node.level + 1]] if node.level else []
            source += node.module.split(".") if node.module else []
            names.update({alias.asname or alias.name: ".".join([*source, alias.name]) for alias in node.names})
        else:
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    names[target.id] = None
            for part in ("body", "orelse", "finalbody"):
                names.update(_bound(getattr(node, part, None) or [], package))
            for handler in getattr(node, "handlers", []):
                names.update(_bound(handler.body, package))
    return names


def references(file: Path, root: Path, host: Host) -> Iterator[Reference]:
    """Each name of ComfyUI's that a file of the pack takes; relative imports are the pack's own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    shown = file.relative_to(root).as_posix()
    meant: dict[str, str] = {}  # what a name of this file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in host.names:
                    meant[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
                    yield Reference(alias.name, shown, node.lineno)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in host.names:
            for alias in node.names:
                meant[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield Reference(f"{node.module}.{alias.name}", shown, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := _chain(node)) and chain[0] in meant:
            yield Reference(".".join([meant[chain[0]], *chain[1:]]), shown, node.lineno)


def _chain(node: ast.expr) -> list[str]:
    """The names of a.b.c; empty for any other expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    chain = _chain(node.value) if isinstance(node, ast.Attribute) else []
    return [*chain, node.attr] if chain else []


def missing(files: list[Path], root: Path, comfyui: Path) -> list[str]:
    """One line for each name that this ComfyUI lacks: where it is needed, and what is missing."""
    host, first = Host(comfyui), {}
    for file in files:
        for reference in references(file, root, host):
            if lack := host.lacks(reference.name):
                first.setdefault(lack, f"{reference.file}:{reference.line}: {lack}")
    return sorted(first.values())
