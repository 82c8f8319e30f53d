"""What a controller does with points, on an engine whose runs get on by a row at each look."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.cli import jobs as jobs_command
from llmtrain.config.compose import load_search
from llmtrain.config.infra import Infra
from llmtrain.errors import UserError
from llmtrain.launch import controller, status
from llmtrain.launch.controller import Controller
from llmtrain.launch.search import SearchDirectory, Searched, in_words
from llmtrain.launch.status import statuses
from llmtrain.launch.study import Study
from llmtrain.launch.sweeps import append_line, whole_lines
from tests.unit.launch.stand_ins import LR, ROWS, FileEngine, QuickFreezer, loss, search, written

ASHA = ("sweep=asha", "sweep.rung_tokens=2_000", "sweep.reduction=2", "trainer.evaluate_every_tokens=1_000")
Begin = Callable[..., SearchDirectory]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """A search on the stand-ins."""
    engine = FileEngine(tmp_path / "engine")
    for module in (controller, status):
        monkeypatch.setattr(module, "engine_of", lambda launch: engine)
    monkeypatch.setattr(controller, "Freezer", QuickFreezer)
    return lambda *overrides: search(tmp_path / "outputs", *overrides)


def lr(overrides: tuple[str, ...]) -> float:
    return float(overrides[0].partition("=")[2])


def test_the_figure_of_a_point_is_the_mean_over_its_seeds(begin: Begin):
    place = begin("sweep=tpe", "sweep.trials=3", "sweep.seeds=[1,2,6]")
    assert Controller(place, poll_s=0).run() == "over: every point has been tried"
    points = place.place.begun()
    assert [point.verdict for point in points.values()] == ["done"] * 3
    for point in points.values():
        assert len(set(point.runs)) == 3
        assert point.value == pytest.approx(loss(lr(point.overrides), ROWS) + 0.03)
    found = statuses(place.place)
    assert [one.point.overrides[-1] for one in found[:3]] == ["trainer.seed=1", "trainer.seed=2", "trainer.seed=6"]
    assert {one.state for one in found} == {"finished"}


def test_proposals_learn(begin: Begin):
    place = begin("sweep=tpe", "sweep.trials=24", "sweep.startup=8", "sweep.concurrent=1")
    Controller(place, poll_s=0).run()
    values = [point.value for point in place.place.begun().values() if point.value is not None]
    assert sum(values[-8:]) < sum(values[:8])


def test_points_that_fall_behind_are_stopped_at_a_rung(begin: Begin):
    place = begin(*ASHA, "sweep.trials=8", "sweep.concurrent=4")
    Controller(place, poll_s=0).run()
    points = place.place.begun().values()
    done, pruned = ([point for point in points if point.verdict == verdict] for verdict in ("done", "pruned"))
    assert done
    assert len(pruned) >= 3
    assert min(loss(lr(point.overrides), ROWS) for point in points) == min(point.value for point in done)
    states = {one.point.run: one for one in statuses(place.place)}
    for point in pruned:
        (run,) = point.runs
        assert states[run].state == "pruned"
        assert point.reason in ("fell behind at 2,000 tokens", "fell behind at 4,000 tokens")
        assert states[run].tokens <= 5000, "a row after the one that it was judged by"
    assert f"{len(done)} done, {len(pruned)} pruned" in in_words(place)


def test_a_search_that_is_killed_before_it_could_stop_a_hopeless_point_stops_it_later(begin: Begin):
    place = begin(*ASHA, "sweep.trials=3", "sweep.concurrent=3")
    first = Controller(place, poll_s=0)
    first._adopt()
    for _ in range(3):
        first._propose()
    verdicts = {}
    for number, value in ((0, 1.0), (1, 3.0), (2, 2.0)):
        verdicts[number] = first.study.report(number, 2000, value)
    assert verdicts == {0: False, 1: True, 2: True}
    second = Controller(place, poll_s=0)  # the first is killed here: it has judged, and told nobody
    assert [second.study.judged_again(number) for number in range(3)] == [False, True, True]
    second.run()
    assert [point.verdict for point in place.place.begun().values()] == ["done", "pruned", "pruned"]


def test_a_budget_stops_the_search_and_a_larger_one_goes_on(begin: Begin, capsys: pytest.CaptureFixture[str]):
    price = "infra.hardware.price_per_hour=10"
    place = begin("sweep=tpe", "sweep.trials=4", "sweep.concurrent=2", "sweep.budget_device_hours=0.1", price)
    ended = Controller(place, poll_s=0).run()
    assert ended.startswith("over: the budget is used up (0.1 of 0.1 device-hours, 1.00 US dollars)")
    found = statuses(place.place)
    assert [one.state for one in found] == ["stopped", "stopped"]
    outputs = place.place.outputs
    assert jobs_command.main([place.path.name, "--outputs", str(outputs)]) == 0
    assert ended in capsys.readouterr().out

    larger = begin("sweep=tpe", "sweep.trials=4", "sweep.concurrent=2", "sweep.budget_usd=10", price)
    assert larger.path == place.path, "limits do not make another search"
    for one in found:
        Path(one.handle).with_suffix(".cancelled").rename(Path(one.handle).with_suffix(".was"))
    assert Controller(larger, poll_s=0).run() == "over: every point has been tried"
    assert [point.verdict for point in place.place.begun().values()] == ["done"] * 4


def test_a_person_stops_a_search_and_resumes_it(begin: Begin, monkeypatch: pytest.MonkeyPatch):
    place = begin("sweep=tpe", "sweep.trials=3", "sweep.concurrent=1")
    one = Controller(place, poll_s=0)
    looks = []

    def look() -> None:
        looks.append(True)
        if len(looks) == 3:
            assert jobs_command.main(["cancel", place.path.name, "--outputs", str(place.place.outputs)]) == 0

    monkeypatch.setattr(one, "_look", look)
    assert one.run().startswith("stopped by a person")
    assert [one.state for one in statuses(place.place)] == ["stopped"]
    place.stop.unlink()
    assert Controller(place, poll_s=0).run() == "over: every point has been tried"
    assert len(place.place.begun()) == 3


def test_what_diverges_fails_its_point_and_is_not_proposed_again(begin: Begin):
    place = begin("sweep=tpe", "sweep.trials=2", "sweep.seeds=[666]")
    Controller(place, poll_s=0).run()
    points = place.place.begun().values()
    assert [(point.verdict, point.reason.partition(": ")[2]) for point in points] == [("failed", "exit code 3")] * 2


def test_a_search_ends_where_there_are_no_more_points(tmp_path: Path, begin: Begin):
    found = load_search([f"outputs_dir={tmp_path}", "sweep=tpe", "trainer.lr=1e-3,2e-3,4e-3", "experiment=smoke"])
    assert found is not None
    place = written(tmp_path, found[0], Searched(space=found[0], config=found[1][0][1], config_dirs=(), force=False,
                                                 config_name="train", directory=str(tmp_path)))  # fmt: skip
    assert Controller(place, poll_s=0).run() == "over: there are only 3 points"
    assert sorted(point.overrides for point in place.place.begun().values()) == [
        ("trainer.lr=0.001",),
        ("trainer.lr=0.002",),
        ("trainer.lr=0.004",),
    ]


def test_a_torn_last_line_of_the_journal_is_cut_away(begin: Begin):
    place = begin("sweep=tpe", "sweep.trials=2", "sweep.concurrent=1")
    one = Controller(place, poll_s=0)
    one._adopt()
    one._propose()
    with place.study.open("ab") as file:
        file.write(b'{"op_code": 4, "half')
    assert Controller(place, poll_s=0).run() == "over: every point has been tried"
    assert len(place.place.begun()) == 2


def test_another_seed_proposes_other_points_and_is_another_search(begin: Begin):
    places = [begin("sweep=tpe", LR, f"sweep.seed={seed}") for seed in (0, 1)]
    assert places[0].path != places[1].path
    proposals = []
    for place in places:
        study = Study(place.study, place.read().space, place.read().sweep)
        number = study.ask()
        assert number == 0
        proposals.append(study.overrides(number))
    assert proposals[0] != proposals[1]


def test_a_machine_is_paid_as_a_whole_and_published_devices_each(begin: Begin):
    from llmtrain.launch.search import usd

    config = begin("sweep=tpe", "infra.hardware.price_per_hour=10").read().config
    two: Infra = config.infra.model_copy(update={"ranks": 2})
    assert usd(config.model_copy(update={"infra": two}), 3.0) == 15.0


def test_a_line_that_a_crash_cut_short_counts_as_none_and_spoils_none(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append_line(path, '{"a": 1}')
    with path.open("a") as file:
        file.write('{"a": 2')
    assert whole_lines(path) == [{"a": 1}]
    append_line(path, '{"a": 3}')
    assert whole_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_point_whose_config_cannot_be_fails_and_says_why(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Refusing(QuickFreezer):
        def __call__(self, overrides: list[str]) -> Path:
            if float(overrides[-1].partition("=")[2]) > 1e-3:
                raise UserError("too fast")
            return super().__call__(overrides)

    monkeypatch.setattr(controller, "Freezer", Refusing)
    place = begin("sweep=tpe", "sweep.trials=4", "sweep.concurrent=1")
    assert Controller(place, poll_s=0).run() == "over: every point has been tried"
    points = place.place.begun().values()
    assert {point.verdict for point in points} == {"done", "failed"}
    assert all((lr(point.overrides) > 1e-3) == (point.verdict == "failed") for point in points)
    assert Controller(place, poll_s=0).run() == "over: every point has been tried"
    assert jobs_command.main([place.path.name, "--outputs", str(place.place.outputs)]) == 0
    assert ": failed: too fast" in capsys.readouterr().out
