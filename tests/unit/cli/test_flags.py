"""Flags are told apart from overrides."""

import pytest

from llmtrain.cli import UsageError
from llmtrain.cli.flags import parse
from llmtrain.cli.train import FLAGS


@pytest.mark.parametrize(
    ("line", "flags", "overrides"),
    [
        ("model=a -m trainer.lr=1", {"--multirun": "--multirun"}, ["model=a", "trainer.lr=1"]),
        ("--cfg job model=a", {"--cfg": "job"}, ["model=a"]),
        ("--cfg=job", {"--cfg": "job"}, []),
        ("-c hydra -p trainer", {"--cfg": "hydra", "--package": "trainer"}, []),
        ("-cd own ~experiment", {"--config-dir": "own"}, ["~experiment"]),
        ("--info model=a", {"--info": "all"}, ["model=a"]),
        ("--info defaults model=a", {"--info": "defaults"}, ["model=a"]),
        ("--info", {"--info": "all"}, []),
        ("", {}, []),
    ],
)
def test_line_splits_into_flags_and_overrides(line: str, flags: dict[str, str], overrides: list[str]):
    assert parse(line.split(), FLAGS) == (flags, overrides)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--agian", "--agian: no such flag; did you mean '--again'?; --help lists them"),
        ("--multi-run", "--multi-run: no such flag; did you mean '--multirun'?; --help lists them"),
        ("-x", "-x: no such flag"),
        ("--cfg", "--cfg needs a value; write '--cfg job|hydra|all'"),
        ("--cfg jobs", "--cfg: got 'jobs', wants one of job, hydra, all; did you mean 'job'?"),
        ("--config-dir --again", "--config-dir needs a value; write '--config-dir DIR'"),
        ("--config-dir a -cd b", "--config-dir: given twice"),
        ("--again=yes", "--again takes no value; write '--again'"),
    ],
)
def test_wrong_flag_is_refused(line: str, message: str):
    with pytest.raises(UsageError) as error:
        parse(line.split(), FLAGS)
    assert str(error.value).startswith(message)
