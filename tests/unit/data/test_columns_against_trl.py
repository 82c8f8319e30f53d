"""The ids of pairs equal the tokenised columns that TRL's DPOTrainer makes of the same texts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.pair_ids import Form, pair_ids
from llmtrain.data.preferences import PairText
from llmtrain.data.tokenizer import load_tokenizer

Columns = list[tuple[list[int], list[int], list[int]]]

PIECES = ["a", "the", " ", "  ", "\n", "\n\n", "\t", "1", ".", "'s"]
PIECES += ["é", "e\u0301", "\u0301", "中", "ה", "🙂", "\u200d"]  # composed, decomposed, an accent alone, a joiner alone
TRAPS = [
    PairText("", "an answer to nothing", "x", "empty prompt"),
    PairText("ends in a space ", "the cat", " cat", ""),
    PairText("ends in a line\n", "\nthe cat", "the cat\n\n", ""),
    PairText("the young th", "e", " x", "a token crosses the border"),
    PairText("cafe", "\u0301 au lait", " noir", "the border is inside a letter"),
    PairText("\U0001f469", "\u200d\U0001f4bb", "?", "the border is inside an emoji"),
    PairText("你好，", "世界", " мир", ""),
    PairText("same beginning", " yes", " yes and more", ""),
    PairText("(", ")\n\n", "tree.", ""),
    PairText("think", "<think>\nhm\n</think>\n\nyes", "\n\nno", "markup that Qwen3's template takes apart"),
]


@pytest.fixture
def columns_of_trl(tmp_path: Path):
    """The columns of `DPOTrainer.train_dataset`."""
    import trl
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_length": None}

    def columns(tokenizer: Any, texts: list[PairText], form: Form) -> Columns:
        rows: list[dict[str, Any]] = [{"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected} for t in texts]
        if form == "chat":
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            rows = [{name: [{"role": roles[name], "content": row[name]}] for name in row} for row in rows]
        network = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads))
        trainer = trl.DPOTrainer(
            model=network,
            ref_model=Qwen3ForCausalLM(network.config),
            args=trl.DPOConfig(output_dir=str(tmp_path), disable_tqdm=True, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]

    return columns


def columns_of_ours(tokenizer: Any, texts: list[PairText], form: Form) -> Columns:
    pairs = pair_ids(tokenizer, texts, form)
    return [(pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) for pair in pairs]


def random_texts(number: int) -> list[PairText]:
    """Short texts of pieces that merge with their neighbours, or must not."""
    source = random.Random(0)

    def text() -> str:
        return "".join(source.choices(PIECES, k=source.randint(1, 8)))

    return [PairText(text(), text(), text(), "") for _ in range(number)]


@pytest.mark.parametrize("texts", [TRAPS, random_texts(200)], ids=["traps", "random"])
def test_plain_columns_are_those_of_trl(tokenizer_dir, columns_of_trl, texts):
    tokenizer = load_tokenizer(tokenizer_dir)
    assert columns_of_ours(tokenizer, texts, "plain") == columns_of_trl(tokenizer, texts, "plain")


@pytest.mark.parametrize("template", ["our own", "qwen3.jinja", "qwen2_5.jinja"])
def test_chat_columns_are_those_of_trl(tokenizer_dir, columns_of_trl, template):
    import trl

    tokenizer = load_tokenizer(tokenizer_dir)
    if template != "our own":
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / template).read_text()
    texts = TRAPS + random_texts(50)
    theirs = columns_of_trl(tokenizer, texts, "chat")
    assert columns_of_ours(tokenizer, texts, "chat") == theirs
    begins = "<|im_start|>system\nYou are Qwen" if template == "qwen2_5.jinja" else "<|im_start|>user\n"
    assert tokenizer.decode(theirs[0][0]).startswith(begins)
    assert tokenizer.decode(theirs[0][1]).endswith("an answer to nothing<|im_end|>\n")  # its newline is the answer's


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_columns_of_annotated_pairs_with_the_official_tokenizer_are_those_of_trl(repository, columns_of_trl, form):
    shared = repository.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("needs ../shared: the official Qwen3 tokenizer and PandaLM's pairs")
    tokenizer = load_tokenizer(shared / "tokenizer-qwen3")
    with (shared / "preferences" / "pandalm_human_999_pairs.jsonl").open() as file:
        records = [json.loads(line) for line in file]
    texts = [PairText(record["prompt"], record["chosen"], record["rejected"], "") for record in records]
    assert len(texts) == 836
    assert columns_of_ours(tokenizer, texts, form) == columns_of_trl(tokenizer, texts, form)
