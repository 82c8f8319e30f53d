"""The files for an administrator fit the schemas of Kubernetes and Kueue, the defaults of infra=aks, and the code."""

import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from aks_runs import frozen, run
from crds import judged

from llmtrain.config.compose import load_config, load_sweep
from llmtrain.launch.aks import cluster, job_sets, kinds, manifests, pods, watched

ROOT = Path(__file__).parents[3]
PLACE = ROOT / "launchers" / "aks"
DOCUMENTED = (PLACE / "README.md").read_text() + (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^(?:python train\.py|llmtrain) .*$", re.MULTILINE)


def objects(name: str) -> list[dict]:
    return list(yaml.safe_load_all((PLACE / name).read_text()))


def applied() -> dict[str, dict]:
    """What `kubectl apply -k` makes, by kind."""
    [kustomization] = objects("kustomization.yaml")
    return {item["kind"]: item for name in kustomization["resources"] for item in objects(name)}


@pytest.mark.parametrize("kind", sorted(applied()))
def test_what_is_applied_obeys_the_schemas_of_kubernetes(kind: str):
    kubernetes_validate.validate(applied()[kind], "1.33", strict=True)


@pytest.mark.parametrize("number", range(3))
def test_the_queue_obeys_the_schemas_of_kueue(number: int):
    judged(objects("kueue.yaml")[number], "kueue")


def test_the_schemas_of_kueue_notice_a_misspelt_key():
    queue = objects("kueue.yaml")[1]
    queue["spec"]["resourceGroup"] = queue["spec"].pop("resourceGroups")
    with pytest.raises(jsonschema.ValidationError, match="resourceGroup"):
        judged(queue, "kueue")


def test_names_are_those_of_the_defaults():
    launch = load_config(["infra=aks"]).infra.launch
    found = applied()
    assert found["Namespace"]["metadata"]["name"] == launch.namespace
    assert found["ServiceAccount"]["metadata"]["name"] == launch.service_account
    assert found["PersistentVolumeClaim"]["metadata"]["name"] == launch.outputs_claim
    claim = found["PersistentVolume"]["spec"]["claimRef"]
    assert claim == {"namespace": launch.namespace, "name": launch.outputs_claim}


def test_pods_are_what_the_namespace_admits():
    """By the profile `restricted` of the Pod Security Standards."""
    spec = manifests.as_data(manifests.manifest(run(), run().infra.launch, "0").job)["spec"]["template"]["spec"]
    assert applied()["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert all(volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in spec["volumes"])
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}


def test_submitters_may_do_what_the_code_does_and_nothing_else():
    source = "".join(Path(module.__file__).read_text() for module in (cluster, kinds, job_sets, watched))
    verbs = {"create": "create", "read": "get", "get": "get", "patch": "patch", "delete": "delete", "list": "list"}
    used = {(verbs[verb], what.replace("_", "") + "s") for verb, what in re.findall(
        r"\.(create|read|get|patch|delete|list)_namespaced_(\w+)", source)}  # fmt: skip
    apart = {"customobjects": "jobsets", "podlogs": "pods/log"}
    used = {(verb, apart.get(what, what)) for verb, what in used}
    used |= {("watch", what) for verb, what in used if verb == "list"}
    allowed = {
        (verb, resource)
        for rule in applied()["Role"]["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    assert used == allowed


@pytest.mark.parametrize("command", [one for one in COMMAND.findall(DOCUMENTED) if "infra=aks" in one])
def test_a_documented_command_describes_jobs(command: str):
    words = [word for word in command.split()[2:] if not word.startswith("-")]
    words = [word.replace("DIGEST", "ab" * 32).replace("REGISTRY", "registry.example") for word in words]
    points = load_sweep(words)
    assert [config.trainer.lr for _, config in points] == [1e-4, 3e-4]
    for _, config in points:
        made = manifests.manifest(frozen(config), config.infra.launch, "0")
        kubernetes_validate.validate(manifests.as_data(made.job), "1.33", strict=True)


def test_the_image_runs_as_the_user_of_the_pods():
    assert f"USER {pods.USER}:{pods.USER}" in (PLACE / "Dockerfile").read_text().splitlines()
