"""From the text of a pair to its ids, the way TRL's DPOTrainer does it."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from llmtrain.data.preferences import Pair, PairText
from llmtrain.data.tokenizer import encode_rendered_chats, encode_texts

Form = Literal["continuation", "plain", "chat"]


def pair_ids(tokenizer: Any, texts: Sequence[PairText], form: Form) -> list[Pair]:
    """The ids of each pair.

    `continuation`: prompt and answer, nothing after it, because the text goes on. `plain`: the end-of-text token closes
    the answer. `chat`: the prompt is the user's turn, the answer the assistant's as the chat template writes it (with
    Qwen3's own template an empty thinking block stands before it).

    As in TRL 1.16, prompt and prompt + answer are tokenised each as a whole, and the answer's ids are what follows the
    longest prefix that the prompt shares with both: where a token reaches across the border, the prompt gives up its
    end. The prompt may so come out empty.
    """
    if form == "chat":
        prompts = encode_rendered_chats(tokenizer, [_chat(tokenizer, text.prompt) for text in texts])
        chosen = encode_rendered_chats(tokenizer, [_chat(tokenizer, text.prompt, text.chosen) for text in texts])
        rejected = encode_rendered_chats(tokenizer, [_chat(tokenizer, text.prompt, text.rejected) for text in texts])
    else:
        end = [tokenizer.eos_token_id] if form == "plain" else []
        prompts = encode_texts(tokenizer, [text.prompt for text in texts])
        chosen = [ids + end for ids in encode_texts(tokenizer, [text.prompt + text.chosen for text in texts])]
        rejected = [ids + end for ids in encode_texts(tokenizer, [text.prompt + text.rejected for text in texts])]
    return [_split(*ids) for ids in zip(prompts, chosen, rejected, strict=True)]


def special_token_in(tokenizer: Any, text: PairText) -> str | None:
    """A special token that the text spells out: in a chat it would end the turn, or open another."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next((token for token in special if token in text.prompt + text.chosen + text.rejected), None)


def _split(prompt: list[int], with_chosen: list[int], with_rejected: list[int]) -> Pair:
    triples = zip(prompt, with_chosen, with_rejected, strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1] == ids[2], triples))
    return Pair(
        *(np.array(ids, dtype=np.int64) for ids in (prompt[:shared], with_chosen[shared:], with_rejected[shared:]))
    )


def _chat(tokenizer: Any, prompt: str, answer: str | None = None) -> str:
    turns = [{"role": "user", "content": prompt}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)
    return text
