"""The gate passes the clean model in every precision, and each fault alone fails it."""

import math
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_models import FAULTS, Fault, broken
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from llmtrain.client.client import Scores
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import NotTheSameModel
from llmtrain.evaluation.parity import FP32, Bounds, Differences, Reference, Verdict, apart, from_floor, refuse, table
from llmtrain.evaluation.parties import InProcess, Party
from llmtrain.evaluation.reference import scores
from llmtrain.evaluation.rounding import Precision, Rounding, rounded
from llmtrain.models.directory import load

INT8 = Rounding(bits=8, block=32, head_bits=8, products="int8")
INT4 = Rounding(bits=4, block=32, head_bits=8, products="int8")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", INT8, INT4)
HIDDEN_BY_INT4 = {"untied_head", "with_begin_token", "without_first_token"}
"""Four bits alone differ by more than these do: an endpoint is held against the form's own files as well."""


def party(reference: Reference, **changed: Any) -> InProcess:
    return InProcess(
        **{"label": "it", "tokenizer": reference.tokenizer, "scorer": partial(scores, reference.model)} | changed
    )


def judge(reference: Reference, party: Party, precision: Precision) -> Verdict:
    return reference.judge(reference.ask(party), precision)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_clean_model_passes(reference: Reference, trained: Path, precision: Precision) -> None:
    """As stored, read again; in bf16 as transformers itself loads it."""
    model = load(trained / "model")
    if precision == "bf16":
        model = AutoModelForCausalLM.from_pretrained(trained / "model", dtype="bfloat16").eval()
    elif precision != "fp32":
        model = rounded(model, precision)
    tokenizer = load_tokenizer(trained / "model")
    verdict = judge(reference, party(reference, scorer=partial(scores, model), tokenizer=tokenizer), precision)
    assert verdict.faults == []
    refuse([verdict])
    assert verdict.num_texts == 32 + 5, (
        "each probe; and of four kinds the first text, the first question, or both, asked for an answer"
    )


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_of_the_weights_fails(
    reference: Reference, trained: Path, tmp_path: Path, fault: Fault, precision: Precision
) -> None:
    model = rounded(load(broken(trained, fault, tmp_path / "model")), precision)
    fails(reference, scores(model, reference.ids), precision, fault.__name__)


def fails(reference: Reference, answers: list[Scores], precision: Precision, name: str) -> None:
    """It does, by the scores and nothing else; of four bits also against its own files, and some only there."""
    verdict = judge(reference, party(reference, scorer=lambda rows: answers), precision)
    assert verdict.unequal == ()
    if precision == INT4:
        files = scores(rounded(reference.model, precision), reference.ids)
        own = Reference(reference.model, reference.tokenizer, reference.rows, files)
        against_files = judge(own, party(reference, scorer=lambda rows: answers), "fp32")
        with pytest.raises(NotTheSameModel, match=r"it: mean"):
            refuse([against_files])
    if precision == INT4 and name in HIDDEN_BY_INT4:
        assert verdict.faults == []
    else:
        with pytest.raises(NotTheSameModel, match=r"it: mean"):
            refuse([verdict])


def with_begin_token(tokenizer: Any, model: Any, rows: Sequence[Sequence[int]]) -> list[Scores]:
    """An engine that puts a begin token before what it is given."""
    found = scores(model, [(tokenizer.eos_token_id, *row) for row in rows])
    return [Scores(one.logprobs[1:], one.top_ids[1:]) for one in found]


def without_first_token(tokenizer: Any, model: Any, rows: Sequence[Sequence[int]]) -> list[Scores]:
    """An engine that takes the first token for a begin token and leaves it out; of the second it tells the truth."""
    firsts = scores(model, [row[:2] for row in rows])
    rest = iter(scores(model, [row[1:] for row in rows if len(row) > 2]))
    return [
        Scores((*first.logprobs, *later.logprobs), (*first.top_ids, *later.top_ids))
        for row, first in zip(rows, firsts, strict=True)
        for later in [next(rest) if len(row) > 2 else Scores((), ())]
    ]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("engine", [with_begin_token, without_first_token])
def test_a_begin_token_too_many_or_too_few_fails_by_the_scores(
    reference: Reference, engine: Any, precision: Precision
) -> None:
    answers = engine(reference.tokenizer, rounded(reference.model, precision), reference.ids)
    fails(reference, answers, precision, engine.__name__)


def test_a_tokenizer_that_adds_a_begin_token_fails_by_the_texts(reference: Reference) -> None:
    tokenizer = deepcopy(reference.tokenizer)
    begin = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.eos_token_id)]
    )
    verdict = judge(reference, party(reference, tokenizer=tokenizer), "fp32")
    assert verdict.found.max_nats == 0
    texts = [row for row in reference.rows.rows if row.text is not None]
    assert len(verdict.unequal) == len(texts) + 3, "code, unicode, long; chats have what their template writes"
    with pytest.raises(NotTheSameModel, match=r"trained \.\.\.b'def count.*here \.\.\.b'<\|endoftext\|>def count"):
        refuse([verdict])


@pytest.mark.parametrize(
    ("written", "instead", "number"),
    [
        (
            "'<|im_end|>\\n'",
            "'<|im_end|>'",
            10 + 3 + 5 + 2,
        ),  # a line end too few: chats, unicode, tools; two that are asked for an answer
        ("<tools>", "<tool>", 5),  # of tools alone
    ],
)
def test_another_template_fails(reference: Reference, written: str, instead: str, number: int) -> None:
    tokenizer = deepcopy(reference.tokenizer)
    assert written in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(written, instead, 1 if "tools" in written else -1)
    verdict = judge(reference, party(reference, tokenizer=tokenizer), "fp32")
    assert verdict.found.max_nats == 0
    assert len(verdict.unequal) == number
    assert [fault for fault in verdict.faults if "become other tokens" in fault]


def test_a_template_that_is_gone_or_refuses_fails(reference: Reference) -> None:
    tokenizer = deepcopy(reference.tokenizer)
    for template in (None, "{{ raise_exception('no chats here') }}"):
        tokenizer.chat_template = template
        verdict = judge(reference, party(reference, tokenizer=tokenizer), "fp32")
        assert len(verdict.unequal) == 10 + 3 + 5 + 2
        assert all("is refused: it: " in fault for fault in verdict.unequal)


def test_a_decoder_that_changes_text_fails(reference: Reference) -> None:
    class Stripping(InProcess):
        def decoded(self, ids: Sequence[int]) -> str:
            return super().decoded(ids).rstrip()

    verdict = judge(reference, Stripping("it", reference.tokenizer, partial(scores, reference.model)), "fp32")
    assert verdict.unequal
    assert all("shown as other text" in fault for fault in verdict.unequal)


def test_the_worst_token_is_named(reference: Reference) -> None:
    changed = [*reference.scores]
    number = next(n for n, row in enumerate(reference.rows.rows) if row.probe.name == "code-00")
    logprobs = [*changed[number].logprobs]
    logprobs[1] -= 0.5
    changed[number] = Scores(tuple(logprobs), changed[number].top_ids)
    verdict = judge(reference, party(reference, scorer=lambda rows: changed), "fp32")
    token = reference.rows.rows[number].scored[2]
    words = f"probe code-00, token 2 {reference.tokenizer.decode([token])!r} (id {token}): trained "
    assert words in verdict.found.worst
    assert verdict.found.worst.endswith(f"{logprobs[1] + 0.5:.4f}, here {logprobs[1]:.4f}")
    assert verdict.found.max_nats == pytest.approx(0.5)


def test_what_is_no_number_fails(reference: Reference) -> None:
    changed = [Scores((math.nan, *one.logprobs[1:]), one.top_ids) for one in reference.scores]
    verdict = judge(reference, party(reference, scorer=lambda rows: changed), "bf16")
    assert verdict.faults
    figures = verdict.evidence(["parent"]).figures
    assert figures["passed"] == 0
    assert "max_abs_dlogp_nats" not in figures, "JSON has no such number"


def test_bounds_come_from_the_floor() -> None:
    """1 of 100 positions turns: 1.5 of that and three standard errors, 3 sqrt(0.01 / 100) = 0.03, are allowed."""
    floor = Differences(np.array([0.01] * 99 + [0.2]), top1=0.99, worst="")
    bounds = from_floor(floor)
    assert bounds.mean_nats == pytest.approx(1.5 * 0.0119)
    assert bounds.max_nats == pytest.approx(6 * 0.2)
    assert bounds.top1 == pytest.approx(1 - 0.015 - 0.03)
    assert from_floor(Differences(np.zeros(10_000), top1=1.0, worst="")).mean_nats == FP32.mean_nats


def test_where_texts_part(reference: Reference) -> None:
    tokenizer = reference.tokenizer
    one, other = (tokenizer(text)["input_ids"] for text in ("one line\nand more", "one line and more"))
    assert apart(tokenizer, one, other) == (
        "first at byte 8: trained ...b'one line\\nand more', here ...b'one line and more'"
    )
    whole, cut = tokenizer("the")["input_ids"], [*tokenizer("t")["input_ids"], *tokenizer("he")["input_ids"]]
    assert whole != cut
    assert apart(tokenizer, whole, cut) == (f"the same text in other tokens, from token 0: trained {whole}, here {cut}")


def test_the_table_has_each_figure_with_its_bound(reference: Reference) -> None:
    found = Differences(np.array([0.0, 2e-5]), top1=1.0, worst="none")
    verdict = Verdict("HF export", "fp32", found, FP32, 39, (), reference.rows)
    wrong = Verdict("vllm", INT4, found, Bounds(1e-6, 1e-3, 0.5), 39, ("a",), reference.rows)
    lines = table([verdict, wrong]).splitlines()
    assert lines[1].split("  ")[0] == "HF export"
    assert "1e-05 (0.0001)" in lines[1]
    assert lines[1].endswith("the same")
    assert "38 of 39" in lines[2]
    assert lines[2].endswith("NOT THE SAME")
    assert verdict.evidence(["a", "b"]).parents == ("a", "b")
    assert verdict.evidence([]).figures["num_tokens"] == 2
