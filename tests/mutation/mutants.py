"""Mutants of the code that shuts down and cancels: every place, one at a time.

A mutant is a small edit of one module's source that takes away one thing that a shutdown or a cancellation relies upon.  They are not
invented one by one but listed by rules, which :data:`OPERATORS` has, from the syntax tree; so a place is not forgotten because
nobody thought of it.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MODULES", "OPERATORS", "Mutant", "mutants_in", "mutants_of"]

#: The path of shutdown and cancellation, below the package.
MODULES = (
    "server/_server.py",
    "server/_connection.py",
    "server/_accepting.py",
    "server/_room.py",
    "server/_streams.py",
    "server/_drive.py",
    "server/_pinger.py",
    "comm/_comm.py",
    "comm/_writing.py",
    "comm/_substream.py",
    "comm/_pumps.py",
    "comm/_watch.py",
    "comm/_hangup.py",
    "comm/_connect.py",
    "comm/_inproc.py",
    "comm/_ahead.py",
    "comm/_silence.py",
    "comm/_batched.py",
    "client/_call.py",
    "client/_pool.py",
    "client/_pool_policy.py",
    "client/_stream.py",
    "client/_pinger.py",
)

#: What each rule does; a place that several of them find is a mutant of the first.
OPERATORS = {
    "cancel": "a call of `cancel()` is removed",
    "deadline": "a deadline, or what a scope is given as one, is infinite, or is not noted at all",
    "shield": "a shield is taken away, or is there where it was not",
    "close": "a call that closes something, or gives it up, is removed",
    "release": "a call that gives back a slot or place, forgets something, or wakes who waits, is removed",
    "finally": "one statement of a `finally` is removed",
    "cleanup": "one statement of an `except BaseException`, or of one for Cancelled, is removed",
    "order": "two neighbouring statements, of which one awaits, change places",
}

_CLOSING = {
    *("aclose", "abort", "close", "close_now", "close_idle", "cut", "give_up", "give_way", "_doom", "_close", "shutdown", "stop"),
    *(
        "detach",
        "unwatch_end",
        "_close_now",
        "_close_outgoing",
        "_close_soon",
        "_fail",
        "_finish",
        "_unwatch",
        "retire",
        "send_end",
    ),
    *(
        "_wind_down",
        "_cut_from_outside",
        "_request_stop",
        "_shorten",
        "_hurry",
        "_say_goodbye",
        "_last_words",
        "_abort_idle",
        "end",
    ),
    *("stop_reading", "send_cancel", "_abandon"),
}
_RELEASING = {
    *(
        "release",
        "discard",
        "remove",
        "pop",
        "popleft",
        "clear",
        "unregister",
        "notify_closing",
        "forget",
        "forget_idle",
        "leave",
    ),
    *("_leave_idle", "_give_back", "_freed", "_give_slot", "cancel_connecting", "connected", "_forget_if_empty", "shaken", "set"),
    *("unpark", "unpark_all", "resume", "reserve_reading", "_send_owed_later", "closed", "on_hangup", "on_end", "after_read"),
}
_TIMES = ("deadline", "patience", "give_up", "due", "again", "earliest", "until")
_SCOPES = {"move_on_after", "move_on_at", "fail_after", "fail_at"}
_SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign)
_COMPOUND = (ast.If, ast.With, ast.AsyncWith, ast.Try, ast.For, ast.AsyncFor, ast.While)


@dataclass(frozen=True)
class Mutant:
    """One edit.

    Attributes:
        id: ``module.function/operator/number``: the same for as long as the function's other mutants are.
        module: its path below the package.
        operator: the rule.
        lines: the first and last line that it changes.
        what: what it does, for people.
        source: the module with it.
    """

    id: str
    module: str
    operator: str
    lines: tuple[int, int]
    what: str
    source: bytes


@dataclass(frozen=True)
class _Edit:
    operator: str
    function: str
    first: ast.AST
    last: ast.AST
    what: str
    new: bytes  # instead of the source from the beginning of the first to the end of the last


def mutants_of(package: Path, modules: Sequence[str] = MODULES) -> list[Mutant]:
    """All mutants of some modules of a package."""
    return [mutant for module in modules for mutant in mutants_in((package / module).read_bytes(), module)]


def _short(module: str) -> str:
    """The module's own name, with that of its package where there are several of that name."""
    path = Path(module)
    twice = sum(Path(each).stem == path.stem for each in MODULES) > 1
    return f"{path.parent.name}.{path.stem}" if twice else path.stem


def mutants_in(source: bytes, module: str) -> list[Mutant]:
    """All mutants of one module, in order."""
    lister = _Lister(source)
    found = []
    seen: set[tuple[int, int, bytes]] = set()
    numbers: Counter[str] = Counter()
    rank = {operator: number for number, operator in enumerate(OPERATORS)}
    kept = []
    for edit in sorted(lister.edits(), key=lambda edit: rank[edit.operator]):
        place = (*lister.span(edit.first, edit.last), edit.new)
        if place not in seen:
            seen.add(place)
            kept.append((place, edit))
    for (start, end, new), edit in sorted(kept, key=lambda item: item[0]):
        key = f"{_short(module)}.{edit.function}/{edit.operator}"
        numbers[key] += 1
        lines = edit.first.lineno, edit.last.end_lineno  # type: ignore[attr-defined]
        found.append(
            Mutant(f"{key}/{numbers[key]}", module, edit.operator, lines, edit.what, source[:start] + new + source[end:])
        )
    return found


class _Lister:
    def __init__(self, source: bytes) -> None:
        self._source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, first: Any, last: Any) -> tuple[int, int]:
        """Where something stands in the source."""
        return self._starts[first.lineno - 1] + first.col_offset, self._starts[last.end_lineno - 1] + last.end_col_offset

    def _text(self, node: ast.AST) -> bytes:
        start, end = self.span(node, node)
        return self._source[start:end]

    def _shown(self, node: ast.AST) -> str:
        lines = [line.strip() for line in self._text(node).decode().splitlines()]
        return lines[0] if len(lines) == 1 else f"{lines[0]} …"

    def edits(self) -> Iterator[_Edit]:
        yield from self._below(ast.parse(self._source), ())

    def _below(self, node: ast.AST, names: tuple[str, ...]) -> Iterator[_Edit]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = *names, node.name
        function = ".".join(names)
        if isinstance(node, ast.stmt):
            yield from self._of_statement(node, function)
        if isinstance(node, ast.Call):
            yield from self._of_call(node, function)
        if isinstance(node, (ast.Try, ast.TryStar)):
            for statement in node.finalbody:
                yield self._removed("finally", function, statement)
            for handler in node.handlers:
                if _catches_cancelled(handler):
                    for statement in handler.body:
                        if not isinstance(statement, ast.Raise):
                            yield self._removed("cleanup", function, statement)
        if names:
            for field in ("body", "orelse", "finalbody"):
                body = getattr(node, field, None)
                if isinstance(body, list) and not isinstance(node, ast.ClassDef):
                    yield from self._swaps(body, function)
        for child in ast.iter_child_nodes(node):
            yield from self._below(child, names)

    def _of_statement(self, node: ast.stmt, function: str) -> Iterator[_Edit]:
        if isinstance(node, ast.Expr):
            call = node.value.value if isinstance(node.value, ast.Await) else node.value
            name = _called(call)
            if name == "cancel":
                yield self._removed("cancel", function, node)
            elif name in _CLOSING:
                yield self._removed("close", function, node)
            elif name in _RELEASING:
                yield self._removed("release", function, node)
        elif isinstance(node, ast.Delete):
            yield self._removed("release", function, node)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
            targets: Iterable[ast.expr] = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                name = _name(target)
                if name == "shield":
                    yield self._replaced("shield", function, node.value, b"False")
                elif name == "deadline" and isinstance(target, ast.Subscript):
                    yield self._removed("deadline", function, node)
                elif any(time in name for time in _TIMES) and not self._text(node.value).endswith(b"math.inf"):
                    yield self._replaced("deadline", function, node.value, b'float("inf")')

    def _of_call(self, node: ast.Call, function: str) -> Iterator[_Edit]:
        name = _called(node)
        if name in _SCOPES and node.args:
            yield self._replaced("deadline", function, node.args[0], b'float("inf")')
        for keyword in node.keywords:
            if keyword.arg == "deadline" and name == "CancelScope":
                yield self._replaced("deadline", function, keyword.value, b'float("inf")')
            elif keyword.arg == "shield":
                flipped = b"False" if self._text(keyword.value) == b"True" else b"True"
                yield self._replaced("shield", function, keyword.value, flipped)
        if name == "CancelScope" and not any(keyword.arg == "shield" for keyword in node.keywords):
            text = self._text(node)
            inside = b"shield=True)" if text.endswith(b"()") else b", shield=True)"
            yield _Edit("shield", function, node, node, f"`{self._shown(node)}` is shielded", text[:-1] + inside)

    def _removed(self, operator: str, function: str, node: ast.stmt) -> _Edit:
        return _Edit(operator, function, node, node, f"`{self._shown(node)}` is removed", b"pass")

    def _replaced(self, operator: str, function: str, node: ast.expr, new: bytes) -> _Edit:
        return _Edit(operator, function, node, node, f"`{self._shown(node)}` is `{new.decode()}`", new)

    def _swaps(self, body: list[ast.stmt], function: str) -> Iterator[_Edit]:
        for first, second in itertools.pairwise(body):
            if not _may_change_places(first, second):
                continue
            start, end = self.span(first, first)[1], self.span(second, second)[0]
            between = self._source[start:end]
            what = f"`{self._shown(second)}` comes before `{self._shown(first)}`"
            yield _Edit("order", function, first, second, what, self._text(second) + between + self._text(first))


def _called(node: ast.AST) -> str:
    """The name of what is called."""
    return _name(node.func) if isinstance(node, ast.Call) else ""


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return node.id if isinstance(node, ast.Name) else ""


def _catches_cancelled(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or _name(handler.type) in ("BaseException", "Cancelled")


def _may_change_places(first: ast.stmt, second: ast.stmt) -> bool:
    """Whether one of them awaits, and neither makes a variable that the other one uses."""
    statements = (first, second)
    if not all(isinstance(each, _SIMPLE + _COMPOUND) for each in statements) or not any(
        isinstance(e, _SIMPLE) for e in statements
    ):
        return False
    if any(_is_local(each) for each in statements):
        return False
    if not any(_awaits(each) for each in statements):
        return False
    if any(isinstance(node, (ast.Yield, ast.YieldFrom)) for each in statements for node in ast.walk(each)):
        return False
    made, used = zip(*(_variables(each) for each in statements), strict=True)
    return not (made[0] & (used[1] | made[1])) and not (made[1] & used[0])


def _is_local(statement: ast.stmt) -> bool:
    """Whether nobody else can see when it is done: a docstring, or a variable that is set without awaiting."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign) and not _awaits(statement):
        return all(isinstance(target, (ast.Name, ast.Tuple)) for target in statement.targets)
    return isinstance(statement, (ast.AugAssign, ast.AnnAssign)) and isinstance(statement.target, ast.Name)


def _awaits(statement: ast.stmt) -> bool:
    return any(isinstance(node, (ast.Await, ast.AsyncWith, ast.AsyncFor)) for node in ast.walk(statement))


def _variables(statement: ast.stmt) -> tuple[set[str], set[str]]:
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}, {n.id for n in names if isinstance(n.ctx, ast.Load)}
