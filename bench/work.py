"""What is trained on in the comparisons: pinned shapes, data from public text, and llmtrain's own loop."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHAT_TOKENIZER = SHARED / "tokenizer-qwen3"

SHAPES = {
    "head": {  # 43.6 M parameters, 38.9 M of them the tied embedding
        "vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    "body": {  # 41.9 M parameters, 4.2 M of them the tied embedding
        "vocab_size": 8_192, "hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "tiny": {  # for tests of these scripts
        "vocab_size": 8_192, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    },
}  # fmt: skip
LR = 1e-4


def config_of(shape: dict[str, int], trainer: str, **changes: object) -> TrainConfig:
    """A run's config: fp32, constant learning rate, no decay of weights, one epoch; `changes` are overrides."""
    values = {f"model.{name}": size for name, size in shape.items()} | {
        "model.max_position_embeddings": 8192,
        "model.initializer_range": 0.02,
        "model.rope_theta": 1e6,
        "infra.precision": "fp32",
        "trainer.lr": LR,
        "trainer.schedule": "constant",
        "trainer.warmup_tokens": 0,
        "trainer.weight_decay": 0.0,
        **changes,
    }
    return load_config(["model=qwen3_tiny", f"trainer={trainer}", *(f"{key}={value}" for key, value in values.items())])


def tokenizer_of(vocab_size: int, directory: Path) -> Any:
    """Qwen3's own where its ids fit; otherwise a BPE of that size, trained on the interpreter's help texts."""
    from llmtrain.data.tokenizer import load_tokenizer, train_bpe

    if vocab_size > 151_000:
        return load_tokenizer(CHAT_TOKENIZER)
    path = directory / f"bpe-{vocab_size}"
    if not path.exists():
        path.mkdir(parents=True)
        train_bpe([help_text(), *_strings(pandalm())], vocab_size, path)
    return load_tokenizer(path)


def help_text() -> str:
    """The help topics that come with Python: 465 kB of technical English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def pandalm() -> list[dict[str, str]]:
    """PandaLM's human-annotated pairs: prompt, chosen, rejected; none where there is no ../shared."""
    path = SHARED / "preferences" / "pandalm_human_999_pairs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gsm8k() -> list[dict[str, str]]:
    """GSM8K's training set: question, answer; none where there is no ../shared."""
    path = SHARED / "chat" / "gsm8k_train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _strings(records: Iterable[dict[str, Any]]) -> list[str]:
    return [value for record in records for value in record.values() if isinstance(value, str)]


def pairs_of(data: str, number: int, tokenizer: Any) -> list[dict[str, list[int]]]:
    """`number` pairs as ids: `pandalm` chats; `long`: prompts of 1,000 tokens of text, the next 100 the chosen answer,
    100 from elsewhere the rejected one."""
    order = random.Random(0)
    if data == "pandalm":
        records = order.sample(pandalm(), number)
        return [
            {"prompt_ids": _prompt(tokenizer, record["prompt"])}
            | {f"{name}_ids": _answer(tokenizer, record[name]) for name in ("chosen", "rejected")}
            for record in records
        ]
    prompt, answer = (1_000, 100) if data == "long" else (40, 8)
    ids = tokenizer(help_text()).input_ids
    starts = [order.randrange(len(ids) - prompt - answer) for _ in range(2 * number)]
    return [
        {
            "prompt_ids": ids[here : here + prompt],
            "chosen_ids": ids[here + prompt : here + prompt + answer],
            "rejected_ids": ids[elsewhere + prompt : elsewhere + prompt + answer],
        }
        for here, elsewhere in zip(starts[::2], starts[1::2], strict=True)
    ]


def chats_of(data: str, number: int, tokenizer: Any) -> list[dict[str, list[int]]]:
    """`number` chats as ids and labels, -100 where the user speaks: `gsm8k`, or questions about the help text."""
    records = gsm8k()[:number]
    if data != "gsm8k":
        lines = [line for line in help_text().splitlines() if len(line) > 30][: 2 * number]
        records = [{"question": one, "answer": two} for one, two in zip(lines[::2], lines[1::2], strict=True)]
    found = []
    for record in records:
        prompt, answer = _prompt(tokenizer, record["question"]), _answer(tokenizer, record["answer"])
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found


def _prompt(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _answer(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False).input_ids, *tokenizer("<|im_end|>\n").input_ids]
