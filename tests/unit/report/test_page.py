"""What stands on the page, at every stage of a run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmtrain.errors import IntegrityError
from llmtrain.report.page import MOST_SAMPLES, page
from llmtrain.report.records import Sample, Samples
from tests.paper_run import HOSTILE, PaperRuns


class Words(HTMLParser):
    """The text of each section, and every attribute that could fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: dict[str, str] = {"": ""}
        self.tags: list[str] = []
        self.links: list[str] = []
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag == "section":
            self._section = values["id"]
            self.sections[self._section] = ""
        self.links += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        assert not any(name.startswith("on") for name in values)

    def handle_data(self, data):
        self.sections[self._section] += data + " "


def words(directory: Path, outputs: Path) -> Words:
    return Words(page(directory, outputs))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_a_finished_pretraining_shows_every_part(runs: PaperRuns):
    found = words(runs.pretrain, runs.outputs)
    assert list(found.sections) == ["", "figures", "curves", "samples", "config", "data", "lineage", "machine"]
    assert "5.000 nats per token on held-out text, 1.000 below a unigram model (6.000)." in squeezed(found.sections[""])
    assert "qwen3_tiny-pretrain@1.0.0" in found.sections[""]
    figures = squeezed(found.sections["figures"])
    assert "Held-out loss, bits per byte against a unigram model 2.000 2.500 -0.500" in figures
    assert "trained from scratch" in found.sections["lineage"]
    machine = squeezed(found.sections["machine"])
    assert "training 16.0 s" in machine, "both processes together"
    assert "625 tokens/s while training" in machine, "10,000 tokens in 16 s"
    assert "2 processes worked on it" in machine


def test_a_preference_run_shows_its_margins_and_links_to_its_parent(runs: PaperRuns):
    (runs.pretrain / "report.html").write_text(page(runs.pretrain, runs.outputs))
    found = words(runs.dpo, runs.outputs)
    verdict = squeezed(found.sections[""])
    assert "Prefers the chosen answer in 62.5% ± 3.0% of held-out pairs, above the longer answer (55.0%)." in verdict
    assert "The held-out language loss rose by 5.0%." in verdict
    preferences = squeezed(found.sections["preferences"])
    assert "4 pairs of the test split. Reward margin: mean 0.425, median 0.600." in preferences
    assert "in 37.5 % of pairs before tuning and in 75.0 % after it" in preferences, "an equal pair counts half"
    link = f"../../qwen3_tiny-pretrain/{runs.pretrain.name}/report.html"
    assert link in found.links
    assert (runs.dpo / link).samefile(runs.pretrain / "report.html")


def test_what_a_margin_can_hide_stands_beside_it(runs: PaperRuns):
    preferences = squeezed(words(runs.dpo, runs.outputs).sections["preferences"])
    assert "Chosen answers, nats a token -0.050" in preferences
    assert "Accuracy where the longer answer is chosen, share of pairs 0.750" in preferences
    assert "Correlation of margin and length, −1 to 1 0.125" in preferences
    assert "Distance from the reference, nats a token 0.020" in preferences


def test_a_loss_with_margins_of_its_own_shows_those_against_the_base_models(runs: PaperRuns):
    found = words(runs.simpo, runs.outputs)
    assert "Reward margin: mean 0.938, median 1.000." in squeezed(found.sections["preferences"])
    assert "Reward margin: 0 for every pair before tuning" not in found.sections["preferences"]
    assert "Reward margin, nats against the base model 0.250 0.125 +0.125" in squeezed(found.sections["figures"])
    assert "policy = reference 0.9" in squeezed(found.sections["curves"])


def test_votes_are_held_against_the_commoner_one_and_have_no_histogram(runs: PaperRuns):
    found = words(runs.kto, runs.outputs)
    assert "preferences" not in found.sections
    verdict = squeezed(found.sections[""])
    assert "Judges as people did 70.0% ± 2.0% of held-out votes, above the commoner vote (60.0%)." in verdict
    assert "Desirable answers, nats an answer" in squeezed(found.sections["figures"])


def test_of_votes_a_kind_may_be_missing(runs: PaperRuns):
    (runs.kto / "version.json").unlink()
    rows = [json.loads(line) for line in (runs.kto / "metrics.jsonl").read_text().splitlines()]
    del rows[-1]["validation/margin"], rows[-1]["validation/chosen_logp_change"]
    (runs.kto / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = words(runs.kto, runs.outputs).sections["figures"]
    assert "Preference accuracy" in figures
    assert "Reward margin" not in figures


def test_fine_tuning_is_held_against_the_model_before_it(runs: PaperRuns):
    found = words(runs.sft, runs.outputs)
    verdict = squeezed(found.sections[""])
    assert "1.500 nats per token on held-out answers, 1.500 below the base model (3.000)." in verdict
    assert "The held-out language loss rose by 5.0%." in verdict
    assert "Held-out loss, bits per byte against the base model 1.800 1.700 +0.100" in squeezed(
        found.sections["figures"]
    )
    assert "the base model 3" in squeezed(found.sections["curves"])
    assert "Chats" in found.sections["data"]
    assert "docstring_chats" in found.sections["lineage"]


def test_a_student_stands_between_a_unigram_model_and_its_teacher(runs: PaperRuns):
    (runs.pretrain / "report.html").write_text(page(runs.pretrain, runs.outputs))
    found = words(runs.distill, runs.outputs)
    verdict = squeezed(found.sections[""])
    assert "4.500 nats per token on held-out text, 1.500 below a unigram model (6.000) and 0.250 above the teacher" in (
        verdict
    )
    assert "The divergence from the teacher is 0.250 nats per token; a unigram model's is 1.250." in verdict
    assert "a unigram model 6 the teacher 4.25" in squeezed(found.sections["curves"])
    assert "teacher qwen3_tiny-pretrain pretrain, 10k tokens" in squeezed(found.sections["lineage"])
    assert f"../../qwen3_tiny-pretrain/{runs.pretrain.name}/report.html" in found.links


def test_a_run_on_its_way_has_a_verdict_whatever_its_trainer(runs: PaperRuns):
    for run in runs.all:
        (run / "version.json").unlink()
        assert "So far, and on the validation split." in words(run, runs.outputs).sections[""]


def test_a_parent_without_a_report_is_named_and_not_linked(runs: PaperRuns):
    found = words(runs.dpo, runs.outputs)
    assert "qwen3_tiny-pretrain@1.0.0" in found.sections["lineage"]
    assert all(link.startswith("#") for link in found.links)


def test_what_data_says_is_text_and_nothing_else(runs: PaperRuns):
    html = page(runs.dpo, runs.outputs)
    found = Words(html)
    assert found.sections["samples"].count(HOSTILE) == 2 + 2 * 2, "two prompts, each continued twice"
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert "a <CPU>" in found.sections["machine"]
    assert "a <b> source" in found.sections["data"]


def test_nothing_is_fetched_from_anywhere(runs: PaperRuns):
    html = page(runs.pretrain, runs.outputs)
    assert all(link.startswith("#") for link in Words(html).links)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|\bimport\b", html)
    assert "default-src 'none'" in html


def test_a_run_that_has_just_begun_has_a_page(runs: PaperRuns):
    for path in runs.pretrain.iterdir():
        if path.name != "config.json" and path.is_file():
            path.unlink()
    for path in (runs.pretrain / "samples").iterdir():
        path.unlink()
    found = words(runs.pretrain, runs.outputs)
    assert list(found.sections) == ["", "config", "data", "lineage", "machine"]
    assert "Just begun" in found.sections[""]
    assert "not finished: step 0" in found.sections[""]


def test_a_run_on_its_way_shows_the_validation_split(runs: PaperRuns):
    (runs.pretrain / "version.json").unlink()
    found = words(runs.pretrain, runs.outputs)
    assert "not finished: step 20, 10,000 tokens" in found.sections[""]
    assert "5.250 nats per token on held-out text, 0.750 below" in squeezed(found.sections[""])
    assert "So far, and on the validation split." in found.sections[""]
    assert "validation split" in found.sections["figures"]


def test_of_many_samples_some_are_shown_the_first_and_the_last_among_them(runs: PaperRuns):
    for step in range(21, 121):
        sample = Sample(prompt="same", continuation=f"after {step}")
        Samples(step=step, tokens=500 * step, samples=(sample,)).write(runs.dpo / "samples" / f"step-{step:08d}.json")
    samples = squeezed(words(runs.dpo, runs.outputs).sections["samples"])
    assert "0 step 0" in samples
    assert "60,000 after 120" in samples
    assert samples.count("after ") == MOST_SAMPLES - 1 + 1, "and one in the heading"


def test_a_damaged_file_is_named(runs: PaperRuns):
    (runs.dpo / "margins.json").write_text('{"split": "test"')
    with pytest.raises(IntegrityError, match=r"margins.json does not hold Margins"):
        page(runs.dpo, runs.outputs)


def test_neither_directories_nor_passwords_are_shown(runs: PaperRuns, tmp_path: Path):
    for run in runs.all:
        html = page(run, runs.outputs)
        assert str(tmp_path) not in html
        assert "secret" not in html
    assert "http://mlflow.example:5000/" in page(runs.dpo, runs.outputs)
