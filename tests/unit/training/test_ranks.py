"""Which rank is to blame, what a rank says, and which strategies refuse what, without starting any."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from llmtrain.errors import IntegrityError, Interrupted, RunFailed, TryAgain, UserError
from llmtrain.launch import rank as rank_command
from llmtrain.training.checkpoints import AtomicCheckpoints
from llmtrain.training.ranks import zero
from llmtrain.training.ranks.alone import Alone
from llmtrain.training.ranks.group import join
from llmtrain.training.ranks.torchrun import first_error

RUN = Path("outputs/experiment/0123456789ab")


def failure(tmp_path: Path, rank: int, exitcode: int, said: str | None = None, **more: int) -> ProcessFailure:
    file = tmp_path / f"error-{rank}.json"
    if said is not None:
        file.write_text(json.dumps({"message": said, "timestamp": 1_700_000_000, **more}))
    return ProcessFailure(local_rank=rank, pid=1000 + rank, exitcode=exitcode, error_file=str(file))


def test_a_killed_rank_is_named_although_the_others_end_because_of_it(tmp_path: Path):
    lost = failure(tmp_path, 0, TryAgain.exit_code)
    error = first_error({0: lost, 1: failure(tmp_path, 1, -signal.SIGKILL)}, RUN)
    assert isinstance(error, TryAgain)
    assert str(error).startswith("rank 1 (process 1001) was killed by SIGKILL (out of memory?")
    assert str(error).endswith(f"What {RUN} has saved stays: the same command continues")


def test_where_all_have_lost_a_rank_it_was_on_another_machine(tmp_path: Path):
    error = first_error({rank: failure(tmp_path, rank, TryAgain.exit_code) for rank in (2, 3)}, RUN)
    assert isinstance(error, TryAgain)
    assert str(error).startswith("rank 2 has lost a rank elsewhere")


def test_those_that_the_agent_ended_are_not_to_blame(tmp_path: Path):
    ended = failure(tmp_path, 0, -signal.SIGTERM)
    error = first_error({0: ended, 1: failure(tmp_path, 1, -signal.SIGKILL)}, RUN)
    assert str(error).startswith("rank 1 ")


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UserError), (3, RunFailed), (75, TryAgain), (130, Interrupted), (9, RunFailed)]
)
def test_what_a_rank_said_is_the_message_and_its_exit_code_the_code(tmp_path: Path, code: int, kind: type):
    stopped = failure(tmp_path, 0, -signal.SIGTERM)
    error = first_error({0: stopped, 1: failure(tmp_path, 1, code, said="the disk is full")}, RUN)
    assert type(error) is kind
    assert str(error) == "the disk is full"


def test_a_rank_that_is_ended_after_it_spoke_ends_as_it_said(tmp_path: Path):
    ended = failure(tmp_path, 1, -signal.SIGTERM, said="the run has been stopped", exit_code=75)
    assert type(first_error({1: ended}, RUN)) is TryAgain


@pytest.mark.parametrize("code", [130, -signal.SIGINT])
def test_ctrl_c_before_there_is_anything_to_save_is_an_interruption(tmp_path: Path, code: int):
    error = first_error({0: failure(tmp_path, 0, code), 1: failure(tmp_path, 1, -signal.SIGTERM)}, RUN)
    assert isinstance(error, Interrupted)


def test_a_mistake_of_ours_is_found_among_those_who_lost_their_peer(tmp_path: Path):
    error = first_error({0: failure(tmp_path, 0, TryAgain.exit_code), 1: failure(tmp_path, 1, 1)}, RUN)
    assert type(error) is RunFailed
    assert "rank 1 ended with exit code 1" in str(error)


def ended_as(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    def train_rank(directory: Path) -> None:
        raise error

    import llmtrain.training.run

    monkeypatch.setattr(llmtrain.training.run, "train_rank", train_rank)
    return rank_command.main([str(RUN)])


def test_a_rank_leaves_its_error_to_torchrun_and_prints_it_under_another_launcher(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert ended_as(IntegrityError("a shard is damaged"), monkeypatch) == 3
    found = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=str(tmp_path / "error.json"))
    assert found.message == "a shard is damaged"
    assert found.error_file_data["exit_code"] == 3
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert ended_as(IntegrityError("a shard is damaged"), monkeypatch) == 3
    assert capsys.readouterr().err == "a shard is damaged\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ended_as(IntegrityError("a shard is damaged"), monkeypatch) == 3
    assert capsys.readouterr().err == "rank 0: a shard is damaged\n"


def test_a_rank_whose_peer_has_gone_says_so_and_may_be_tried_again(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    gone = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert ended_as(gone, monkeypatch) == 75
    assert capsys.readouterr().err == "rank 0 has lost another rank and stops\n"
    assert ended_as(RuntimeError("shapes do not match"), monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err


def test_another_number_of_ranks_than_the_run_was_frozen_for_is_refused(pretrain_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    infra = pretrain_config.infra.model_copy(update={"ranks": 2})
    with pytest.raises(UserError, match=r"3 ranks were started, but the run has infra.ranks=2"):
        join(infra)


def test_without_deepspeed_the_message_says_what_to_install(pretrain_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    infra = pretrain_config.infra.model_copy(update={"ranks": 2, "strategy": "deepspeed_zero2"})
    with pytest.raises(UserError, match=r"infra.strategy=deepspeed_zero2 needs DeepSpeed .*pip install 'llmtrain\["):
        zero._deepspeed(infra)


def test_a_checkpoint_of_deepspeed_is_refused_with_the_override_that_reads_it(tmp_path: Path):
    class Saved(Alone):
        def save(self, checkpoint: dict, directory: Path) -> None:
            torch.save({"clock": {}, "zero": {"strategy": "deepspeed_zero3", "ranks": 4}}, directory / "state.pt")

    AtomicCheckpoints(Saved()).save_checkpoint({}, tmp_path / "step-00000001")
    with pytest.raises(UserError, match=r"set infra.strategy=deepspeed_zero3 infra.ranks=4, or start anew"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "step-00000001")
