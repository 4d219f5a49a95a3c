"""Chats rendered with a checkpoint's template, in a child: the template is a stranger's program.

What templates can use is that of transformers 5.23 (``utils/chat_template_utils.py``), so that the
text is: the sandbox, ``tojson`` with its options, ``raise_exception``, ``strftime_now``, loop
controls, ``{% generation %}`` blocks, reasoning under each of its names.
"""

import datetime
import json
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lfmq.converter.jobs.limited_child import serve

# Templates print today's date; evidence must not depend on the day it was gathered.
_PINNED_DATE = datetime.datetime(2025, 1, 1)
_LONGEST = 2**24  # characters of a chat
_REASONING = ("reasoning_content", "thinking", "reasoning")
_REASON_LENGTH = 160


class Renderer:
    """Answers: the first question has the templates and special tokens, each other one a chat."""

    def __init__(self) -> None:
        self._templates: dict[str, str] | None = None
        self._tokens: dict[str, str] = {}

    def __call__(self, question: dict[str, Any]) -> dict[str, str]:
        """Nothing for the first question; a chat as ``text``, or why not as ``error``.

        Args:
            question: ``templates`` and ``tokens`` by name, then of a chat its ``messages``,
                ``tools``, ``documents``, ``add_generation_prompt`` and the ``template`` by name.
        """
        if self._templates is None:
            self._templates, self._tokens = question["templates"], question["tokens"]
            return {}
        source = self._templates[question.pop("template")]
        try:
            text = render(source, tokens=self._tokens, **question)
            if len(text) > _LONGEST:
                return {"error": f"the text has {len(text):,} characters, more than {_LONGEST:,}"}
            text.encode()
        except UnicodeEncodeError:
            return {"error": "the text holds half of a surrogate pair"}
        except MemoryError:
            return {"error": "it needs too much memory"}
        except BaseException as error:  # a template can raise any class
            return {"error": _reason(error)}
        return {"text": text}


def _reason(error: BaseException) -> str:
    try:
        said = " ".join(str(error).split())[:_REASON_LENGTH]
    except Exception:  # an error whose text cannot be made
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def render(
    template: str,
    messages: list[Any],
    tools: list[Any] | None,
    documents: list[Any] | None,
    tokens: dict[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    """A chat as text, as ``apply_chat_template`` of transformers gives it."""
    compiled = _compile(template)
    if not messages:
        raise ValueError("the chat is empty")
    for kind, given in (("messages", messages), ("tools", tools), ("documents", documents)):
        if not all(isinstance(entry, dict) for entry in given or ()):
            raise TypeError(f"{kind} are expected to be objects")
    return compiled.render(
        messages=[_message(m) for m in messages],
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        **tokens,
    )


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """Without keys that are null, its reasoning under the names that templates read."""
    message = {key: value for key, value in given.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=8)  # compiling takes a hundred times as long as rendering a chat
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _PINNED_DATE.strftime
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """``{% generation %}``, which marks what a model is trained on; here only what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_enclosed")
        return nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def _enclosed(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` for templates, which holds no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does: jinja's own would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    serve(Renderer())
