"""Which text of a template is the same in every row, before and after the first part that varies."""

from __future__ import annotations

import pytest

from batchllm.dataset.template_parts import TemplateParts, template_parts
from batchllm.job import PromptSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Always the same.", TemplateParts("Always the same.", None, "")),
        ("Head {{ a }} tail {{ b }}!", TemplateParts("Head ", "a", " tail !")),
        ("{{ row['odd name'] | upper }}x", TemplateParts("", "row", "x")),
        ("{% if a %}one{% else %}two{% endif %} end", TemplateParts("", "a", " end")),
        (
            "{# a remark #}{% set n = 3 %}x{% for w in words %}{{ w }}{% endfor %}",
            TemplateParts("x", "words", ""),
        ),
        ("a{% raw %}{{ b }}{% endraw %}c", TemplateParts("a{{ b }}c", None, "")),
        ("{{ 1 + 1 }} is two", TemplateParts("", "an expression", " is two")),
    ],
)
def test_parts_of_a_text(text, expected):
    assert template_parts(PromptSpec(text=text)) == expected


def test_messages_are_one_after_another():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ q }} Thanks."}]
    assert template_parts(PromptSpec(messages=messages)) == TemplateParts("Be brief.", "q", " Thanks.")


def test_a_column_has_no_template():
    assert template_parts(PromptSpec(column="prompt")) is None
