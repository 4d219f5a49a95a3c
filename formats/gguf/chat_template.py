"""Chat templates in a GGUF: one for all chats, and those that have a name.

llama.cpp reads ``tokenizer.chat_template`` and, for chats with tools, ``.tool_use`` after it
(common/chat.cpp). Names are those of gguf-py's ``GGUFWriter.add_chat_template``, here sorted.
"""

import re

from gguf import GGUFWriter, Keys

from lfmq.formats.gguf.scan import Header
from lfmq.formats.huggingface.chat_template import DEFAULT, ChatTemplates

_PREFIX = Keys.Tokenizer.CHAT_TEMPLATE + "."


def add_templates(writer: GGUFWriter, templates: ChatTemplates) -> None:
    """The keys of all templates; none for one that is blank."""
    named = as_stored(templates)
    default = named.pop(DEFAULT, None)
    if default is not None:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, default)
    for name, source in named.items():
        writer.add_string(_PREFIX + name, source)
    if named:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(named))


def as_stored(templates: ChatTemplates) -> dict[str, str]:
    """Templates by the name they have in a GGUF, sorted, without blank ones."""
    return {
        re.sub(r"[^A-Za-z0-9]", "_", name): source
        for name, source in sorted(templates.named.items())
        if name and source.strip()
    }


def stored_templates(header: Header) -> dict[str, str]:
    """The templates a file holds, by name."""
    keys = {Keys.Tokenizer.CHAT_TEMPLATE: DEFAULT} | {
        key: key.removeprefix(_PREFIX) for key in header.fields if key.startswith(_PREFIX)
    }
    found = {name: header.value(key) for key, name in keys.items()}
    return {name: template for name, template in found.items() if isinstance(template, str)}
