"""Every key of every schema is read by the code that trains: recorded while tiny runs train, not grepped."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmtrain.cli.train import base_of, main
from llmtrain.config.adapter import QLoRAAdapter
from llmtrain.config.base import Settings
from llmtrain.config.compose import load_config
from llmtrain.config.data import ChatData, PreferenceData, TextData
from llmtrain.config.environment import Environment
from llmtrain.config.hardware import MeasuredHardware, PublishedHardware
from llmtrain.config.infra import Infra
from llmtrain.config.launch import AKSLaunch, LocalLaunch, RayLaunch, SlurmLaunch
from llmtrain.config.model import Qwen3Model, SmolLM2Model
from llmtrain.config.root import TrainConfig
from llmtrain.config.schema import variants
from llmtrain.config.sweep import ASHASweep, GridSweep, TPESweep
from llmtrain.config.trainer import PretrainTrainer
from llmtrain.models import build
from llmtrain.training import device, optim
from tests.conf.conftest import ANEW, Read, Runs, lines, recorded_reads

READ_BY_THE_CONFIG_ITSELF = {
    (TrainConfig, "schema_version"),  # validation refuses another one, so that nobody else has to look
}
HANDED_ON = {
    (data, name): (TextData, name) for data in (PreferenceData, ChatData) for name in ("corpus", "shard_tokens")
}
"""`text()` copies them; a tuning run reads the copy."""
NOT_HERE: dict[type[Settings], tuple[str, ...]] = {
    QLoRAAdapter: tuple(QLoRAAdapter.model_fields),  # needs CUDA; peft gets them as it gets LoRA's
    SmolLM2Model: ("name",),  # 135 M parameters: minutes a run
    Infra: ("hardware", "strategy", "offload"),  # plans, and runs of several ranks: tests/unit/plan, tests/e2e
    **{launch: tuple(launch.model_fields) for launch in (LocalLaunch, SlurmLaunch, RayLaunch, AKSLaunch)},  # launching
    **{sweep: tuple(sweep.model_fields) for sweep in (GridSweep, TPESweep, ASHASweep)},  # tests/unit/launch
    TrainConfig: ("environment",),  # submitting
    Environment: tuple(Environment.model_fields),  # submitting: tests/unit/launch/test_policies.py
    MeasuredHardware: tuple(MeasuredHardware.model_fields),  # plans
    PublishedHardware: tuple(PublishedHardware.model_fields),  # plans
}
"""What is too large, or of another command, for the runs of these tests."""


def schemas(group: type[Settings] = TrainConfig) -> Iterator[type[Settings]]:
    yield group
    for field in group.model_fields.values():
        for inner in variants(field).values():
            yield from schemas(inner)


def unread(reads: set[Read]) -> list[str]:
    """The keys that are not in `reads`, all but `kind`: pydantic reads it, code matches on the class."""
    keys = {(group, name) for group in schemas() for name in group.model_fields if name != "kind"}
    keys -= {(group, name) for group, names in NOT_HERE.items() for name in names}
    return sorted(f"{group.__name__}.{name}" for group, name in keys - reads - READ_BY_THE_CONFIG_ITSELF)


def test_every_key_is_read(runs: Runs):
    handed_on = {key for key, copy in HANDED_ON.items() if copy in runs.reads["chat"]}
    assert unread(set.union(handed_on, *runs.reads.values())) == []


def test_text_of_preference_data_hands_on_every_key():
    data = load_config(["trainer=dpo", "data.split_seed=7", "data.shard_tokens=5", "data.max_refused_share=0.5"]).data
    assert isinstance(data, PreferenceData)
    values = data.model_dump()
    assert data.text().model_dump() == {key: values[key] for key in TextData.model_fields} | {"kind": "text"}


def test_no_exception_is_older_than_the_schemas(runs: Runs):
    keys = {(group, name) for group in schemas() for name in group.model_fields}
    assert keys >= READ_BY_THE_CONFIG_ITSELF | HANDED_ON.keys()
    assert keys >= {(group, name) for group, names in NOT_HERE.items() for name in names}
    assert set.union(*runs.reads.values()).isdisjoint(READ_BY_THE_CONFIG_ITSELF | HANDED_ON.keys())


def without(function: Callable[..., Any], read: str, constant: str) -> Callable[..., Any]:
    """`function` with `constant` in the place of a setting that it reads."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(read) == 1
    file = inspect.getsourcefile(function)
    names: dict[str, Any] = {}
    exec(compile(source.replace(read, constant), str(file), "exec"), function.__globals__, names)  # noqa: S102
    changed: Callable[..., Any] = names[function.__name__]
    return changed


def test_a_read_that_is_deleted_is_missed(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optim, "_adam_settings", without(optim._adam_settings, "trainer.adam_eps", "1e-8"))
    monkeypatch.setattr(device, "apply", without(device.apply, "infra.threads", "1"))
    monkeypatch.setattr(build, "hf_config", without(build.hf_config, "model.head_dim", "16"))
    deleted = {(PretrainTrainer, "adam_eps"), (Infra, "threads"), (Qwen3Model, "head_dim")}
    monkeypatch.chdir(runs.directory)
    (base,) = runs.directory.glob("outputs/base/*/")
    with recorded_reads() as reads:
        assert main(["name=blind", *lines(base), *ANEW]) == 0
    assert runs.reads["lines"] - reads == deleted
    assert set(unread(reads)) >= {"PretrainTrainer.adam_eps", "Infra.threads", "Qwen3Model.head_dim"}


def test_a_loop_over_keys_is_no_reading():
    """Or whoever copies or prints the whole config would count as reading all of it."""
    config = load_config(["trainer=dpo", "model=qwen3_tiny"])
    with recorded_reads() as reads:
        assert base_of(config, [], "train")().tracking == config.tracking  # copied by getattr in a loop
    assert (Qwen3Model, "name") in reads
    assert (TrainConfig, "tracking") not in reads
