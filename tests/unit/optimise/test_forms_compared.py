"""Figures of a form beside PyTorch's, their intervals, and the verdict."""

import math
from dataclasses import replace

import numpy as np
import pytest

from llmtrain.optimise.compare import (
    BF16,
    FORM,
    FP32,
    Party,
    agreement,
    figures,
    objections,
    over_documents,
    perplexity,
    perplexity_increase,
    table,
)
from llmtrain.optimise.measure import Seen
from tests.unit.optimise.conftest import settings

TORCH = Seen(
    losses=[1.0, 2.0, 3.0, 2.0],
    likeliest=[[1, 2, 3, 4]] * 4,
    load_seconds=1.0,
    first_token_seconds=0.2,
    prefill={"1": 100.0, "2": 150.0},
    decode={"1": 10.0, "2": 18.0},
    peak_bytes=1000,
)
CONFIG = settings("onnx_int8")  # 2 % more perplexity, 90 % agreement


def compared(form: Seen, num_bytes: int = 50, bf16: Seen | None = None) -> dict[str, float]:
    parties = {FP32: Party((TORCH,), 200), FORM: Party((form,), num_bytes)}
    return figures(parties | ({BF16: Party((bf16,), 200)} if bf16 else {}), [1, 2])


def test_perplexity_is_e_to_the_mean_loss():
    assert perplexity(TORCH).value == pytest.approx(math.exp(2))


def test_the_increase_is_of_the_perplexities_ratio_and_has_no_spread_where_each_document_loses_as_much():
    form = replace(TORCH, losses=[loss + math.log(1.05) for loss in TORCH.losses])
    found = perplexity_increase(form, TORCH)
    assert (found.value, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))


def test_agreement_counts_positions():
    form = replace(TORCH, likeliest=[[1, 2, 3, 4]] * 3 + [[1, 2, 9, 9]])
    assert agreement(form, TORCH).value == 14 / 16


def test_the_interval_of_a_mean_is_the_bootstrap_s():
    """Of 400 normal numbers: mean +- 1.96 / 20, as far as 2000 draws tell."""
    numbers = np.random.default_rng(1).normal(size=400)
    found = over_documents(400, lambda chosen: float(numbers[chosen].mean()))
    error = numbers.std() / 20
    assert found.value == pytest.approx(numbers.mean())
    assert (found.low - found.value) / error == pytest.approx(-1.96, abs=0.15)
    assert (found.high - found.value) / error == pytest.approx(1.96, abs=0.15)


def test_speeds_are_medians_over_rounds_and_memory_is_the_most():
    rounds = tuple(replace(TORCH, decode={"1": speed}, peak_bytes=int(speed)) for speed in (5.0, 50.0, 7.0))
    party = Party(rounds, 1)
    assert party.speed("decode", 1) == 7.0
    assert party.peak_bytes == 50


def test_the_form_s_figures_have_plain_names_and_pytorch_s_a_prefix():
    found = compared(replace(TORCH, decode={"1": 40.0, "2": 50.0}), bf16=TORCH)
    assert found["decode_tokens_per_second_batch_2"] == 50.0
    assert found["torch_fp32/decode_tokens_per_second_batch_2"] == 18.0
    assert found["weights_bytes"] == 50
    assert found["torch_bf16/top1_agreement"] == 1.0
    assert "torch_fp32/perplexity_increase" not in found


def test_a_form_that_is_slower_but_smaller_is_worth_having():
    assert objections(compared(replace(TORCH, decode={"1": 5.0, "2": 5.0}), num_bytes=199), CONFIG) == []


def test_a_form_that_is_larger_but_faster_is_worth_having():
    assert objections(compared(replace(TORCH, decode={"1": 10.1, "2": 5.0}), num_bytes=300), CONFIG) == []


def test_a_form_that_is_neither_faster_than_the_better_precision_nor_smaller_is_not():
    bf16 = replace(TORCH, decode={"1": 30.0, "2": 30.0})
    (reason,) = objections(compared(replace(TORCH, decode={"1": 20.0, "2": 99.0}), num_bytes=200, bf16=bf16), CONFIG)
    assert "neither faster than PyTorch (20 tokens/s against 30" in reason


def test_a_form_that_loses_too_much_is_not():
    form = replace(TORCH, losses=[loss + 0.03 for loss in TORCH.losses])
    (reason,) = objections(compared(form), CONFIG)
    assert "3.05% higher" in reason
    assert "optimise.most_perplexity_increase allows 2.00%" in reason


def test_a_form_that_finds_other_tokens_is_not():
    (reason,) = objections(compared(replace(TORCH, likeliest=[[1, 2, 3, 9]] * 4)), CONFIG)
    assert "75.0% of positions" in reason


def test_the_table_has_a_column_for_each_and_a_row_for_each_figure():
    lines = table(compared(TORCH, bf16=TORCH), CONFIG, "onnx_int8").splitlines()
    assert lines[0].split("  ")[-1] == "onnx_int8"
    assert len(lines) == 1 + 3 + 2 * 2 + 3
    assert lines[1].count("7.39 (") == 3
