"""The ids of pairs and votes equal the tokenised columns that TRL's trainers make of the same texts and messages."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_samples import TOOL, TOOL_TURNS, assistant, user

from llmtrain.config.data import PreferenceFile, VoteFile
from llmtrain.data.pair_ids import Form, pair_ids
from llmtrain.data.preference_files import ChatPair, read_pairs, read_votes
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

    def columns(tokenizer: Any, texts: list[PairText] | list[dict[str, Any]], form: Form) -> Columns:
        rows: list[dict[str, Any]] = [
            each if isinstance(each, dict) else {name: getattr(each, name) for name in ("prompt", "chosen", "rejected")}
            for each in texts
        ]
        if form == "chat" and isinstance(texts[0], PairText):
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


def columns_of_ours(tokenizer: Any, texts: list[PairText | ChatPair], form: Form) -> Columns:
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


SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [user("2+3?"), assistant("5"), user("4+4?")]
MESSAGES = {
    "one turn": [{"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b c")]}],
    "several turns": [
        {"prompt": [SYSTEM, *TURNS], "chosen": [assistant("8")], "rejected": [assistant("\n\n8, as 4+4=8")]},
        {"prompt": TURNS, "chosen": [assistant("<think>\nhm\n</think>\n\n8")], "rejected": [assistant("<think>")]},
    ],
    "the prompt is what both begin with": [
        {"chosen": [*TURNS, assistant("8")], "rejected": [*TURNS, assistant("9")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    ],
    "tools": [
        {"prompt": TOOL_TURNS[:1], "chosen": TOOL_TURNS[1:2], "rejected": [assistant("No idea.")], "tools": [TOOL]},
        {"prompt": TOOL_TURNS[:4], "chosen": TOOL_TURNS[4:5], "rejected": [assistant("In both.")], "tools": [TOOL]},
    ],
}


@pytest.mark.parametrize("template", ["our own", "qwen3.jinja", "qwen2_5.jinja"])
@pytest.mark.parametrize("records", MESSAGES.values(), ids=MESSAGES)
def test_columns_of_messages_are_those_of_trl(tokenizer_dir, columns_of_trl, tmp_path, records, template):
    import trl

    tokenizer = load_tokenizer(tokenizer_dir)
    if template != "our own":
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / template).read_text()
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs, refused, _ = read_pairs(PreferenceFile(kind="jsonl", paths=(str(path),), licence="MIT", template="chat"))
    assert refused == []
    theirs = columns_of_trl(tokenizer, records, "chat")
    assert columns_of_ours(tokenizer, pairs, "chat") == theirs
    assert all(tokenizer.decode(prompt).endswith("<|im_start|>assistant\n") for prompt, _, _ in theirs)


def test_columns_of_votes_are_those_of_trls_kto(tokenizer_dir, tmp_path):
    import trl
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = load_tokenizer(tokenizer_dir)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    network = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), **sizes, num_attention_heads=1, num_key_value_heads=1)
    )
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_length": None}
    texts = [
        {"prompt": text.prompt, "completion": text.chosen, "label": len(text.chosen) % 2 == 0}
        for text in [*TRAPS[1:], *random_texts(30)]
        if text.prompt.strip() and text.chosen.strip()
    ]
    chats = [
        {"prompt": [user(each["prompt"])], "completion": [assistant(each["completion"])], "label": each["label"]}
        for each in texts
    ]
    for template, records in (("plain", texts), ("chat", chats)):
        path = tmp_path / f"{template}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        file = VoteFile(kind="votes", paths=(str(path),), licence="MIT", template=template)
        votes, refused, num_duplicates = read_votes(file)
        assert (refused, num_duplicates) == ([], 0)
        ours = [
            (prompt, completion, vote.is_desirable)
            for vote, (prompt, completion, _) in zip(
                votes, columns_of_ours(tokenizer, [vote.pair for vote in votes], template), strict=True
            )
        ]
        trainer = trl.KTOTrainer(
            model=network,
            ref_model=Qwen3ForCausalLM(network.config),
            args=trl.KTOConfig(
                output_dir=str(tmp_path / "trl"), disable_tqdm=True, per_device_train_batch_size=2, **settings
            ),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
        )
        rows = trainer.train_dataset
        assert ours == [(row["prompt_ids"], row["completion_ids"], row["label"]) for row in rows]
