"""Where the assistant speaks in a chat as the tokenizer's own template writes it.

The whole conversation is rendered once and tokenised once, so that the ids are those of inference; the spans of the
assistant's turns are found in that text. Templates with {% generation %} markers say where they are. In all others the
loop over the messages is followed: each round writes a mark in front of what it writes, in a copy of the template's
syntax tree, and the marks are taken out again. A turn is rendered in its final form, whatever comes after it: Qwen3's
template leaves out what was thought before the last question, and so no prefix of the conversation would show it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError

from llmtrain.data.messages import BadMessage, Conversation, Message
from llmtrain.errors import DataError

Span = tuple[int, int]
"""Characters start to stop."""

MARKS = OPENS, SAYS, ENDS = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters: no text has them
TURN = re.compile(f"{OPENS}(\\d+):([^{SAYS}]*){SAYS}|{ENDS}")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_TOOL, PROBE_CALL, PROBE_THOUGHT = "probe_of_a_tool", "probe_of_a_call", "probe_of_a_thought"
PROBE: list[Message] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": PROBE_CALL, "arguments": {}}}],
    },
    {"role": "tool", "content": "b", "name": PROBE_TOOL},
    {"role": "assistant", "content": "c"},
]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the spans that the assistant wrote and is to learn."""

    text: str
    spans: tuple[Span, ...]
    """From behind the generation prompt to the end of the turn, its end-of-turn token included."""


class ChatTemplate:
    """The chat template of a tokenizer. Raises DataError where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template, which chats need; choose another model.tokenizer")
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()

    def text(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        """The messages as transformers renders them.

        Raises BadMessage where the template refuses them, or would drop tools, calls or thoughts without a word.
        """
        if tools and not self.shows_tools:
            raise BadMessage("has tools, which the chat template does not show")
        if any(message.get("tool_calls") for message in messages) and not self.shows_calls:
            raise BadMessage("calls tools, which the chat template does not show")
        if any(message.get("reasoning_content") for message in messages) and not self.shows_thinking:
            raise BadMessage("has reasoning_content, which the chat template does not show; put it into the content")
        return self._text(messages, tools, add_generation_prompt)

    def rendered(self, conversation: Conversation) -> Rendered:
        """The text with the learnt spans.

        Raises BadMessage where the template refuses the conversation, or where the assistant's turns cannot be told: it
        has no loop that writes one turn a message, or a turn does not begin with the generation prompt.
        """
        text = self.text(conversation.messages, conversation.tools)
        if set(MARKS) & set(text):
            raise BadMessage(f"holds a Unicode noncharacter (U+{ord(next(iter(set(MARKS) & set(text)))):04X})")
        if GENERATION.search(self.source):
            spans = self._generation_spans(conversation, text)
        else:
            spans = self._turn_spans(conversation, text)
        if len(spans) != len(conversation.is_learnt):
            raise BadMessage(
                f"has {len(conversation.is_learnt)} messages of the assistant, of which the chat template writes "
                f"{len(spans)}"
            )
        return Rendered(text, tuple(s for s, learnt in zip(spans, conversation.is_learnt, strict=True) if learnt))

    @cached_property
    def generation_prompt(self) -> str:
        """What the template puts in front of an answer that is still to be written."""
        question = [{"role": "user", "content": "a"}]
        without, with_prompt = (self._text(question, None, add_generation_prompt=add) for add in (False, True))
        if not with_prompt.startswith(without):
            raise BadMessage("the chat template renders a question differently before an answer")
        return with_prompt[len(without) :]

    @cached_property
    def shows_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": PROBE_TOOL, "description": "", "parameters": {}}}
        return self._shows(PROBE_TOOL, PROBE[:1], [tool])

    @cached_property
    def shows_calls(self) -> bool:
        return self._shows(PROBE_CALL, PROBE, None)

    @cached_property
    def shows_thinking(self) -> bool:
        answer = {"role": "assistant", "content": "b", "reasoning_content": PROBE_THOUGHT}
        return self._shows(PROBE_THOUGHT, [PROBE[0], answer], None)

    def _shows(self, name: str, messages: list[Message], tools: list[Any] | None) -> bool:
        try:
            return name in self._text(messages, tools)
        except BadMessage:
            return False

    def _text(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError) as error:  # TypeError: it adds a text to what is none
            raise BadMessage(f"the chat template refuses it: {error}") from error
        return text

    def _generation_spans(self, conversation: Conversation, text: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        (rendered,), (spans,) = render_jinja_template(
            [list(conversation.messages)],
            tools=list(conversation.tools) if conversation.tools else None,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        assert rendered == text, "one template, one text"
        return [(start, stop) for start, stop in spans]

    def _turn_spans(self, conversation: Conversation, text: str) -> list[Span]:
        marked = self._marked.render(
            messages=list(conversation.messages),
            tools=list(conversation.tools) if conversation.tools else None,
            documents=None,
            add_generation_prompt=False,
            **self.tokenizer.special_tokens_map,
        )
        if TURN.sub("", marked) != text:
            raise BadMessage("the chat template changes what it wrote, so that its turns cannot be told apart")
        by_loop: dict[str, list[Span]] = {}
        for loop, role, span in _turns(marked):
            if role == "assistant":
                by_loop.setdefault(loop, []).append(span)
        writing = [spans for spans in by_loop.values() if all(start < stop for start, stop in spans)]
        turns = next((spans for spans in writing if len(spans) == len(conversation.is_learnt)), None)
        if turns is None:
            raise BadMessage(
                "the chat template has no loop that writes one turn a message: put {% generation %} markers into it"
            )
        prompt = self.generation_prompt
        for number, (start, _) in enumerate(turns, start=1):
            if not text.startswith(prompt, start):
                raise BadMessage(
                    f"turn {number} of the assistant does not begin with the generation prompt {prompt!r}, but with "
                    f"{text[start : start + len(prompt)]!r}: put {{% generation %}} markers into the chat template"
                )
        return [(start + len(prompt), stop) for start, stop in turns]

    @cached_property
    def _marked(self) -> Template:
        """The template, its loops writing a mark in front of each round and behind the last."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment = _compile_jinja_template(self.source).environment
        tree = environment.parse(self.source)
        for number, (siblings, loop) in enumerate(_writing_loops(tree)):
            assert isinstance(loop.target, nodes.Name)
            role = nodes.Getitem(nodes.Name(loop.target.name, "load"), nodes.Const("role"), "load")
            opens = [nodes.TemplateData(f"{OPENS}{number}:"), role, nodes.TemplateData(SAYS)]
            loop.body.insert(0, nodes.Output(opens))
            siblings.insert(siblings.index(loop) + 1, nodes.Output([nodes.TemplateData(ENDS)]))
        marked: Template = environment.from_string(tree)
        return marked


def _writing_loops(tree: nodes.Template) -> list[tuple[list[nodes.Node], nodes.For]]:
    """The outermost loops that write something straight into the text, each with the list that it stands in."""

    def search(siblings: list[nodes.Node]) -> Iterator[tuple[list[nodes.Node], nodes.For]]:
        for node in siblings:
            match node:
                case nodes.For(target=nodes.Name()):
                    if next(node.find_all(nodes.Output), None):
                        yield siblings, node
                case nodes.If():
                    yield from search(node.body)
                    for branch in node.elif_:
                        yield from search(branch.body)
                    yield from search(node.else_)

    return list(search(tree.body))


def _turns(marked: str) -> Iterator[tuple[str, str, Span]]:
    """Loop, role and span, in the text without marks, of what each round wrote."""
    removed = 0
    for mark, following in pairwise(TURN.finditer(marked)):  # the last mark of all ends a loop
        removed += len(mark.group())
        if mark.group(1) is not None:
            yield mark.group(1), mark.group(2), (mark.end() - removed, following.start() - removed)
