"""Jinja over the columns of a row: checked against the input's columns before any row is rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchllm.dataset.rows import RowFault
from batchllm.errors import JobError
from batchllm.suggest import column_hint

_ROW = "row"  # `row["a name"]` reaches columns whose name is no identifier


class RowTemplate:
    """One template. `columns` are those it reads; for those in `nullable` it asks `is none` itself.

    As always in jinja one trailing newline of the template is dropped, so a YAML block (`text: |`) ends where
    its last line ends.
    """

    def __init__(self, text: str, columns: Sequence[str], where: str) -> None:
        try:
            self._template = _environment().from_string(text)
            tree = _bare_environment().parse(text)
        except TemplateSyntaxError as error:
            message = (
                f"{where} is not a valid template, line {error.lineno}: {str(error.message).rstrip('.')}"
            )
            raise JobError(message) from None
        if any(meta.find_referenced_templates(tree)):
            raise JobError(f"{where} includes another template; put all of the text into one")
        names = meta.find_undeclared_variables(tree)
        self._row_columns: tuple[str, ...] = ()
        if _ROW in names and _ROW not in columns:
            names.remove(_ROW)
            self._row_columns = tuple(sorted(_row_columns(tree, where)))
        functions = set(_environment().globals) - set(columns)  # `range` is a function unless it is a column
        self.columns = tuple(sorted((names - functions) | set(self._row_columns)))
        unknown = next((name for name in self.columns if name not in columns), None)
        if unknown is not None:
            raise JobError(f"{where} uses `{unknown}`, which is no column; {column_hint(unknown, columns)}")
        self.nullable = frozenset(_tested_for_none(tree))
        self._tree = tree

    def used_before(self, name: str) -> tuple[set[str], bool]:
        """The columns that may decide what stands before the first place where `name` is shown, and whether
        there is such a place. (Without one these are all columns.) In a loop over `name` that is all of it.
        """
        used, found = _used_before(self._tree.body, name)
        return used & set(self.columns), found

    def render(self, values: Mapping[str, object]) -> str | RowFault:
        """The text for one row, given a value for each of `columns`."""
        context = dict(values)
        if self._row_columns:
            context[_ROW] = {name: values[name] for name in self._row_columns}
        try:
            return self._template.render(context)
        except Exception as error:  # whatever a template does with a row is that row's fault
            return RowFault(f"template error: {error or type(error).__name__}")


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    # The same row must give the same prompt in every run.
    del environment.globals["lipsum"]
    del environment.filters["random"]
    return environment


@cache
def _bare_environment() -> ImmutableSandboxedEnvironment:
    """For analysis only: without functions, so that a column with the name of one is seen."""
    environment = _environment().overlay()
    environment.globals = {}
    return environment


def _row_columns(tree: nodes.Template, where: str) -> set[str]:
    """The columns reached as `row["name"]` or `row.name`, the only ways in which `row` may be used."""
    found = {name for node in tree.find_all((nodes.Getitem, nodes.Getattr)) if (name := _subscript(node))}
    uses = sum(1 for node in tree.find_all(nodes.Name) if node.name == _ROW)
    subscripts = sum(1 for node in tree.find_all((nodes.Getitem, nodes.Getattr)) if _subscript(node))
    if uses != subscripts:
        raise JobError(f'{where} can use `row` only with the name of a column, as in row["name"]')
    return found


def _subscript(node: Any) -> str | None:
    """`name` of `row["name"]` or `row.name`, None for any other expression."""
    if not isinstance(node, nodes.Getitem | nodes.Getattr):
        return None
    if not isinstance(node.node, nodes.Name) or node.node.name != _ROW:
        return None
    if isinstance(node, nodes.Getattr):
        return node.attr
    value = node.arg.value if isinstance(node.arg, nodes.Const) else None
    return value if isinstance(value, str) else None


def _used_before(statements: Sequence[nodes.Node], name: str) -> tuple[set[str], bool]:
    used: set[str] = set()
    for statement in statements:
        parts: list[nodes.Node] = [statement]
        if isinstance(statement, nodes.Output):
            parts = list(statement.nodes)
        elif isinstance(statement, nodes.If):
            used |= _names(statement.test)
            parts = [*statement.body, *statement.elif_, *statement.else_]
        if parts != [statement]:
            inner, found = _used_before(parts, name)
            used |= inner
        else:
            names = _names(statement)
            found = name in names
            used |= names - {name}
        if found:
            return used, True
    return used, False


def _names(tree: nodes.Node) -> set[str]:
    """All names in a piece of a template, columns or not, itself included."""
    found = {node.name for node in tree.find_all(nodes.Name)}
    if isinstance(tree, nodes.Name):
        found.add(tree.name)
    pieces = (tree, *tree.find_all((nodes.Getitem, nodes.Getattr)))
    return found | {name for piece in pieces if (name := _subscript(piece))}


def _tested_for_none(tree: nodes.Template) -> set[str]:
    """Columns in `x is none` or `x is not none`: the template knows what to do when they are null."""
    tested = [test.node for test in tree.find_all(nodes.Test) if test.name == "none"]
    names = {node.name for node in tested if isinstance(node, nodes.Name)}
    return names | {name for node in tested if (name := _subscript(node))}
