"""Submitting, watching and cancelling, against a stand-in for the API server that answers as the real one does."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from aks_runs import run
from jobset_controller import control
from kube_api import Api, Refused, serving
from kubelet import JOB

from llmtrain.cli.jobs import main as jobs
from llmtrain.errors import TryAgain, UserError
from llmtrain.launch import aks
from llmtrain.launch.aks import AKSEngine, cluster
from llmtrain.launch.aks.job_sets import job_of
from llmtrain.launch.aks.manifests import job_name
from llmtrain.launch.engine import Run, State, engine_of
from llmtrain.launch.submit import relative
from llmtrain.launch.sweeps import Point, SweepDirectory, sweep_of

SWEEP = Path("outputs/sweeps/0a1b2c3d")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    quick = cluster.Backoff(steps=4, duration=0.01, factor=2.0)
    monkeypatch.setattr(cluster, "BACKOFF", quick)
    monkeypatch.setattr(cluster, "POLL_S", 0.02)
    aks._namespace.cache_clear()
    with serving(tmp_path) as (api, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        yield api


def engine(*overrides: str) -> AKSEngine:
    return AKSEngine(run(*overrides).infra.launch)


def submit(*runs: Run) -> list[str]:
    return [handle for _, handle in AKSEngine(runs[0].infra.launch).submit(SWEEP, runs)]


def pod_of(api: Api, name: str, **status: object) -> str:
    labels = api.get("jobs", name)["spec"]["template"]["metadata"]["labels"] | {JOB: name}
    api.put("pods", {"metadata": {"name": f"{name}-x", "labels": labels}, "spec": {"nodeName": "n1"}, "status": status})
    return f"{name}-x"


def condition(kind: str, reason: str = "", message: str = "") -> list[dict]:
    return [{"type": kind, "status": "True", "reason": reason, "message": message}]


# ---- submitting


def test_a_run_that_is_submitted_twice_has_one_job(api: Api):
    assert submit(run()) == submit(run()) == [job_name(run())]
    assert len(api.all("jobs")) == 1
    assert api.get("jobs", job_name(run()))["metadata"]["resourceVersion"] == "103", "the first is not disturbed"


def test_two_processes_that_submit_at_once_make_one_job(api: Api):
    runs = [run(f"trainer.seed={seed}") for seed in range(3)]
    threads = [threading.Thread(target=submit, args=runs) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item["metadata"]["name"] for item in api.all("jobs")] == sorted(map(job_name, runs))


def test_a_job_that_was_made_though_its_answer_was_lost_is_found(api: Api):
    api.lost_answers = ["POST jobs"]
    [name] = submit(run())
    assert api.asked.count("POST jobs") == 2
    assert [item["metadata"]["name"] for item in api.all("jobs")] == [name]


def test_a_run_that_failed_makes_room_for_its_next_try(api: Api):
    [name] = submit(run())
    first = api.get("jobs", name)["metadata"]["uid"]
    api.update("jobs", name, conditions=condition("Failed", "BackoffLimitExceeded"))
    assert submit(run()) == [name]
    assert api.get("jobs", name)["metadata"]["uid"] != first
    assert engine().jobs([name])[name].state == State.WAITING


def test_a_job_whose_pods_still_end_is_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch):
    [name] = submit(run())
    pod = pod_of(api, name, phase="Running")
    api.update("jobs", name, conditions=condition("Failed", "DeadlineExceeded"))
    monkeypatch.setattr(cluster, "GONE_S", 0.2)
    with pytest.raises(TryAgain, match="pods of the last one still save"):
        submit(run())
    monkeypatch.setattr(cluster, "GONE_S", 10)
    timer = threading.Timer(0.2, lambda: (api.remove("pods", pod), api.remove("jobs", name)))
    timer.start()
    assert submit(run()) == [name]
    assert "deletionTimestamp" not in api.get("jobs", name)["metadata"]


def test_a_job_of_somebody_else_is_left_alone(api: Api):
    [name] = submit(run())
    api.merge("jobs", name, {"metadata": {"annotations": {"llmtrain/run": "other/0"}}})
    with pytest.raises(UserError, match=rf"a Job {name} of something else .*other/0"):
        submit(run())


def test_several_machines_have_a_service_that_goes_with_the_job(api: Api):
    over_two = run("infra.ranks=2", "infra.launch.nodes=2")
    [name] = submit(over_two)
    [owner] = api.get("services", name)["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("Job", api.get("jobs", name)["metadata"]["uid"])
    api.remove("services", name)  # the submission was killed in between
    assert submit(over_two) == [name]
    assert api.get("services", name)


def test_a_manifest_that_the_server_refuses_stops_before_the_first_job(api: Api):
    api.answers = [Refused(404, "") for _ in range(2)]
    with pytest.raises(UserError, match="PersistentVolumeClaim llmtrain-outputs: make it"):
        submit(run())
    api.answers.clear()
    with pytest.raises(UserError, match="ServiceAccount nobody"):
        submit(run("infra.launch.service_account=nobody"))
    assert api.all("jobs") == []


# ---- JobSets

TOGETHER = ("infra.ranks=2", "infra.launch.nodes=2", "infra.launch.job_set=true")


def seen(name: str) -> tuple[State, str]:
    job = engine(*TOGETHER).jobs([name])[name]
    return job.state, job.reason


def fails(api: Api, job: str, reason: str, message: str) -> None:
    api.update("jobs", job, conditions=condition("Failed", reason, message))
    control(api)


def test_a_run_that_is_submitted_twice_has_one_job_set_which_is_watched_to_its_end(api: Api):
    assert submit(run(*TOGETHER)) == submit(run(*TOGETHER)) == [job_name(run())]
    [made] = api.all("jobsets")
    name, job = made["metadata"]["name"], job_of(made["metadata"]["name"])
    assert made["metadata"]["resourceVersion"] == "103", "the first is not disturbed"
    assert api.all("services") == api.all("jobs") == []
    assert seen(name) == (State.WAITING, "")
    control(api)
    for index in "ab":
        labels = made["spec"]["replicatedJobs"][0]["template"]["metadata"]["labels"] | {JOB: job}
        pod = {"metadata": {"name": f"{job}-{index}", "labels": labels}, "spec": {"nodeName": f"n{index}"}}
        assert seen(name)[0] == State.WAITING, "until each machine has its pod"
        api.put("pods", pod | {"status": {"phase": "Running"}})
    api.asked.clear()
    assert engine(*TOGETHER).jobs([name])[name].node == "na"
    assert seen(name) == (State.RUNNING, "")
    assert sorted(set(api.asked)) == ["WATCH jobs", "WATCH jobsets", "WATCH pods"]
    for index in "ab":
        api.remove("pods", f"{job}-{index}")
    fails(
        api, job, "PodFailurePolicy", "Pod llmtrain/x has condition DisruptionTarget matching FailJob rule at index 0"
    )
    assert seen(name) == (State.WAITING, "all its machines start again")
    control(api)  # the old Job goes
    assert api.all("jobs") == []
    control(api)
    first, second = api.get("jobsets", name)["status"], api.get("jobs", job)
    assert (first["restarts"], first["restartsCountTowardsMax"], "status" in second) == (1, 0, False)
    api.update("jobs", job, conditions=condition("Complete"))
    control(api)
    assert seen(name) == (State.ENDED, "complete")


def test_a_job_set_that_fails_says_what_its_job_failed_by(api: Api):
    [name] = submit(run(*TOGETHER, "infra.launch.restarts=0"))
    control(api)
    fails(api, job_of(name), "PodFailurePolicy", "x failed with exit code 2 matching FailJob rule at index 1")
    assert seen(name) == (State.ENDED, "PodFailurePolicy, exit code 2")
    first = api.get("jobsets", name)["metadata"]["uid"]
    assert submit(run(*TOGETHER, "infra.launch.restarts=0")) == [name], "it makes room for its next try"
    assert api.get("jobsets", name)["metadata"]["uid"] != first
    control(api)
    fails(api, job_of(name), "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    assert seen(name) == (State.ENDED, "ReachedMaxRestarts: BackoffLimitExceeded")


def test_a_job_set_of_somebody_else_is_left_alone(api: Api):
    [name] = submit(run(*TOGETHER))
    api.merge("jobsets", name, {"metadata": {"annotations": {"llmtrain/run": "other/0"}}})
    with pytest.raises(UserError, match=rf"a JobSet {name} of something else .*other/0"):
        submit(run(*TOGETHER))


def test_a_cancelled_job_set_fails_by_the_deadline_of_its_job_and_stays_listed(api: Api):
    [name] = submit(run(*TOGETHER))
    control(api)
    engine(*TOGETHER).cancel([name, "never-there"])
    assert api.get("jobs", job_of(name))["spec"]["activeDeadlineSeconds"] == 1
    assert seen(name) == (State.STOPPING, "cancelled")
    fails(api, job_of(name), "DeadlineExceeded", "Job was active longer than specified deadline")
    assert seen(name) == (State.ENDED, "cancelled")
    version = api.version
    engine(*TOGETHER).cancel([name])
    assert api.version == version, "what has ended is left alone"


def no_job_yet(api: Api, name: str) -> None:
    pass


def job_has_failed(api: Api, name: str) -> None:
    control(api)
    api.update("jobs", job_of(name), conditions=condition("Failed", "BackoffLimitExceeded"))


def job_goes(api: Api, name: str) -> None:
    control(api)
    pod_of(api, job_of(name), phase="Running")
    api.delete("jobs", job_of(name), {})


@pytest.mark.parametrize("between", [no_job_yet, job_has_failed, job_goes])
def test_a_job_set_that_is_cancelled_between_two_starts_does_not_start_again(api: Api, between: Callable):
    [name] = submit(run(*TOGETHER))
    between(api, name)
    engine(*TOGETHER).cancel([name])
    control(api)
    if left := api.get("jobsets", name):
        assert "deletionTimestamp" in left["metadata"], "it goes with its last pod"
        assert seen(name) == (State.STOPPING, "cancelled")
    else:
        assert seen(name) == (State.UNKNOWN, "it is not in the cluster")


def test_a_job_set_in_a_queue_is_deleted_so_that_nobody_admits_it(api: Api):
    [name] = submit(run(*TOGETHER, "infra.launch.queue=gpus"))
    control(api)
    assert api.get("jobs", job_of(name))["spec"]["suspend"]
    assert seen(name) == (State.WAITING, "in the queue")
    engine(*TOGETHER).cancel([name])
    assert api.all("jobsets") == api.all("jobs") == []


def test_a_cluster_without_job_sets_says_what_to_do(api: Api):
    api.knows_job_sets = False
    for asked in (lambda: submit(run(*TOGETHER)), lambda: engine(*TOGETHER).jobs(["x"])):
        with pytest.raises(UserError, match=r"knows no JobSet: install .*infra\.launch\.job_set=false"):
            asked()
    assert submit(run()) == [job_name(run())], "Jobs need none"


# ---- a server in trouble


def test_a_busy_server_is_asked_again_as_late_as_it_says(api: Api, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr("kubernetes.utils.retry.on_retry_after_error.__defaults__", (waits.append, lambda: 0.0))
    api.answers = [Refused(429, "slow down", Retry_After="7"), Refused(503, "no leader")]
    assert submit(run()) == [job_name(run())]
    assert waits == [7.0, 0.02]


def test_patience_has_an_end(api: Api):
    api.answers = [Refused(500, "etcdserver: leader changed")] * 10
    with pytest.raises(TryAgain, match=r"busy \(500\): etcdserver: leader changed"):
        submit(run())
    assert len(api.answers) == 10 - 4


def test_a_server_that_wants_an_hour_is_not_waited_for(api: Api):
    api.answers = [Refused(429, "later", Retry_After="3600")]
    with pytest.raises(TryAgain, match="later"):
        submit(run())


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "az login"), (403, "RBAC Writer"), (422, "infra.launch"), (400, "infra.launch")],
)
def test_a_refusal_says_what_to_do(api: Api, status: int, advice: str):
    api.answers = [Refused(status, "words of the server")]
    with pytest.raises(UserError, match=advice) as caught:
        submit(run())
    assert status == 401 or "words of the server" in str(caught.value)


def test_a_wrong_token_is_a_401(api: Api):
    api.token = "another"
    with pytest.raises(UserError, match="does not accept your credentials"):
        engine().jobs(["x"])


def test_a_missing_namespace_has_a_name(api: Api):
    with pytest.raises(UserError, match=r"namespace elsewhere"):
        submit(run("infra.launch.namespace=elsewhere"))


def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match="az aks get-credentials"):
        submit(run())


def test_a_context_that_is_not_there(api: Api):
    with pytest.raises(UserError, match=r"infra\.launch\.context"):
        submit(run("infra.launch.context=prod"))


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "BACKOFF", cluster.Backoff(steps=2, duration=0.01, factor=2.0))
    with serving(tmp_path) as (_, config):
        pass
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(UserError, match=r"no cluster answers at http://127\.0\.0\.1:"):
        submit(run())


def test_a_cluster_that_goes_away_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "BACKOFF", cluster.Backoff(steps=2, duration=0.01, factor=2.0))
    aks._namespace.cache_clear()
    with serving(tmp_path) as (_, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        engine().jobs(["x"])
    with pytest.raises(TryAgain, match="broke 2 times in a row"):
        engine().jobs(["x"])


def test_submitting_needs_no_cluster_to_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert yaml.safe_load(engine().script(SWEEP, [run()]))["kind"] == "Job"


def test_the_missing_package_has_a_name(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("llmtrain.launch.aks")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[aks\]'"):
        engine_of(run().infra.launch)


# ---- watching


def test_the_first_look_lists_and_the_next_ones_watch(api: Api):
    [name] = submit(run())
    api.asked.clear()
    assert engine().jobs([name])[name].state == State.WAITING
    pod_of(api, name, phase="Running")
    seen = engine().jobs([name])[name]
    assert (seen.state, seen.node) == (State.RUNNING, "n1")
    assert sorted(api.asked) == ["GET jobs", "GET pods", "WATCH jobs", "WATCH pods"]


def test_a_job_that_was_deleted_is_unknown(api: Api):
    [name] = submit(run())
    engine().jobs([name])
    api.remove("jobs", name)
    assert engine().jobs([name])[name].state == State.UNKNOWN


def test_a_long_list_comes_in_pages(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmtrain.launch.aks.watched.PAGE", 2)
    names = submit(*(run(f"trainer.seed={seed}") for seed in range(5)))
    api.asked.clear()
    assert {job.state for job in engine().jobs(names).values()} == {State.WAITING}
    assert api.asked.count("GET jobs") == 3


def test_a_list_whose_next_page_was_forgotten_begins_again(api: Api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmtrain.launch.aks.watched.PAGE", 2)
    names = submit(*(run(f"trainer.seed={seed}") for seed in range(3)))
    listing = api.list

    def forgets_once(plural: str, query: dict[str, str]) -> dict:
        page = listing(plural, query)
        if plural == "jobs" and "continue" in page["metadata"] and not api.forgotten:
            api.put("jobs", {"metadata": {"name": "a-stranger"}})
            api.forget()
        return page

    monkeypatch.setattr(api, "list", forgets_once)
    assert {job.state for job in engine().jobs(names).values()} == {State.WAITING}


def cut(api: Api) -> None:
    api.cut_watches = 2  # of jobs and of pods, or twice the same


def forgotten(api: Api) -> None:
    api.forget()


def forgotten_and_cut(api: Api) -> None:
    api.forget()
    api.cut_watches = 1


def busy(api: Api) -> None:
    api.answers = [Refused(429, "slow down", Retry_After="0"), Refused(410, "too old resource version")]


def quiet(api: Api) -> None:
    pass


@pytest.mark.parametrize("trouble", [cut, forgotten, forgotten_and_cut, busy, quiet])
def test_a_watch_recovers_and_misses_nothing(api: Api, trouble: Callable[[Api], None]):
    runs = [run(f"trainer.seed={seed}") for seed in range(4)]
    names = submit(*runs)
    looks = engine()
    assert {job.state for job in looks.jobs(names).values()} == {State.WAITING}
    pod_of(api, names[0], phase="Running")
    api.update("jobs", names[1], conditions=condition("Complete"))
    api.remove("jobs", names[2])
    trouble(api)
    found = looks.jobs(names)
    expected = [State.RUNNING, State.ENDED, State.UNKNOWN, State.WAITING]
    assert [found[name].state for name in names] == expected
    api.update("jobs", names[3], conditions=condition("Failed", "BackoffLimitExceeded"))
    assert looks.jobs(names)[names[3]].reason == "BackoffLimitExceeded"


def test_how_a_job_stands_in_words(api: Api):
    [name] = submit(run())

    def seen() -> tuple[State, str]:
        job = engine().jobs([name])[name]
        return job.state, job.reason

    assert seen() == (State.WAITING, "")
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no H100"}
    pod = pod_of(api, name, phase="Pending", conditions=[unschedulable])
    assert seen() == (State.WAITING, "Unschedulable: no H100")
    pulling = [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]
    api.update("pods", pod, conditions=[], containerStatuses=pulling)
    assert seen() == (State.WAITING, "ImagePullBackOff")
    api.update("pods", pod, phase="Running", containerStatuses=[])
    assert seen() == (State.RUNNING, "")
    api.merge("pods", pod, {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
    assert seen() == (State.RUNNING, "its node is taken away")
    api.update("pods", pod, phase="Failed", conditions=condition("DisruptionTarget"))
    assert seen() == (State.WAITING, "its node was taken away")
    words = "Container llmtrain for pod x failed with exit code 2 matching FailJob rule at index 1"
    api.update("jobs", name, conditions=condition("Failed", "PodFailurePolicy", words))
    assert seen() == (State.ENDED, "PodFailurePolicy, exit code 2")


# ---- cancelling


def test_what_a_pod_said_that_did_not_reach_the_share_is_told(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    here = run(outputs=Path("outputs"))
    here.directory.mkdir(parents=True)
    (here.directory / "config.json").write_text(here.frozen.model_dump_json())
    place = SweepDirectory(Path("outputs"), "0a1b2c3d")
    place.write(sweep_of("aks", [Point(overrides=(), run=relative(here, place.outputs))]))
    [name] = submit(here)
    place.submitted(relative(here, place.outputs), name)
    assert jobs(["logs", "0a1b2c3d"]) == 0
    assert "has printed nothing yet: waiting" in capsys.readouterr().out
    pod = pod_of(api, name, phase="Pending")
    assert jobs(["logs", "0a1b2c3d"]) == 0
    assert "has printed nothing yet: waiting" in capsys.readouterr().out
    api.logs[pod] = "/outputs: no such directory – mounted?\n"
    api.update("jobs", name, conditions=condition("Failed", "PodFailurePolicy", "exit code 2"))
    for words in (["logs", "0a1b2c3d"], ["logs", "-f", "0a1b2c3d"]):
        assert jobs(words) == 0
        assert capsys.readouterr().out.strip() == "/outputs: no such directory – mounted?"
    (here.directory / "log.txt").write_text("its own\n")
    assert jobs(["logs", "0a1b2c3d"]) == 0
    assert capsys.readouterr().out == "its own\n"


def test_a_cancelled_job_fails_by_its_deadline_and_stays_listed(api: Api):
    [name] = submit(run())
    engine().cancel([name])
    made = api.get("jobs", name)
    assert made["spec"]["activeDeadlineSeconds"] == 1
    assert engine().jobs([name])[name].state == State.STOPPING
    api.update("jobs", name, conditions=condition("Failed", "DeadlineExceeded"))
    job = engine().jobs([name])[name]
    assert (job.state, job.reason) == (State.ENDED, "cancelled")


def test_a_job_in_a_queue_is_deleted_so_that_nobody_admits_it(api: Api):
    [name] = submit(run("infra.launch.queue=gpus"))
    assert engine().jobs([name])[name].reason == "in the queue"
    engine().cancel([name])
    assert api.all("jobs") == []


def test_cancelling_what_has_ended_or_gone_changes_nothing(api: Api):
    [name] = submit(run())
    api.update("jobs", name, conditions=condition("Complete"))
    version = api.version
    engine().cancel([name, "never-there"])
    assert api.version == version
