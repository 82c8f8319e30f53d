"""From the text of a pair to its ids, the way TRL's DPOTrainer does it."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from llmtrain.data.chat_template import ChatTemplate
from llmtrain.data.messages import Message
from llmtrain.data.preference_files import ChatPair
from llmtrain.data.preferences import Pair, PairText
from llmtrain.data.tokenizer import encode_rendered_chats, encode_texts

Form = Literal["continuation", "plain", "chat"]


def pair_ids(tokenizer: Any, texts: Sequence[PairText | ChatPair], form: Form) -> list[Pair]:
    """The ids of each pair.

    `continuation`: prompt and answer, nothing after it, because the text goes on. `plain`: the end-of-text token closes
    the answer. `chat`: a prompt of text is the user's turn, an answer the assistant's as the chat template writes it
    (with Qwen3's own template an empty thinking block stands before it); messages are rendered with their tools.

    As in TRL 1.16, prompt and prompt + answer are tokenised each as a whole, and the answer's ids are what follows the
    longest prefix that the prompt shares with both: where a token reaches across the border, the prompt gives up its
    end. The prompt may so come out empty. Raises BadMessage where the chat template refuses a pair.
    """
    if form == "chat":
        template = ChatTemplate(tokenizer)
        rendered = [rendered_pair(template, text) for text in texts]
        prompts, chosen, rejected = (
            encode_rendered_chats(tokenizer, [parts[number] for parts in rendered]) for number in range(3)
        )
    else:
        plain = [text for text in texts if isinstance(text, PairText)]
        assert len(plain) == len(texts), "messages need a chat template"
        end = [tokenizer.eos_token_id] if form == "plain" else []
        prompts = encode_texts(tokenizer, [text.prompt for text in plain])
        chosen = [ids + end for ids in encode_texts(tokenizer, [text.prompt + text.chosen for text in plain])]
        rejected = [ids + end for ids in encode_texts(tokenizer, [text.prompt + text.rejected for text in plain])]
    return [_split(*ids) for ids in zip(prompts, chosen, rejected, strict=True)]


def rendered_pair(template: ChatTemplate, pair: PairText | ChatPair) -> tuple[str, str, str]:
    """The prompt with the generation prompt, and the whole chat with either answer."""
    prompt, *answers = (_messages(part, role) for part, role in _parts(pair))
    tools = pair.tools if isinstance(pair, ChatPair) else None
    with_chosen, with_rejected = (template.text([*prompt, *answer], tools) for answer in answers)
    return template.text(prompt, tools, add_generation_prompt=True), with_chosen, with_rejected


def _split(prompt: list[int], with_chosen: list[int], with_rejected: list[int]) -> Pair:
    triples = zip(prompt, with_chosen, with_rejected, strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1] == ids[2], triples))
    return Pair(
        *(np.array(ids, dtype=np.int64) for ids in (prompt[:shared], with_chosen[shared:], with_rejected[shared:]))
    )


def _parts(pair: PairText | ChatPair) -> list[tuple[str | Sequence[Message], str]]:
    return [(pair.prompt, "user"), (pair.chosen, "assistant"), (pair.rejected, "assistant")]


def _messages(part: str | Sequence[Message], role: str) -> list[Message]:
    return [{"role": role, "content": part}] if isinstance(part, str) else list(part)
