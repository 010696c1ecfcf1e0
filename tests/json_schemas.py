"""JSON schemas for tests: some as people write them, and random ones of bounded size."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def text(most: int = 12, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def thing(properties: dict[str, Schema], optional: tuple[str, ...] = (), **more: Any) -> Schema:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}

# Kinds of answer that annotation, extraction and tool calls ask for.
WRITTEN: dict[str, Schema] = {
    "label": thing({"label": {"enum": ["positive", "negative", "neutral"]}}),
    "label and confidence": thing({"label": {"enum": ["spam", "ham"]}, "confidence": SHARE}),
    "person": thing({"name": text(), "age": COUNT, "email": text(16, pattern="^[a-z]{1,8}@[a-z]{1,5}$")}),
    "address": thing({"street": text(), "zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "city": text(8)}),
    "entities": {
        "type": "array",
        "maxItems": 3,
        "items": thing({"text": text(8), "kind": {"enum": ["PER", "ORG", "LOC"]}}),
    },
    "triples": thing(
        {
            "triples": {
                "type": "array",
                "maxItems": 2,
                "items": {"type": "array", "minItems": 3, "maxItems": 3, "items": text(6)},
            }
        }
    ),
    "tool call": thing(
        {
            "name": {"const": "get_weather"},
            "arguments": thing({"city": text(8), "unit": {"enum": ["C", "F"]}}),
        }
    ),
    "one of two tools": {
        "anyOf": [
            thing({"name": {"const": "search"}, "query": text(10)}),
            thing({"name": {"const": "open"}, "page": COUNT}),
        ]
    },
    "product": thing(
        {
            "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "price": {"type": "number", "minimum": 0},
        }
    ),
    "event": thing({"date": {"type": "string", "format": "date"}, "title": text(10)}, optional=("title",)),
    "time": thing({"at": {"type": "string", "format": "time"}}),
    "nullable": thing({"value": {"anyOf": [{"type": "null"}, COUNT]}}),
    "types in a list": thing({"value": {"type": ["string", "null"], "maxLength": 5}}),
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": thing(
                {"v": {"enum": [0, 1]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
            )
        },
    },
    "tuple": {
        "type": "array",
        "prefixItems": [COUNT, FLAG, text(3)],
        "minItems": 3,
        "maxItems": 3,
        "items": False,
    },
    "score": {"type": "integer", "minimum": 1, "maximum": 5},
    "reasoning": thing({"reasoning": text(20), "answer": {"enum": ["A", "B", "C", "D"]}}),
    "negative numbers": thing({"x": {"type": "integer", "minimum": -90, "maximum": -10}}),
    "exclusive bounds": thing({"x": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2}}),
    "multiple": thing({"x": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}}),
}


def random_schema(seed: int) -> Schema:
    """Bounded, so that a random model comes to its end."""
    return _schema(random.Random(seed), 3)


def _schema(draw: random.Random, depth: int) -> Schema:
    kinds = ["text", "integer", "number", "flag", "enum", "const", "pattern"]
    kind = draw.choice([*kinds, *(["object"] * 4 + ["array"] * 2 + ["any"] if depth else [])])
    if kind == "text":
        return text(draw.randint(1, 10), minLength=draw.randint(0, 1))
    if kind == "integer":
        low = draw.randint(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 300)}
    if kind == "number":
        return {"type": "number", "minimum": draw.randint(-9, 0), "maximum": draw.randint(1, 9)}
    if kind == "flag":
        return draw.choice([FLAG, {"type": "null"}])
    if kind == "enum":
        return {
            "enum": draw.sample(["red", "dark blue", 'say "hi"', 1, 2.5, None, True, "ü"], draw.randint(1, 4))
        }
    if kind == "const":
        return {"const": draw.choice(["x", 7, ["a", 1], {"k": False}])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": draw.choice(["^[a-f0-9]{4}$", "^(yes|no)$", "^[A-Z][a-z]{0,4}$"]),
        }
    if kind == "array":
        return {
            "type": "array",
            "items": _schema(draw, depth - 1),
            "minItems": draw.randint(0, 1),
            "maxItems": draw.randint(1, 3),
        }
    if kind == "any":
        return {"anyOf": [_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    names = draw.sample(["id", "name", "tags", "n", "is ok", "ключ"], draw.randint(1, 4))
    properties = {name: _schema(draw, depth - 1) for name in names}
    return thing(properties, optional=tuple(name for name in names if draw.random() < 0.3))
