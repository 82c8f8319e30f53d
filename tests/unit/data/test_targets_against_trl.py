"""Ids and targets of chats equal the columns that TRL's SFTTrainer makes of them with assistant_only_loss."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_samples import ONE_TURN, SMOLLM2, TOOL, TOOL_TURNS, TWO_TURNS, assistant, chat, user

from llmtrain.config.data import ChatFile
from llmtrain.data.chat_files import read_chats
from llmtrain.data.chat_template import ChatTemplate
from llmtrain.data.chats import chat_ids
from llmtrain.data.messages import Conversation
from llmtrain.data.tokenizer import load_tokenizer

THOUGHTS = [user("a"), assistant("<think>\nhm\n</think>\n\nb\n\nc")]
TRAPS = [
    [user("ends in a line\n"), assistant("\n\nbegins with lines")],
    [user("é e\u0301 🙂"), assistant("  中 \u200d x  ")],
    [user("1"), assistant("2"), user("3"), assistant("4"), user("5"), assistant("6")],
]
MARKED_SMOLLM2 = SMOLLM2.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' + '\n'}}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n'}}{% endif %}",
)


@pytest.fixture(scope="module")
def columns_of_trl(tmp_path_factory: pytest.TempPathFactory):
    """`input_ids` and `assistant_masks` of `SFTTrainer.train_dataset`."""
    import trl
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_length": None}

    def columns(
        tokenizer: Any, conversations: list[Conversation], arguments_as_json: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        rows = [
            {"messages": json.loads(json.dumps(each.messages)), "tools": json.dumps(each.tools)}
            for each in conversations
        ]
        for row in rows if arguments_as_json else []:  # or Arrow would give each call the arguments of all
            for message in row["messages"]:
                for call in message.get("tool_calls", ()):
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        trainer = trl.SFTTrainer(
            model=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)),
            args=trl.SFTConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")), assistant_only_loss=True, disable_tqdm=True, **settings
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return [
            (row["input_ids"], row.get("assistant_masks") or [int(label != -100) for label in row["labels"]])
            for row in trainer.train_dataset
        ]

    return columns


def columns_of_ours(tokenizer: Any, conversations: list[Conversation]) -> list[tuple[list[int], list[int]]]:
    template = ChatTemplate(tokenizer)
    found = chat_ids(template, [template.rendered(each) for each in conversations])
    return [(tokens.ids.tolist(), tokens.is_target.astype(int).tolist()) for tokens in found]


@pytest.mark.parametrize("template", ["qwen3_training.jinja", "qwen2_5_training.jinja"])
def test_published_templates_with_markers(tokenizer_dir: Path, columns_of_trl, template: str):
    import trl

    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / template).read_text()
    chats = [chat(each) for each in (ONE_TURN, TWO_TURNS, THOUGHTS, *TRAPS)]
    chats += [chat(TOOL_TURNS, [TOOL])]
    assert columns_of_ours(tokenizer, chats) == columns_of_trl(tokenizer, chats)


def test_smollm2s_template_without_markers_is_trls_with_them(tokenizer_dir: Path, columns_of_trl):
    assert MARKED_SMOLLM2 != SMOLLM2
    plain, marked = load_tokenizer(tokenizer_dir), load_tokenizer(tokenizer_dir)
    plain.chat_template, marked.chat_template = SMOLLM2, MARKED_SMOLLM2
    chats = [chat(each) for each in (ONE_TURN, TWO_TURNS, *TRAPS)]
    assert columns_of_ours(plain, chats) == columns_of_trl(marked, chats)


def test_real_tool_calling_chats_with_the_official_tokenizer(repository: Path, columns_of_trl):
    """Under TRL's training template; and single answers under Qwen3's own, which writes those alike."""
    import trl

    shared = repository.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("needs ../shared: the official Qwen3 tokenizer and tool-calling chats")
    paths = (str(shared / "chat" / "glaive_toolcall_300.json"),)
    kept, refused, num_duplicates = read_chats(
        ChatFile(kind="jsonl", paths=paths, licence="Apache-2.0", format="sharegpt")
    )
    assert (len(kept), refused, num_duplicates) == (265, [], 35)
    tokenizer = load_tokenizer(shared / "tokenizer-qwen3")
    own = load_tokenizer(shared / "tokenizer-qwen3")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text()
    assert columns_of_ours(tokenizer, kept) == columns_of_trl(tokenizer, kept, arguments_as_json=True)
    single = [chat(list(each.messages[:2]), list(each.tools or ())) for each in kept if len(each.messages) == 2]
    assert len(single) == 35
    assert columns_of_ours(own, single) == columns_of_trl(tokenizer, single)
