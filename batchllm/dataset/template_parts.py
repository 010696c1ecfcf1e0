"""What of a prompt's template is the same in every row, and where: for advice about what could be shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import Environment, nodes

from batchllm.job import PromptSpec


@dataclass(frozen=True)
class TemplateParts:
    """`before` and `after` are the constant texts on both sides of the beginning of the first part that varies."""

    before: str
    first: str | None  # the column (or other name) that varies first; None: nothing varies
    after: str


def template_parts(prompt: PromptSpec) -> TemplateParts | None:
    """Of all messages together, or None where the prompt comes from a column. The templates must be valid."""
    if prompt.column is not None:
        return None
    texts = [prompt.text or ""] if prompt.messages is None else [item.content for item in prompt.messages]
    return _parts(texts)


def _parts(texts: Sequence[str]) -> TemplateParts:
    before, after, first = "", "", None
    for text in texts:
        for constant, name in _pieces(Environment().parse(text)):
            if name is not None:
                first = first or name
            elif first is None:
                before += constant
            else:
                after += constant
    return TemplateParts(before, first, after)


def _pieces(tree: nodes.Template) -> Iterator[tuple[str, str | None]]:
    """(constant text, None) or ("", a name in it) for each part that varies."""
    for node in tree.body:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                if isinstance(part, nodes.TemplateData):
                    yield part.data, None
                else:
                    yield "", _name(part)
        elif not isinstance(node, nodes.Assign | nodes.Macro):
            yield "", _name(node)


def _name(node: nodes.Node) -> str:
    """The first name that is read in it and not given there, as a loop's variable is."""
    names = [node] if isinstance(node, nodes.Name) else list(node.find_all(nodes.Name))
    given = {name.name for name in names if name.ctx == "store"}
    return next((name.name for name in names if name.name not in given), "an expression")
