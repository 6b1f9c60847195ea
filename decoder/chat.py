"""Chat templates: what a model that talks reads of a conversation, by jinja2's sandbox, as transformers renders it."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import shorten

MOST = 1_000_000  # lines of Python that a template may take, and characters or items that a product may make
Message = Mapping[str, Any]


def framed(tokenizer: Tokenizer) -> Callable[[Sequence[Message]], str]:
    """A function of a conversation, {"role": "user", "content": ...} and so on, that gives the text which the model of
    this tokenizer goes on from.

    The template is a stranger's: it runs in a sandbox that reads no attribute with an underscore, changes nothing and
    ends after so many lines. Raises ValueError for a tokenizer without a template, one that is no Jinja, or that fails.
    """
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template: leave out --chat, or add a chat_template.jinja")
    jinja, base = optional_import("jinja2"), optional_import("jinja2.sandbox").ImmutableSandboxedEnvironment

    class Sandbox(base):  # type: ignore[misc, valid-type]
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
            if max(sizes) > MOST or sizes[0] * sizes[1] > MOST:
                raise ValueError(f"{operator} of numbers that large")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.datetime.now().strftime}
    names = ("bos", "eos", "pad", "unk")
    special = {f"{name}_token": tokenizer.text_of(getattr(tokenizer, f"{name}_id")) for name in names}
    special = {name: text for name, text in special.items() if text is not None}

    def render(messages: Sequence[Message]) -> str:
        lines, before = 0, sys.gettrace()

        def count(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if (lines := lines + 1) > MOST:
                raise ValueError("it does not end")
            return count

        sys.settrace(count)
        try:
            return template.render(messages=list(messages), add_generation_prompt=True, **special)
        except Exception as error:  # whatever a stranger's program does
            raise ValueError(f"the chat template fails: {shorten(error)}") from None
        finally:
            sys.settrace(before)

    try:
        template = environment.from_string(tokenizer.chat_template)
    except jinja.TemplateError as error:
        raise ValueError(f"the chat template is no Jinja: {shorten(error)}") from None
    return render
