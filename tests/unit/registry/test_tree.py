"""The lineage as text."""

from llmtrain.artifacts import ModelVersion
from llmtrain.registry.tree import tree


def test_versions_stand_below_the_one_they_started_from(trained):
    def version(label: str, parent: str | None, **changed) -> ModelVersion:
        name, number = label.split("@")
        return ModelVersion(
            parents=(),
            name=name,
            version=number,
            model=trained(parent_version=parent, **changed),
            registered_at_utc="2026-01-02T03:04:05+00:00",
        )

    dpo = {"trainer": "dpo", "num_tokens_seen": 200_000, "metrics": {"test/accuracy": 0.9123}}
    large = {**dpo, "num_tokens_seen": 36_000_000_000_000}
    versions = [
        version("base@1.0.0", None),
        version("chat@1.0.0", "base@1.0.0", **dpo),
        version("a-long-name-that-somebody-chose@10.12.13", "chat@1.0.0", **large),
        version("kind@1.0.0", "a-long-name-that-somebody-chose@10.12.13", **dpo),
        version("chat@1.1.0", "chat@1.0.0", **dpo),
        version("chat@1.0.1", "base@1.0.0", **dpo),
        version("base@1.0.1", None),
        version("chat@2.0.0", "base@1.0.1", **dpo),
        version("lost@1.0.0", "gone@2.0.0", metrics={}),
    ]
    assert tree(versions).splitlines() == [
        "base@1.0.0                                        pretrain           1,000,000 tokens  2026-01-02  "
        "test/loss_nats 3.25  test/bits_per_byte 1.5",
        "├── chat@1.0.0                                    dpo                  200,000 tokens  2026-01-02  "
        "test/accuracy 0.9123",
        "│   ├── a-long-name-that-somebody-chose@10.12.13  dpo       36,000,000,000,000 tokens  2026-01-02  "
        "test/accuracy 0.9123",
        "│   │   └── kind@1.0.0                            dpo                  200,000 tokens  2026-01-02  "
        "test/accuracy 0.9123",
        "│   └── chat@1.1.0                                dpo                  200,000 tokens  2026-01-02  "
        "test/accuracy 0.9123",
        "└── chat@1.0.1                                    dpo                  200,000 tokens  2026-01-02  "
        "test/accuracy 0.9123",
        "base@1.0.1                                        pretrain           1,000,000 tokens  2026-01-02  "
        "test/loss_nats 3.25  test/bits_per_byte 1.5",
        "└── chat@2.0.0                                    dpo                  200,000 tokens  2026-01-02  "
        "test/accuracy 0.9123",
        "lost@1.0.0                                        pretrain           1,000,000 tokens  2026-01-02  "
        "(from gone@2.0.0, not listed)",
    ]


def test_no_versions_are_no_lines():
    assert tree([]) == ""
