"""Chats are the text that transformers gives; what a template does wrong is one line."""

from dataclasses import replace

import pytest
import transformers

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.jobs.limited_child import Limits
from lfmq.converter.model.chat import Chat, ChatError, ChatTemplate

USER = {"role": "user", "content": "2 + 2?"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "4", "thinking": "easy", "tool_calls": None},
    {"role": "user", "content": "é <b> \n "},
    {"role": "assistant", "content": "", "reasoning": "why", "tool_calls": [{"name": "f"}]},
]
TOOLS = [{"name": "get_weather", "parameters": {"city": "é", "n": [1, 2.5, None, True]}}]
DOCUMENTS = [{"title": "A", "text": "B"}]
TEMPLATES = {
    "names": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}"
    "{% for m in messages %}{{ m }}{% endfor %}",
    "generation": "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}"
    "{%- generation -%} {{ m.content }} {%- endgeneration -%}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation in a macro": "{% macro say(m) %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endmacro %}{% for m in messages %}{{ say(m) }}|{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ tools | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "loops": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{{ loop.index }}{{ m.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}/"
    "{{ m.reasoning }}/{{ 'tool_calls' in m }};{% endfor %}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}",
    "blocks": "  {% if tools %}\n  tools  \n{% endif %}\n\n  {% if documents is none %}\nno\n"
    "{%- endif %}\n{{ add_generation_prompt }}\n",
}


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def tokenizer(sample_folder):
    return transformers.AutoTokenizer.from_pretrained(sample_folder)


def template(sample, source):
    files = {**sample.assets.files, "chat_template.jinja": source.encode()}
    return ChatTemplate(replace(sample.assets, files=files))


@pytest.mark.parametrize("source", [None, *TEMPLATES.values()], ids=["own", *TEMPLATES])
def test_chats_render_as_transformers_does(sample, tokenizer, source):
    used = ChatTemplate(sample.assets) if source is None else template(sample, source)
    chats = [
        Chat(CHAT, tools, documents, prompt)
        for tools in (None, TOOLS)
        for documents in (None, DOCUMENTS)
        for prompt in (False, True)
    ]
    expected = [
        tokenizer.apply_chat_template(
            c.messages,
            tools=c.tools,
            documents=c.documents,
            add_generation_prompt=c.add_generation_prompt,
            chat_template=source,
            tokenize=False,
        )
        for c in chats
    ]
    assert used.render(chats) == expected


def test_special_tokens_of_older_files(sample, tmp_path):
    """Objects, a model's own tokens, and the map that wins over a config without the decoder."""
    config = (
        b'{"bos_token": {"content": "<|startoftext|>", "__type": "AddedToken"}, "eos_token": "x",'
        b'"image_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast",'
        b'"odd_token": {"content": "y"}, "unk_token": null,'
        b'"extra_special_tokens": {"boi": "<|im_end|>"}}'
    )
    files = sample.assets.files | {
        "tokenizer_config.json": config,
        "special_tokens_map.json": b'{"eos_token": {"content": "<|im_end|>", "lstrip": false}}',
        "chat_template.jinja": b"{{ bos_token }},{{ eos_token }},{{ image_token }},{{ boi }},"
        b"{{ odd_token }},{{ unk_token }}",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template([USER], tokenize=False)
    assert ChatTemplate(replace(sample.assets, files=files))([USER]) == expected
    assert expected.startswith("<|startoftext|>,<|im_end|>,<|im_start|>,<|im_end|>,")


def test_a_template_for_tools(sample):
    config = b'{"chat_template": {"default": "D{{ tools }}", "tool_use": "T{{ tools }}"}}'
    files = {"tokenizer_config.json": config}
    used = ChatTemplate(replace(sample.assets, files=files))
    assert used.render([Chat([USER]), Chat([USER], []), Chat([USER], [{}])]) == [
        "DNone",
        "T[]",
        "T[{}]",
    ]


@pytest.mark.parametrize(
    ("source", "thinks"),
    [
        ("{{ '<think>' + messages[0].thinking + '</think>' }}", True),
        ("{{ messages[0].content.split('</think>')[-1] }}", False),
        ("{{ messages[0].content }}", False),
    ],
)
def test_a_template_tells_whether_the_model_thinks(sample, source, thinks):
    assert template(sample, source).thinks is thinks
    assert ChatTemplate(sample.assets).thinks


def test_dates_in_templates_are_pinned(sample):
    assert template(sample, "{{ strftime_now('%d %B %Y') }}")([USER]) == "01 January 2025"


FAILURES = {
    "{{ messages.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{% set ns = namespace(__class__=1) %}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ raise_exception('only\nusers') }}": "TemplateError: only users",
    "{{ range(10**9) }}": "OverflowError",
    "{{ 'a' * 10**10 }}": "too much memory",
    "{{ 'a' * 2**25 }}": "33,554,432 characters",
    "{{ (1,) * 10**9 }}": "too much memory",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "RecursionError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[7].content.x }}": "UndefinedError",
    "{{ 'x' + 1 }}": "TypeError",
    "{{ {}['a'].b }}": "UndefinedError",
    "{{ 'é'.encode('ascii') }}": "UnicodeEncodeError|surrogate",
    "{{ [1].index(2) }}": "ValueError",
    "{{ messages | nofilter }}": "TemplateAssertionError",
    "{% include 'x' %}": "TypeError",
    "{% for": "TemplateSyntaxError",
    r"{{ '\ud83d' }}": "half of a surrogate pair",
}


@pytest.mark.parametrize(("source", "reason"), FAILURES.items(), ids=list(FAILURES.values()))
def test_a_template_that_fails_is_one_line(sample, source, reason):
    with pytest.raises(
        ChatError, match=f"line 7: the chat template failed: .*({reason})"
    ) as caught:
        template(sample, source)([USER], where="a.jsonl, line 7")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "chat_template.jinja" in str(caught.value)


def test_an_endless_template_ends(sample):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chats = [Chat([USER]), Chat([USER, USER], where="line 2")]
    with pytest.raises(ChatError, match="line 2: the chat template failed: took more than 1 s;"):
        template(sample, "{% if messages[1] %}" + loop + "{% endif %}").render(chats, Limits(1))


@pytest.mark.parametrize("source", ["", " \n"])
def test_no_template(sample, source):
    with pytest.raises(ChatError, match=r"a, line 1: has messages, but .* no chat template"):
        template(sample, source)([USER], where="a, line 1")
    named = replace(sample.assets, files={"additional_chat_templates/rag.jinja": b"x"})
    with pytest.raises(ChatError, match="no chat template"):
        ChatTemplate(named)([USER])


@pytest.mark.parametrize("messages", [[], [1], ["x"]])
def test_what_is_no_chat(sample, messages):
    with pytest.raises(ChatError, match=r"the chat template failed: (ValueError|TypeError)"):
        ChatTemplate(sample.assets)(messages)
