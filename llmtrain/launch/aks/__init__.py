"""Azure's AKS, or any other Kubernetes: one Job a run, or one JobSet, made by the official client.

The outputs directory of the machine that submits is a share that the pods mount too (`infra.launch.outputs_claim`), so
a run's directory is the same one on both sides. Kubernetes starts a pod again that was evicted; the run in it goes on
from its newest checkpoint. Kueue is named by a label. Not rendered: RayJob, because Ray has an engine of its own.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from llmtrain.config.launch import AKSLaunch
from llmtrain.errors import UserError
from llmtrain.launch.aks.cluster import Cluster
from llmtrain.launch.aks.job_sets import job_of, job_set
from llmtrain.launch.aks.manifests import Manifest, manifest
from llmtrain.launch.aks.states import state_of
from llmtrain.launch.aks.watched import Namespace
from llmtrain.launch.engine import Job, Run


class AKSEngine:
    """Handles are names of Jobs, or of JobSets."""

    def __init__(self, launch: AKSLaunch) -> None:
        self.launch = launch

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        """As `Engine.submit`; a run whose Job is there already keeps it. Raises UserError where there is no cluster, or
        it refuses the first Job, TryAgain where it is busy: what was submitted until then stays."""
        manifests = self._manifests(sweep, runs)
        if not runs:
            return
        cluster = Cluster(self.launch)
        cluster.check()
        for run, made in zip(runs, manifests, strict=True):
            cluster.create(made)
            yield run, made.name

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        """The manifests, as YAML."""
        return "".join(made.as_yaml() for made in self._manifests(sweep, runs)).rstrip("\n")

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        """By the Jobs, their JobSets and pods; the first look lists them, each further one of this process asks what
        changed."""
        if not handles:
            return {}
        seen = _namespace(os.environ.get("KUBECONFIG"), self.launch)
        seen.refresh()
        pods, found = seen.pods_by_job(), {}
        for name in handles:
            job = job_of(name) if self.launch.job_set else name
            found[name] = state_of(seen.runs.objects.get(name), pods.get(job, []), seen.jobs.objects.get(job))
        return found

    def cancel(self, handles: Sequence[str]) -> None:
        """End the Jobs; their pods have `grace_seconds` to save."""
        cluster = Cluster(self.launch)
        for name in handles:
            cluster.cancel(name)

    def log(self, handle: str) -> str:
        """Of the newest pod; Kubernetes forgets it with the pod."""
        cluster = Cluster(self.launch)
        return cluster.log(job_of(handle) if self.launch.job_set else handle)

    def _manifests(self, sweep: Path, runs: Sequence[Run]) -> list[Manifest]:
        """Of all runs, before the first is submitted."""
        if self.launch.parallel and len(runs) > self.launch.parallel:
            raise UserError(
                f"infra.launch.parallel={self.launch.parallel}, but Jobs do not wait for each other: let a queue admit "
                f"them (infra.launch.queue, with a quota: launchers/aks/kueue.yaml) and set infra.launch.parallel=null"
            )
        made = job_set if self.launch.job_set else manifest
        return [made(run, self.launch, sweep.name) for run in runs]


@cache
def _namespace(path: str | None, launch: AKSLaunch) -> Namespace:
    """What this process has seen of it: kept, so that it need not be listed again."""
    return Namespace(Cluster(launch))
