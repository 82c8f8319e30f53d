"""What a change is worth: major for exchangeability, minor for the training, patch for data and seed."""

import pytest

from llmtrain.artifacts import ModelVersion
from llmtrain.registry.semver import next_version, numbers


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"shape_sha256": "other"}, "2.0.0"),
        ({"tokenizer_sha256": "other"}, "2.0.0"),
        ({"tokenizer_sha256": "other", "recipe_sha256": "other"}, "2.0.0"),
        ({"recipe_sha256": "other"}, "1.5.0"),
        ({"trainer": "dpo"}, "1.5.0"),
        ({"trainer": "sft"}, "1.5.0"),
        ({"trainer": "distill"}, "1.5.0"),
        ({"parent_version": "base@1.0.0"}, "1.5.0"),
        ({"dataset_sha256": "other"}, "1.4.10"),
        ({"config_sha256": "other", "weights_sha256": "other"}, "1.4.10"),
        ({}, "1.4.10"),
    ],
)
def test_the_version_after_1_4_9(trained, changed, expected):
    before = ModelVersion(
        parents=(), name="demo", version="1.4.9", model=trained(), registered_at_utc="2026-01-01T00:00:00+00:00"
    )
    assert next_version(before, trained("run2", **changed)) == expected


def test_the_first_version_is_1_0_0(trained):
    assert next_version(None, trained()) == "1.0.0"


def test_versions_sort_by_number_and_not_by_letter():
    assert sorted(["1.10.0", "1.9.0", "1.2.0"], key=numbers) == ["1.2.0", "1.9.0", "1.10.0"]
