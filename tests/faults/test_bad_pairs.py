"""Preferences that cannot be learnt from: one message with the next step, exit code 2, and the rest is kept."""

import json
from pathlib import Path

import pytest

from llmtrain.artifacts import DatasetManifest
from llmtrain.cli.train import main
from tests.faults.commands import SMALL

GOOD_PAIR = {"prompt": "Which one?", "chosen": "this one", "rejected": "that one"}
WRONG_PAIRS = {
    "not a string": ({"chosen": 3}, "'chosen' is a number, not a string"),
    "a chat": ({"chosen": [{"role": "assistant", "content": "this"}]}, "'chosen' is a list, not a string"),
    "null": ({"rejected": None}, "'rejected' is null, not a string"),
    "empty": ({"rejected": ""}, "'rejected' is empty"),
    "no prompt": ({"prompt": " "}, "'prompt' is empty"),
    "tie": ({"rejected": "this one\n"}, "is a tie: 'chosen' and 'rejected' are the same text"),
    "dialogues": (
        {"chosen": "Which one? this one", "rejected": "Which one? that one"},
        "is a whole dialogue, stored twice: both answers begin with the prompt; cut it off",
    ),
    "long": ({"chosen": "word " * 300}, "more than trainer.sequence_tokens="),
}


def preferences(pairs: list[dict]) -> list[str]:
    """The command that tunes the model that is here on `pairs`."""
    Path("votes.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    corpus = "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}"
    data = ["data=preference_jsonl", "data.pairs.paths=[votes.jsonl]", "data.pairs.licence=MIT", corpus]
    return [*SMALL, "trainer=dpo", "trainer.epochs=1", *data]


@pytest.mark.parametrize("kind", WRONG_PAIRS)
def test_a_wrong_pair_is_named_with_its_reason_and_too_many_stop_the_run(kind: str, trained, fails):
    change, reason = WRONG_PAIRS[kind]
    command = preferences([GOOD_PAIR, {**GOOD_PAIR, **change}])
    fails(command, 2, "1 of 2 records are refused", "  votes.jsonl:2: ", reason)
    assert len(list(Path("outputs/data").glob("*/manifest.json"))) == 1, "the text's; no pairs"


def test_a_pair_that_another_contradicts_is_refused_with_it(trained, fails):
    opposite = {**GOOD_PAIR, "chosen": GOOD_PAIR["rejected"], "rejected": GOOD_PAIR["chosen"]}
    command = preferences([GOOD_PAIR, opposite])
    fails(
        command,
        2,
        "  votes.jsonl:1: prefers what votes.jsonl:2 rejects, for the same prompt\n",
        "  votes.jsonl:2: prefers what votes.jsonl:1 rejects, for the same prompt\n",
    )


def test_pairs_of_one_prompt_stay_together_repeated_ones_count_once_and_wrong_ones_are_kept_aside(trained, capsys):
    good = [
        {"prompt": f"Question {number}?", "chosen": f"answer {answer}", "rejected": "none"}
        for number in range(80)
        for answer in range(2)
    ]
    wrong = [{**GOOD_PAIR, **change} for change, _ in WRONG_PAIRS.values()]
    assert main(preferences([*good, *wrong, *good[:5]])) == 0
    capsys.readouterr()
    (directory,) = (path.parent for path in Path("outputs/data").glob("*/train.jsonl"))
    facts = DatasetManifest.read(directory / "manifest.json")
    assert sum(split.num_documents for split in facts.splits.values()) == len(good)
    assert (facts.num_refused, facts.num_duplicates) == (len(wrong), 5)
    refused = [json.loads(line)["where"] for line in (directory / "refused.jsonl").read_text().splitlines()]
    assert sorted(refused) == sorted(f"votes.jsonl:{len(good) + number}" for number in range(1, len(wrong) + 1))
    splits = [
        {json.loads(line)["prompt"] for line in (directory / f"{split}.jsonl").read_text().splitlines()}
        for split in facts.splits
    ]
    assert sum(map(len, splits)) == 80, "no prompt is in two splits"
