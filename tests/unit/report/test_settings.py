"""The config as people read it."""

from llmtrain.config.compose import load_config
from llmtrain.config.schema import exists_in, settings, variants
from llmtrain.report.settings import Line, lines


def by_key(overrides: list[str]) -> dict[str, Line]:
    groups = lines(load_config(overrides))
    return {f"{group}.{line.key}": line for group, found in groups.items() for line in found}


def test_the_default_config_differs_in_nothing():
    for trainer in ("pretrain", "sft", "dpo"):
        assert [line for line in by_key([f"trainer={trainer}"]).values() if line.differs] == []


def test_what_has_no_default_differs():
    differing = {key for key, line in by_key(["trainer=distill", "trainer.teacher=a@1.0.0"]).items() if line.differs}
    assert differing == {"trainer.teacher"}


def test_an_override_shows_beside_the_default():
    found = by_key(["trainer.lr=1e-3", "trainer.budget_tokens=1_000_000", "infra.threads=3"])
    differing = {key: (line.value, line.default) for key, line in found.items() if line.differs}
    assert differing == {
        "trainer.lr": ("0.001", "0.004"),
        "trainer.budget_tokens": ("1,000,000", "600,000"),
        "infra.threads": ("3", "null"),
    }


def test_a_setting_that_the_default_kind_lacks_has_no_default():
    found = by_key(["data=text_files", "data.corpus.paths=[/home/me/notes.txt]", "data.corpus.licence=MIT"])
    assert (found["data.corpus.licence"].value, found["data.corpus.licence"].default) == ("MIT", "—")
    assert (found["data.corpus.kind"].value, found["data.corpus.kind"].default) == ("files", "python_docs")
    assert found["data.corpus.paths"].value == "[…/notes.txt]"


def test_every_setting_is_there_with_its_meaning():
    config = load_config(["trainer=dpo"])
    data = config.model_dump(mode="json")
    there = [setting for setting in settings() if exists_in(setting, data) and not variants(setting.field)]
    found = [line for group in lines(config).values() for line in group]
    assert len(found) == len(there)
    assert [line.key for line in found if not line.meaning] == []
    assert by_key(["trainer=dpo"])["trainer.lr"].meaning == "Peak learning rate, reached after the warm-up."
