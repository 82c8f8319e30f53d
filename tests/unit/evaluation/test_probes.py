"""The probes are pinned, spread over their kinds, and read as the trained model reads them."""

from collections import Counter
from pathlib import Path

import pytest
from parity_models import CONTEXT

from llmtrain.data.tokenizer import encode_texts, load_tokenizer, special_token_in
from llmtrain.errors import UserError
from llmtrain.evaluation.parity import Reference
from llmtrain.evaluation.probes import NUMBER_OF, SHARES, probes, probes_sha256, rows

PINNED = "55d210e4a793f224c4bef4795f6d6ebec20c2d1747cf4b2dd1b40f2a7e404659"
OF_32 = {"chat": 10, "code": 8, "unicode": 7, "tools": 5, "long": 2}


def test_256_are_pinned() -> None:
    """Evidence of other probes cannot be compared: who edits them changes this hash, knowingly."""
    assert probes_sha256() == PINNED
    assert len(probes()) == 256
    assert len({str(vars(probe)) for probe in probes() if probe.kind != "long"}) == 240, "no two are equal"


def test_the_first_ones_hold_every_kind() -> None:
    assert Counter(probe.kind for probe in probes()) == NUMBER_OF
    assert Counter(probe.kind for probe in probes(32)) == OF_32
    assert probes(32) == probes()[:32]
    with pytest.raises(UserError, match="1 to 256"):
        probes(257)


def test_chats_are_read_as_transformers_reads_them(reference: Reference) -> None:
    tokenizer = reference.tokenizer
    chats = [row for row in rows(tokenizer, CONTEXT).rows if row.probe.messages and not row.probe.tools]
    assert len(chats) == 80 + 28
    for row in chats:
        expected = tokenizer.apply_chat_template(
            list(row.probe.messages), add_generation_prompt=row.probe.messages[-1]["role"] == "user"
        )["input_ids"]
        assert list(row.ids) == expected


def test_calls_are_read_with_their_arguments(reference: Reference) -> None:
    tokenizer = reference.tokenizer
    (row,) = [row for row in rows(tokenizer, CONTEXT).rows if row.probe.name == "tools-01"]
    call = '{"name": "search_library", "arguments": {"query": "lighthouse <keepers> & history", "limit": 3}}'
    assert call in tokenizer.decode(row.ids)


def test_long_texts_fill_their_share_of_the_context(reference: Reference) -> None:
    context = 2000
    found = [row for row in rows(reference.tokenizer, context).rows if row.probe.kind == "long"]
    for row, share in zip(found, SHARES * 2, strict=True):
        assert 0.7 * share * context < len(row.ids) < share * context
    assert sum(SHARES) == 1 + 1 / 2 + 2 / 4 + 4 / 8


def test_what_the_context_has_no_room_for_is_not_scored(reference: Reference) -> None:
    found = rows(reference.tokenizer, 64).rows
    assert max(len(row.ids) for row in found) > 64
    assert max(len(row.scored) for row in found) == 63, "an engine writes one token more"
    assert all(row.scored == row.ids[:63] for row in found)


def test_what_a_template_does_not_show_is_left_out_and_counted(trained: Path) -> None:
    tokenizer = load_tokenizer(trained / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}"
    )
    found = rows(tokenizer, CONTEXT)
    assert found.skipped == {
        "the chat template does not show tools": 40,
        "the chat template refuses it: no system": 40,
    }
    tokenizer.chat_template = None
    found = rows(tokenizer, CONTEXT)
    assert found.skipped == {"the tokenizer has no chat template": 80 + 40 + 28}
    assert len(found.rows) == 256 - 148


def test_no_text_spells_a_special_token(reference: Reference) -> None:
    """An engine would read one in a text, and training does not."""
    for row in reference.rows.rows:
        if row.text is not None:
            assert special_token_in(reference.tokenizer, row.text) is None
            assert list(row.ids) == encode_texts(reference.tokenizer, [row.text])[0]
