"""The text of a job file and of `--set` overrides, as plain mappings. Knows YAML, not the keys of a job."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

from batchllm.errors import JobError

Override = tuple[tuple[str, ...], object]  # key path, value


class _Loader(yaml.SafeLoader):
    """SafeLoader, but a key given twice is an error and `1e-3` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be text (a template that begins with {{ must be in quotes)"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key `{key_node.value}` is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 as PyYAML reads it takes a number with an exponent but no dot, or without a sign, for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> object:
    """The value of a YAML text. Errors are JobErrors that name `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = error.problem or error.context or "not valid YAML"
        raise JobError(f"{where}: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise JobError(
            f"{source}, line {line}: the character {chr(error.character)!r} is not allowed"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{source}: not valid YAML: {error}") from None


def parse_override(override: str, text_keys: frozenset[str]) -> Override:
    """`a.b=c` → (("a", "b"), value of the YAML `c`).

    Keys in `text_keys` take text as it is typed: a template such as `Q: {{ q }} # 1` means something else, or
    nothing, as YAML. For them only `null` and text in quotes are read as YAML.
    """
    key, equals, raw = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise JobError(f"--set {override}: write it as KEY=VALUE, for example engine.kv_memory=1GiB")
    raw = raw.strip()
    if ".".join(path) in text_keys and raw not in ("null", "~", "") and raw[:1] not in ("'", '"'):
        return path, raw
    return path, parse_yaml(raw, f"--set {override}")


def apply_overrides(mapping: Mapping[Any, Any], overrides: Sequence[Override]) -> dict[Any, Any]:
    """A copy of `mapping` in which each path holds its value; missing mappings on the way are made."""
    result = dict(mapping)
    for path, value in overrides:
        target = result
        for depth, part in enumerate(path[:-1], start=1):
            inner = target.get(part)
            if inner is not None and not isinstance(inner, Mapping):
                raise JobError(f"--set {'.'.join(path)}: {'.'.join(path[:depth])} is not a mapping")
            target[part] = dict(inner or {})
            target = target[part]
        target[path[-1]] = value
    return result
