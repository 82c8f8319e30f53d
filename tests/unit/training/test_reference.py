"""Stored reference log-probabilities are used when they are right, and only then."""

import pytest
import torch

from llmtrain.files import sha256_of
from llmtrain.training import reference
from llmtrain.training.reference import reference_log_probs


@pytest.fixture
def ask(network, pairs, dpo_config, tmp_path):
    def asking(weights_sha256: str = "weights", form: tuple[str, ...] = ()) -> dict:
        return reference_log_probs(
            network,
            {"train": pairs},
            weights_sha256=weights_sha256,
            pairs_sha256="pairs",
            form=list(form),
            infra=dpo_config.infra,
            outputs=tmp_path,
            progress=lambda num_tokens: None,
        )

    return asking


def count_calls(monkeypatch) -> list[int]:
    """The number of pairs of each scoring."""
    calls: list[int] = []
    honest = reference.score_pairs

    def counted(model, pairs, indices, *others):
        calls.append(len(indices))
        return honest(model, pairs, indices, *others)

    monkeypatch.setattr(reference, "score_pairs", counted)
    return calls


def test_the_second_time_only_the_spot_check_is_computed(ask, monkeypatch):
    calls = count_calls(monkeypatch)
    first, second = ask(), ask()
    assert calls == [10, 4]
    assert torch.equal(first["train"].chosen, second["train"].chosen)
    assert torch.equal(first["train"].rejected, second["train"].rejected)


def test_other_weights_and_another_form_have_another_place(ask, monkeypatch):
    calls = count_calls(monkeypatch)
    ask("one")
    ask("other")
    ask("other", form=("kto",))
    assert calls == [10, 10, 10]


@pytest.mark.parametrize("damage", ["values", "one bit", "bytes", "missing"])
def test_a_store_that_is_wrong_is_computed_anew(ask, damage, tmp_path, capsys):
    right = ask()
    (file,) = tmp_path.glob("reference/*/logprobs.safetensors")
    match damage:
        case "values":
            from safetensors.torch import load_file, save_file

            save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
            (file.parent / "sha256").write_text(sha256_of(file))
        case "one bit":  # of the last pair, which the spot check leaves out
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        case "bytes":
            file.write_bytes(file.read_bytes()[:50])
        case "missing":
            file.unlink()
    assert torch.equal(ask()["train"].chosen, right["train"].chosen)
    assert "computing it anew" in capsys.readouterr().err
