"""The user's own part of a pod: `--metadata kubernetes=FILE`, read and checked here, laid over what this project sets.

TorchX reads such a file too, but passes over a field that it does not know, and over a whole file of metadata and spec.
"""

import os
from typing import Any, Dict, Hashable, List, Optional

import yaml
from torchx.specs import Role
from torchx.specs.overlays import PUT, apply_overlay, get_overlay, set_overlay

from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject
from launch.environment import GRACE_SECONDS
from launch.kubernetes.pod_fields import POD, check_overlay, check_pod

NAMESPACE = "kubernetes"
PATIENT_POD = {"spec": {"terminationGracePeriodSeconds": GRACE_SECONDS}}
OF_A_FILE = {"apiVersion": "v1", "kind": "Pod"}  # what a pod's file may say of itself
BY_OPTION = {
    "command": "leave it to the component",
    "env": "add variables by --env, or by envFrom",
    "volumeMounts": "list the job's own among them, or give --mounts",
    "resources.limits": "give --cpu, --gpu, --memMB and --devices",
}


class Overlay:
    """A user's overlay. path: its file, for messages. pod: a part of a pod, with TorchX's operators among its keys."""

    def __init__(self, path: str, pod: JsonObject):
        self.path, self.pod = path, pod
        check_overlay(pod, self.refuse)

    def refuse(self, place: str, why: str) -> UserError:
        """Makes the error for a place in the file."""
        return UserError(f"{self.path}: {place}: {why}" if place else f"{self.path}: the file {why}")


def read_overlay(metadata: Optional[Dict[str, str]]) -> Optional[Overlay]:
    """Reads the file that --metadata names. Raises UserError for one that is not there, is no YAML, or holds what no pod
    has, and for metadata that no scheduler reads."""
    for key, value in (metadata or {}).items():
        if key != NAMESPACE:
            raise UserError(f"--metadata: {key}={value}: no scheduler reads {key}; write kubernetes=file:///path/to/pod.yaml")
    if not metadata:
        return None
    path = _local(metadata[NAMESPACE])
    values = _without_tuples(_parsed(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}: a pod's file holds metadata: and spec:, and here is {found}")
    if POD in values:
        others = ", ".join(map(str, values.keys() - {POD}))
        if others:
            raise UserError(f"{path}: {others}: must stand within {POD}, or {POD} be left out")
        values = values[POD]
    if isinstance(values, dict):
        for key, value in OF_A_FILE.items():
            if values.pop(key, value) != value:
                raise UserError(f"{path}: {key}: must be {value}, or left out")
        if "status" in values:
            raise UserError(f"{path}: status: it is the cluster's to write; leave it out")
    return Overlay(path, values)


def lay_over(role: Role, overlay: Optional[Overlay]) -> None:
    """Puts the pod's defaults and the user's overlay on a role, for TorchX. Raises UserError where the pods of the role,
    of its first and of its last node, would not be whole with it."""
    set_overlay(role, NAMESPACE, POD, PATIENT_POD)
    if overlay is None:
        return
    try:
        set_overlay(role, NAMESPACE, POD, overlay.pod)
        # Without an image there are no pods; a job that wants them without one is refused elsewhere.
        for node in {0, role.num_replicas - 1} if not role.image.startswith("/") else ():
            _check_merged(role, node, overlay)
    except (TypeError, ValueError) as error:  # TorchX's, for operators on what they do not fit
        raise UserError(f"{overlay.path}: {one_line(error)}") from None


def _check_merged(role: Role, node: int, overlay: Overlay) -> None:
    from kubernetes.client import ApiClient
    from torchx.schedulers.kubernetes_scheduler import role_to_pod

    name = f"{role.name}-{node}"
    own = ApiClient().sanitize_for_serialization(role_to_pod(name, role, None))
    merged = ApiClient().sanitize_for_serialization(role_to_pod(name, role, None))
    apply_overlay(merged, get_overlay(role, NAMESPACE, POD))
    for key in ("metadata.labels", "spec.containers", "spec.volumes"):
        if _at(merged, key) is None:
            raise overlay.refuse(key, "takes away what every pod needs; add to it")
    _check_lists(merged["spec"], role.image, overlay)
    check_pod(merged, overlay.refuse)
    mine = [container for container in merged["spec"]["containers"] if container.get("name") == name]
    if not mine:
        raise overlay.refuse("spec.containers", "takes the job's own container away; change it by __join__:containers:image")
    for key, instead in BY_OPTION.items():
        lost = _lost(_at(own["spec"]["containers"][0], key), _at(mine[0], key))
        if lost:
            raise overlay.refuse(f"spec.containers: {key}", f"takes the job's own {lost} away; {instead}")


def _check_lists(spec: Dict[str, Any], image: str, overlay: Overlay) -> None:
    """Checks what the API server would refuse in containers and volumes that were added."""
    for container in spec["containers"]:
        if not container.get("name"):
            raise overlay.refuse(f"spec.containers: {container.get('image')}", f"the job has no such image; its own is {image}")
        if not container.get("image"):
            why = "has no image; each node's container has a name of its own, so write __join__:containers:image"
            raise overlay.refuse(f"spec.containers: {container['name']}", why)
    for key, by in (("containers", "image"), ("volumes", "name")):
        names = [item.get("name") for item in spec[key]]
        for name in names:
            if name and names.count(name) > 1:
                raise overlay.refuse(f"spec.{key}", f"{name} is there already; change it by __join__:{key}:{by}")
    known = [volume.get("name") for volume in spec["volumes"]]
    all_containers = [*spec["containers"], *spec.get("initContainers", [])]
    for mount in [mount for container in all_containers for mount in container.get("volumeMounts", [])]:
        if mount.get("name") not in known:
            raise overlay.refuse("spec.volumes", f"{mount.get('name')} is missing, which {mount.get('mountPath')} needs")


def _lost(own: Any, now: Any) -> str:
    """What `now` lacks of the job's own: names of entries, or the whole."""
    if isinstance(own, dict):
        return ", ".join(key for key in own if key not in (now or {}))
    if isinstance(own, list) and own and isinstance(own[0], dict):
        key = "mountPath" if "mountPath" in own[0] else "name"
        kept = [item.get(key) for item in now or []]
        return ", ".join(item[key] for item in own if item[key] not in kept)
    return "" if own == now else "words"


def _at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _local(address: str) -> str:
    """The path of a file:// address or of a plain path."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        return os.path.abspath(address) if address else address
    if scheme != "file":
        raise UserError(f"--metadata: {address}: read from files only; fetch it first, and write kubernetes=file:///path")
    return os.path.abspath(rest)


def _parsed(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=_Loader)  # a SafeLoader
    except OSError as error:
        why = f"cannot be read ({error.strerror}); name a pod's YAML file"
        raise UserError(f"--metadata: {path or 'no file named'}: {why}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({one_line(error)})") from None


class _Loader(yaml.SafeLoader):
    """YAML with TorchX's tag for a list that replaces another; a key that stands twice is refused, not passed over."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Hashable, Any]:
        """Makes a mapping. Raises YAMLError."""
        keys: List[Any] = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "!!python/tuple is for lists", node.start_mark)
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def _without_tuples(values: Any, in_list: bool = False) -> Any:
    """Writes lists that replace others (tuples) by the operator that says so."""
    if isinstance(values, (list, tuple)):
        return [_without_tuples(value, True) for value in values]
    if not isinstance(values, dict):
        return values
    replacing = {key for key, value in values.items() if isinstance(value, tuple) and isinstance(key, str)}
    named = {key: PUT(key) for key in replacing if not in_list and not key.startswith("__")}
    return {named.get(key, key): _without_tuples(value, in_list) for key, value in values.items()}
