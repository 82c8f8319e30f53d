"""The manifests of runs on AKS: pinned as a whole, judged by Kubernetes' own schemas, and by what must hold of all."""

import json
from pathlib import Path

import jobset_controller
import jsonschema
import kubernetes_validate
import pytest
import yaml
from aks_runs import IMAGE, run
from crds import judged_job_set

from llmtrain.config.compose import load_config
from llmtrain.errors import ConfigError, UserError
from llmtrain.launch.aks import AKSEngine
from llmtrain.launch.aks.job_sets import job_of
from llmtrain.launch.aks.manifests import NOT_AGAIN, job_name
from llmtrain.launch.engine import Run

GOLDEN = Path(__file__).parents[2] / "golden" / "aks"

VERSIONS = ("1.33", "1.37")
"""The oldest that AKS still has, and the newest that the schemas know."""
TWO_NODES = "infra.ranks=16", "infra.launch.nodes=2"
CASES = {
    "cpu": (),
    "h100": (
        "infra=aks", "infra.launch.secret=trackers", "infra.launch.queue=gpus", "infra.launch.node_pool=h100spot",
    ),
    "h100_16": ("infra=aks_h100", *TWO_NODES, "name=Two nodes"),
    "h100_16_job_set": (
        "infra=aks_h100", *TWO_NODES, "infra.launch.job_set=true", "infra.launch.queue=gpus", "name=Two nodes",
    ),
}  # fmt: skip


def rendered(*runs: Run) -> str:
    engine = AKSEngine(runs[0].infra.launch)
    return engine.script(Path("outputs/sweeps/0a1b2c3d"), runs) + "\n"


def objects(*overrides: str) -> list[dict]:
    return list(yaml.safe_load_all(rendered(run(*overrides))))


def job(*overrides: str) -> dict:
    """The Job of a run, or of its JobSet."""
    [found] = [item for item in objects(*overrides) if item["kind"] in ("Job", "JobSet")]
    return found if found["kind"] == "Job" else found["spec"]["replicatedJobs"][0]["template"]


def pod(*overrides: str) -> dict:
    return job(*overrides)["spec"]["template"]["spec"]


@pytest.mark.parametrize("case", CASES)
def test_manifest_is_the_pinned_one(case: str):
    assert rendered(run(*CASES[case])) == (GOLDEN / f"{case}.yaml").read_text(), "scripts/golden rewrites it"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_manifest_obeys_the_schemas_of_kubernetes(case: str, version: str):
    for item in objects(*CASES[case]):
        if item["kind"] == "JobSet":
            judged_job_set(item, version)
        else:
            assert kubernetes_validate.validate(item, version, strict=True) == version


def test_the_schemas_notice_a_misspelt_key():
    broken = job()
    broken["spec"]["backOffLimit"] = broken["spec"].pop("backoffLimit")
    with pytest.raises(kubernetes_validate.ValidationError, match="backOffLimit"):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)
    for place in ("spec", "pod"):
        [broken] = objects(*CASES["h100_16_job_set"])
        spec = broken["spec"]
        spec = spec if place == "spec" else spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        spec["successPolice"] = {}
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match="successPolice"):
            judged_job_set(broken, VERSIONS[0])


@pytest.mark.parametrize("case", CASES)
def test_nothing_runs_as_root_or_may_become_it(case: str):
    spec = pod(*CASES[case])
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not spec["automountServiceAccountToken"]


@pytest.mark.parametrize("case", CASES)
def test_every_directory_that_is_written_to_is_a_volume(case: str):
    spec = pod(*CASES[case])
    [container] = spec["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert mounts.keys() == {"/outputs", "/dev/shm", "/tmp", environment["HOME"]}
    assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}
    assert environment["HF_HOME"].startswith("/outputs/")


def test_failure_policy_by_what_ended_the_pod():
    policy = job()["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in policy] == ["Ignore", "FailJob", "Count"]
    assert policy[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert policy[1]["onExitCodes"]["values"] == [1, 2, 3, 130]
    assert policy[2]["onExitCodes"]["values"] == [75]


def test_the_same_run_has_the_same_name_and_another_run_another():
    one, same, other = run(), run("infra.launch.image=registry.example/llmtrain:0.6"), run("trainer.seed=7")
    assert job_name(one) == job_name(same)
    assert job_name(one) != job_name(other)
    assert job_name(one) == f"llmtrain-qwen3-tiny-pretrain-{one.frozen.run_id}"


def test_the_longest_name_leaves_room_for_the_pods_of_a_job():
    name = job_name(run("name=" + "Ab_" * 60))
    assert len(f"{job_of(name)}-9999-abcde") <= 63, "JobSet refuses longer names of pods"
    assert name.replace("-", "").isalnum()
    assert name == name.lower()


def test_resources_are_of_all_ranks_of_a_pod():
    [container] = pod("infra=aks_h100", "infra.ranks=16", "infra.launch.nodes=2")["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "80", "memory": "1600Gi", "nvidia.com/gpu": "8"},
        "limits": {"memory": "1600Gi", "nvidia.com/gpu": "8"},
    }


def test_several_machines_meet_at_the_first_by_name():
    service, made = objects("infra=aks_h100", "infra.ranks=16", "infra.launch.nodes=2", "infra.launch.restarts=4")
    name, spec = made["metadata"]["name"], made["spec"]
    environment = {one["name"]: one["value"] for one in spec["template"]["spec"]["containers"][0]["env"]}
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 8, "each start that fails ends two pods"
    assert environment["MASTER_ADDR"] == f"{name}-0.{spec['template']['spec']['subdomain']}"
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]


JOB_SET = "infra=aks_h100", *TWO_NODES, "infra.launch.job_set=true"


def test_a_job_set_is_one_indexed_job_over_the_machines():
    [made] = objects(*JOB_SET, "infra.launch.restarts=4")
    [group] = made["spec"]["replicatedJobs"]
    name, spec = made["metadata"]["name"], group["template"]["spec"]
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert (group["replicas"], spec["completionMode"], spec["completions"], spec["parallelism"]) == (1, "Indexed", 2, 2)
    assert made["spec"]["network"]["enableDNSHostnames"], "no Service of ours"
    environment = {one["name"]: one["value"] for one in spec["template"]["spec"]["containers"][0]["env"]}
    assert environment["MASTER_ADDR"] == f"{name}-{group['name']}-0-0.{name}"
    assert made["spec"]["ttlSecondsAfterFinished"] == 604_800
    assert "ttlSecondsAfterFinished" not in spec, "a JobSet makes a Job that has gone anew"
    assert "suspend" not in made["spec"]


def test_a_job_set_has_the_pods_labels_and_annotation_of_a_job():
    [_, plain], [together] = objects("infra=aks_h100", *TWO_NODES), objects(*JOB_SET)
    assert together["metadata"] == plain["metadata"]
    ours, theirs = plain["spec"]["template"], together["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert ours["metadata"] == theirs["metadata"]
    environments = [pod["spec"]["containers"][0].pop("env") for pod in (ours, theirs)]
    assert [a for a, b in zip(*environments, strict=True) if a != b] == [
        {"name": "MASTER_ADDR", "value": f"{plain['metadata']['name']}-0.{plain['metadata']['name']}"}
    ]
    assert ours["spec"].pop("subdomain"), "JobSet sets its own"
    assert ours == theirs


EXIT = "Container llmtrain for pod a/b failed with exit code {} matching FailJob rule at index 1"


@pytest.mark.parametrize(
    ("reason", "message", "action"),
    [
        (
            "PodFailurePolicy",
            "Pod a/b has condition DisruptionTarget matching FailJob rule at index 0",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        *(("PodFailurePolicy", EXIT.format(code), "FailJobSet") for code in NOT_AGAIN),
        ("PodFailurePolicy", EXIT.format(137), "RestartJobSet"),
        ("PodFailurePolicy", "as a later Kubernetes may word it", "RestartJobSet"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", "RestartJobSet"),
        ("DeadlineExceeded", "Job was active longer than specified deadline", "FailJobSet"),
    ],
)
def test_what_ended_the_job_decides_about_the_job_set(reason: str, message: str, action: str):
    [made] = objects(*JOB_SET)
    rules = made["spec"]["failurePolicy"]["rules"]
    end = {"reason": reason, "message": message}
    assert next(rule["action"] for rule in rules if jobset_controller.fits(rule, end)) == action


def test_a_job_set_of_one_machine_is_refused():
    with pytest.raises(ConfigError, match=r"job_set=true, but nodes=1.*set infra\.launch\.job_set=false"):
        load_config(["infra=aks_cpu", "infra.launch.job_set=true"])


def test_spot_and_gpu_nodes_are_tolerated_only_where_they_are_wanted():
    spot = "kubernetes.azure.com/scalesetpriority"
    assert pod("infra.launch.spot=false").get("tolerations") is None
    assert spot not in pod("infra.launch.spot=false")["nodeSelector"]
    assert [one["key"] for one in pod("infra=aks")["tolerations"]] == [spot, "sku", "nvidia.com/gpu"]
    assert pod("infra=aks", "infra.launch.node_pool=h100")["nodeSelector"]["agentpool"] == "h100"


def test_a_queue_holds_the_job_until_it_admits_it():
    made = job("infra.launch.queue=gpus")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["suspend"]
    assert "suspend" not in job()["spec"]


def test_a_secret_is_named_and_never_written():
    [container] = pod("infra.launch.secret=trackers")["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "trackers"}}]
    assert "secret" not in json.dumps(pod())


@pytest.mark.parametrize(
    "image", ["llmtrain", "registry.example:5000/llmtrain", "llmtrain:latest", "a/b:latest", "a/b:"]
)
def test_an_image_that_changes_is_refused(image: str):
    with pytest.raises(ConfigError, match="is another image tomorrow"):
        load_config(["infra=aks_cpu", f"infra.launch.image='{image}'"])


@pytest.mark.parametrize("image", [IMAGE, "registry.example:5000/llmtrain:0.5.1"])
def test_an_image_that_stays_is_taken(image: str):
    assert load_config(["infra=aks_cpu", f"infra.launch.image='{image}'"]).infra.launch.image == image


@pytest.mark.parametrize(
    "wrong",
    ["namespace=My_Space", "outputs_claim=a/b", "cost_centre='a b'", "outputs_mount=outputs", "queue=Q", "secret=''"],
)
def test_what_cannot_be_a_name_is_refused_before_anything_is_submitted(wrong: str):
    with pytest.raises(ConfigError, match=f"set infra.launch.{wrong.partition('=')[0]}"):
        load_config(["infra=aks_cpu", f"infra.launch.{wrong}"])


def test_no_image_says_which_setting():
    with pytest.raises(UserError, match=r"infra\.launch\.image=registry"):
        rendered(run("infra.launch.image=null"))


def test_shared_memory_must_leave_some():
    with pytest.raises(UserError, match=r"shared_memory_gib=4 .* 4 GiB"):
        rendered(run("infra.launch.shared_memory_gib=4"))


def test_jobs_do_not_wait_for_each_other():
    runs = [run(f"trainer.seed={seed}", "infra.launch.parallel=2") for seed in range(3)]
    with pytest.raises(UserError, match=r"infra\.launch\.queue"):
        rendered(*runs)
    assert len(list(yaml.safe_load_all(rendered(*runs[:2])))) == 2
