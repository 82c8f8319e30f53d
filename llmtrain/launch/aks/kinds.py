"""The kind of object that a run is in the cluster, and how the official client asks for objects of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kubernetes import client as k8s


@dataclass(frozen=True)
class Kind:
    """Requests take keywords: `namespace`, and `name` and `body` where they need them."""

    name: str
    create: Callable[..., Any]
    read: Callable[..., Any]
    patch: Callable[..., Any]
    delete: Callable[..., Any]
    list: Callable[..., Any]


def jobs(client: k8s.ApiClient) -> Kind:
    """Kubernetes' own Jobs."""
    api = k8s.BatchV1Api(client)
    return Kind(
        name="Job",
        create=api.create_namespaced_job,
        read=api.read_namespaced_job,
        patch=api.patch_namespaced_job,
        delete=api.delete_namespaced_job,
        list=api.list_namespaced_job,
    )
