"""A chat template is a program: one that never ends, or takes all memory, is refused."""

from __future__ import annotations

import time

import pytest
from tiny import make_tokenizer

from fedex_scale.data.chat import render
from fedex_scale.runtime.errors import UserError

TURNS = [{"role": "user", "content": "Hello"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP, "takes more than 5 s"),
        ('{{ "a" * 2000000000 }}', "takes more than 1,024 MB"),
        ("{% set x = namespace(a='a') %}{% for i in range(60) %}{% set x.a = x.a + x.a %}"
         "{% endfor %}", "takes more than 1,024 MB"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ],
)  # fmt: skip
def test_a_template_that_does_harm_is_one_line(template: str, words: str) -> None:
    began = time.perf_counter()
    with pytest.raises(UserError, match=words):
        render(TURNS, template, make_tokenizer(), ask=True)
    assert time.perf_counter() - began < 60


def test_a_template_that_refuses_the_trial_is_used_where_it_fits() -> None:
    many = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}"
    template = many + "{{ messages[0].content }}"
    assert render(TURNS, template, make_tokenizer(), ask=True) == "Hello"
