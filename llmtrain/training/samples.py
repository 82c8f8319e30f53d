"""The same held-out prompts, continued by the model at each evaluation: what the figures sound like.

The choice of tokens draws from a generator of its own, so that a run with samples computes what one without computes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import Ids, TokenShards
from llmtrain.models.attention import generating
from llmtrain.training.evaluation import evaluating

NUM_PROMPTS = 4
PROMPT_TOKENS = 32
"""Most tokens of a text prompt; a preference pair's prompt is taken whole."""
TEMPERATURE = 0.7
TOP_K = 50


def text_prompts(shards: TokenShards) -> list[Ids]:
    """The beginnings of documents spread over a split; where there are fewer documents, passages spread over it."""
    if shards.num_documents < NUM_PROMPTS and (num_rows := shards.num_rows(PROMPT_TOKENS)):
        return [shards.row(index, PROMPT_TOKENS)[:-1] for index in _spread(num_rows)]
    documents = [shards.document(index)[:-1] for index in _spread(shards.num_documents)]  # without end-of-text
    return [document[:PROMPT_TOKENS] for document in documents if len(document)]


def pair_prompts(pairs: PreferencePairs) -> list[Ids]:
    """Different prompts, spread over the pairs of a split."""
    return spread_prompts(len(pairs), lambda index: pairs[index].prompt_ids)


def spread_prompts(number: int, prompt: Callable[[int], Ids]) -> list[Ids]:
    """The different prompts among some, spread over a split of `number`."""
    prompts = {tuple(ids.tolist()): ids for ids in (prompt(index) for index in _spread(number))}
    return [ids for ids in prompts.values() if len(ids)]


@torch.no_grad()
def continuations(
    model: PreTrainedModel, prompts: Sequence[Ids], num_tokens: int, *, seed: int, infra: Infra
) -> list[list[int]]:
    """`num_tokens` further tokens of each prompt, drawn from the `TOP_K` likeliest at `TEMPERATURE`.

    Equal weights and an equal `seed` give equal tokens. Where prompt and continuation do not fit the model's context,
    the beginning of the prompt is left out.
    """
    room = model.config.max_position_embeddings - num_tokens
    prompts = [prompt[-room:] for prompt in prompts]
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(
        prompts
    ):  # padded on the left: the next token is every row's last, and rotary positions are relative
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, length - len(prompt) :] = 1
    generator = torch.Generator().manual_seed(seed)
    cache, written = None, []
    with evaluating(model, infra), generating(model):
        for _ in range(num_tokens):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float().cpu().nan_to_num()  # that a model diverged is for its loss to say
            likeliest, candidates = (logits / TEMPERATURE).topk(min(TOP_K, logits.shape[1]))
            choice = torch.multinomial(likeliest.softmax(dim=-1), 1, generator=generator)
            written.append(candidates.gather(1, choice))
            ids = written[-1].to(model.device)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.cat(written, dim=1).tolist()


def _spread(count: int) -> list[int]:
    return sorted({number * count // NUM_PROMPTS for number in range(NUM_PROMPTS)})
