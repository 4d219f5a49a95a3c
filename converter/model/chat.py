"""Chats as text: the checkpoint's own template, rendered in a child process, all chats at once."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lfmq.converter.jobs.limited_child import ChildDied, Limits, ask
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.chat_template import DEFAULT, chat_templates
from lfmq.formats.huggingface.special_tokens import special_tokens
from lfmq.quant.errors import ValidationError

_CHILD = "lfmq.converter.model.chat_child"
_LIMITS = Limits()


class ChatError(ValidationError):
    """There is no chat template, or it refuses a chat."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat to render.

    Attributes:
        messages: objects with a role and more, as templates take them.
        tools: what the model may call, as JSON schemas.
        documents: texts the model may quote.
        add_generation_prompt: end with the beginning of the assistant's turn.
        where: file and line, for errors.
    """

    messages: Sequence[Any]
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    add_generation_prompt: bool = False
    where: str = "messages"


class ChatTemplate:
    """The checkpoint's chat templates, with the names they rely on.

    Raises:
        CheckpointError: a file they are in cannot be read.
    """

    def __init__(self, assets: Assets) -> None:
        self._templates = chat_templates(assets)
        self._tokens = special_tokens(assets)
        self._folder = assets.folder

    @property
    def thinks(self) -> bool:
        """Whether the model writes thoughts before it answers.

        Templates of models that do open them with ``<think>``; others mention ``</think>`` at
        most, to cut foreign thoughts away.
        """
        return "<think>" in (self._templates.default or "")

    def __call__(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        where: str = "messages",
        add_generation_prompt: bool = False,
    ) -> str:
        """One chat as text; see :meth:`render`, which takes as long for a thousand."""
        chat = Chat(messages, tools, None, add_generation_prompt, where)
        return self.render([chat])[0]

    def render(self, chats: Iterable[Chat], limits: Limits = _LIMITS) -> list[str]:
        """Every chat as text, as transformers renders it; one process for all.

        Args:
            chats: in the order of the texts.
            limits: of time and memory for each chat.

        Raises:
            ChatError: there is no template, it refuses a chat, or takes too much time or memory.
        """
        listed, texts = list(chats), []
        if not listed:
            return []
        setup = {"templates": self._templates.named, "tokens": self._tokens}
        with closing(ask(_CHILD, [setup, *map(self._question, listed)], limits)) as answers:
            next(answers)
            for chat in listed:
                try:
                    found = next(answers)
                except ChildDied as error:
                    raise self._failed(chat, str(error)) from None
                if "text" not in found:
                    raise self._failed(chat, found["error"])
                texts.append(found["text"])
        return texts

    def _question(self, chat: Chat) -> dict[str, Any]:
        name = self._templates.choose(tools=chat.tools is not None)
        if name is None or not self._templates.named[name].strip():
            raise ChatError(
                f"{chat.where}: has messages, but {self._folder} has no chat template to render "
                "them"
            )
        return {
            "template": name,
            "messages": list(chat.messages),
            "tools": None if chat.tools is None else list(chat.tools),
            "documents": None if chat.documents is None else list(chat.documents),
            "add_generation_prompt": chat.add_generation_prompt,
        }

    def _failed(self, chat: Chat, reason: str) -> ChatError:
        name = self._templates.choose(tools=chat.tools is not None)
        which = f" ({name!r})" if name != DEFAULT else ""
        source = self._folder / self._templates.source
        return ChatError(f"{chat.where}: the chat template failed: {reason}; mend {source}{which}")
