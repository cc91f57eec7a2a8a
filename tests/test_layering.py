"""The layers of the package, as a test: who may import whom.

::

                     cli
        aio    testing    dask    status            edges: nothing below imports them
                    _node                           the Server that both serves and calls
             server      client                     neither imports the other
                   comm                             the only layer that opens sockets
             _util  errors  abc                     base
                 protocol                           sans-IO: no trio, no sockets, no clock

The imports are read from the source with :mod:`ast`, so those under ``TYPE_CHECKING`` and inside functions count as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "trio_dcore"
SOURCE = Path(__file__).parent.parent / PACKAGE
MAX_LINES = 600

# A layer may import itself and those with a smaller number; two with the same number don't know each other.
LAYERS = {
    "protocol": 0,
    "errors": 1,
    "abc": 1,
    "_util": 1,
    "_security": 1,
    "comm": 2,
    "server": 3,
    "client": 3,
    "_node": 4,
    "aio": 5,
    "dask": 5,
    "status": 5,
    "testing": 5,
    "cli": 6,
}
BASE = 1  # the modules of the base belong together and may import each other

# The sans-IO layer is fed bytes and hands out buffers: whoever uses it brings trio, the sockets and the clock.
NOT_IN_PROTOCOL = {"asyncio", "distributed", "dask", "http", "select", "selectors", "socket", "ssl", "time", "tornado", "trio"}
# Byte streams are the comm layer's business, and the edges may do as they need.
SOCKETS_ONLY_IN = {"comm", "base", "edges"}

# Heavy or optional: imported where they are needed, so that nobody pays for what is not used (or not installed).
LAZY_THIRD_PARTY = {
    "cloudpickle",
    "cramjam",
    "cryptography",
    "distributed",
    "dask",
    "lz4",
    "numpy",
    "snappy",
    "tblib",
    "trio_asyncio",
    "trustme",
    "zstandard",
}

# The sans-IO layer's modules are private to the outside only: its package re-exports what users need, and the layers above, for
# which it is made, take what they need from where it is.
OPEN_TO_THE_LAYERS = f"{PACKAGE}.protocol"


@dataclass(frozen=True)
class Import:
    """One imported module, as it stands in the source."""

    importer: str
    imported: str  # absolute; for "from x import y" it is x.y if that is a module, else x
    line: int
    in_function: bool
    type_checking: bool

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported}"


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def is_module(name: str) -> bool:
    return name in MODULES


def imports_of(name: str, source: str, *, is_package: bool) -> Iterator[Import]:
    """Yield the imports that stand in ``source``, the text of module ``name``."""
    package = name if is_package else name.rpartition(".")[0]

    def visit(node: ast.AST, in_function: bool, type_checking: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, in_function, type_checking)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(name, inner if is_module(inner) else base, node.lineno, in_function, type_checking)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, in_function, True)
            for child in node.orelse:
                yield from visit(child, in_function, type_checking)
        else:
            inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, type_checking)

    yield from visit(ast.parse(source), False, False)


IMPORTS = [
    imported
    for name, path in MODULES.items()
    for imported in imports_of(name, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
]
INTERNAL = [i for i in IMPORTS if i.imported.partition(".")[0] == PACKAGE]
EXTERNAL = [i for i in IMPORTS if i.imported.partition(".")[0] != PACKAGE]


def layer(module: str) -> str:
    """The layer's name: what stands after the package's name; "" for the root module itself."""
    return module.split(".")[1] if "." in module else ""


def report(wrong: list[Import], rule: str) -> None:
    assert not wrong, f"{rule}:\n" + "\n".join(map(str, wrong))


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer(name) for name in MODULES} - {""} <= set(LAYERS)


def test_a_layer_imports_only_those_below_it() -> None:
    def allowed(i: Import) -> bool:
        importer, imported = layer(i.importer), layer(i.imported)
        if importer == "":  # the root hands out the names of every layer
            return True
        if imported == "":  # ... and is for users, not for the layers: it would hide who depends on whom
            return LAYERS[importer] >= LAYERS["aio"]
        same_base = LAYERS[importer] == LAYERS[imported] == BASE
        return importer == imported or same_base or LAYERS[importer] > LAYERS[imported]

    report([i for i in INTERNAL if not allowed(i)], "imports against the layers")


def test_the_protocol_knows_no_trio_no_sockets_and_no_clock() -> None:
    wrong = [i for i in EXTERNAL if layer(i.importer) == "protocol" and i.imported.partition(".")[0] in NOT_IN_PROTOCOL]
    report(wrong, "the protocol layer is sans-IO")


def test_only_the_comm_layer_opens_sockets() -> None:
    wrong = [i for i in EXTERNAL if layer(i.importer) in ("server", "client") and i.imported in ("socket", "ssl", "select")]
    report(wrong, "server and client know messages and scopes, no sockets")


def test_private_modules_stay_in_their_package() -> None:
    def allowed(i: Import) -> bool:
        if i.imported.startswith(OPEN_TO_THE_LAYERS) and 0 < LAYERS.get(layer(i.importer), 0) < LAYERS["aio"]:
            return True
        parts = i.imported.split(".")
        for n, part in enumerate(parts):
            if part.startswith("_"):
                package = ".".join(parts[:n])
                return i.importer == package or i.importer.startswith(package + ".")
        return True

    report([i for i in INTERNAL if not allowed(i)], "private modules are imported from outside their package")


def test_other_projects_private_modules_are_left_alone() -> None:
    wrong = [i for i in EXTERNAL if any(part.startswith("_") and part != "__future__" for part in i.imported.split("."))]
    report(wrong, "private modules of other projects are imported")


def test_imports_stand_at_the_top() -> None:
    """Nothing is imported inside a function to dodge a cycle.  What is heavy, optional or not everywhere may be imported late."""
    lazy = LAZY_THIRD_PARTY | sys.stdlib_module_names
    wrong = [i for i in IMPORTS if i.in_function and not i.type_checking and i.imported.partition(".")[0] not in lazy]
    report(wrong, "imported inside a function")


def test_heavy_packages_are_imported_only_when_needed() -> None:
    wrong = [
        i
        for i in EXTERNAL
        if not i.in_function
        and not i.type_checking
        and i.imported.partition(".")[0] in LAZY_THIRD_PARTY
        and layer(i.importer) not in ("aio", "dask")
    ]
    report(wrong, "heavy or optional packages are imported at the top of a module")


def test_no_import_cycles() -> None:
    edges: dict[str, set[str]] = {name: set() for name in MODULES}
    for i in INTERNAL:
        # A package's modules import the package itself on their way in; that is how Python works and no cycle of ours.
        if not i.type_checking and not i.in_function and i.imported != i.importer:
            edges[i.importer].add(i.imported)
    state: dict[str, bool] = {}  # False: on the path; True: done

    def visit(name: str, path: list[str]) -> None:
        if state.get(name):
            return
        assert name not in state, "import cycle: " + " -> ".join([*path[path.index(name) :], name])
        state[name] = False
        for imported in sorted(edges.get(name, ())):
            visit(imported, [*path, name])
        state[name] = True

    for name in MODULES:
        visit(name, [])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_not_too_long(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines: split it"


def test_third_party_packages_are_those_declared() -> None:
    """Whatever is imported is the standard library, a dependency, an extra, or (for the bridge to Dask) distributed itself."""
    declared = {"trio", "outcome", "msgpack", *LAZY_THIRD_PARTY}
    wrong = [
        i for i in EXTERNAL if (root := i.imported.partition(".")[0]) not in declared and root not in sys.stdlib_module_names
    ]
    report(wrong, "undeclared packages are imported")


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import a.b
from . import _one
from ..errors import X
if TYPE_CHECKING:
    from c import d
def f():
    class g:
        import numpy
"""
    found = [(i.imported, i.in_function, i.type_checking) for i in imports_of("trio_dcore.comm._x", source, is_package=False)]
    assert found == [
        ("a.b", False, False),
        ("trio_dcore.comm", False, False),
        ("trio_dcore.errors", False, False),
        ("c", False, True),
        ("numpy", True, False),
    ]
    assert [
        i.imported for i in imports_of("trio_dcore.comm", "from . import _x; from ._addressing import y", is_package=True)
    ] == [
        "trio_dcore.comm",
        "trio_dcore.comm._addressing",
    ]
