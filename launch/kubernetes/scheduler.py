"""TorchX's scheduler `kubernetes`, registered in its place (setup.py: torchx.schedulers).

It submits what TorchX submits, and differs in this: `--max_retries` of this project's components counts restarts; what the
server answers is told in its own words; a submission is known to have happened or not; names are always checked; the
namespace is the current one.
"""

import sys
import warnings
from dataclasses import replace
from datetime import datetime
from typing import Any, Iterable, List, Mapping, Optional, Set

from kubernetes import client, config
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Stream
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, Opts
from torchx.schedulers.kubernetes_scheduler import KubernetesScheduler as TorchXScheduler
from torchx.specs import AppDef, AppDryRunInfo, AppState, CfgVal, runopts

from fuxi_torchrec.errors import UserError
from launch.kubernetes.answers import told
from launch.kubernetes.names import check_names
from launch.kubernetes.namespace import current_namespace
from launch.kubernetes.retries import counted_as_runs
from launch.kubernetes.submission import submit, validate


class StatusUnknown(UserError):
    """Raised where a job that was submitted cannot be looked at. Its exit code is that of a job that failed, not that of
    a mistake: the job is there."""

    code = 1


class KubernetesScheduler(TorchXScheduler):
    """TorchX's scheduler of Volcano jobs; what fails is a UserError of one line."""

    def __init__(self, session_name: str, client: Any = None, docker_client: Any = None):
        super().__init__(session_name, client, docker_client)
        self._client: Any = client
        self._unseen: Set[str] = set()  # submitted here, not looked at since

    def schedule(self, dryrun_info: AppDryRunInfo[KubernetesJob, Opts]) -> str:
        """Submits the job; returns NAMESPACE:JOB. Raises UserError."""
        self.push_images(dryrun_info.request.images_to_push)
        job = dryrun_info.request.resource
        with told("nothing was submitted"):
            submit(self._custom_objects_api(), job)
        app_id = f"{job['metadata']['namespace']}:{job['metadata']['name']}"
        self._unseen.add(app_id)
        return app_id

    def describe(self, app_id: str) -> Optional[DescribeAppResponse]:
        """Returns the job's state; None where there is none, and at the first look at a job that was just submitted where
        that fails: to submit has succeeded by then. Raises UserError."""
        first = app_id in self._unseen
        self._unseen.discard(app_id)
        namespace, _, name = app_id.partition(":")
        try:
            with told(f"the status of job {name} in namespace {namespace} is not known"):
                return super().describe(app_id)
        except UserError as error:
            if not first:
                raise StatusUnknown(str(error)) from None
            print(f"the job is submitted: {app_id}. {error}", file=sys.stderr)
            return None
        except KeyError:  # a job that Volcano has not looked at yet: TorchX expects a state in it
            return DescribeAppResponse(app_id, AppState.UNKNOWN)

    def list(self, cfg: Optional[Mapping[str, CfgVal]] = None) -> List[ListAppResponse]:
        """Lists the namespace's jobs. Raises UserError."""
        namespace = (cfg or {}).get("namespace") or current_namespace()
        with told(f"namespace {namespace}"):
            return super().list({**(cfg or {}), "namespace": namespace})

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: Optional[str] = None,
        since: Optional[datetime] = None,
        until: Optional[datetime] = None,
        should_tail: bool = False,
        streams: Optional[Stream] = None,
    ) -> Iterable[str]:
        """Yields a pod's lines. Raises UserError."""
        with told(f"no log of {role_name}/{k}"):
            yield from super().log_iter(app_id, role_name, k, regex, since, until, should_tail, streams)

    def _submit_dryrun(self, app: AppDef, cfg: Opts) -> AppDryRunInfo[KubernetesJob, Opts]:
        with counted_as_runs(app), warnings.catch_warnings():
            # Of 2021: Volcano restarts the pods of a failed job since, and its count is looked after here.
            warnings.filterwarnings("ignore", r"\s*Role .* configured with restarts", UserWarning)
            made = super()._submit_dryrun(app, replace(cfg, validate_spec=False))
        job = made.request.resource
        job["metadata"]["namespace"] = cfg.namespace
        check_names(job)
        if cfg.validate_spec:
            with told("nothing was submitted", "use --dryrun -cfg validate_spec=False,…"):
                validate(self._custom_objects_api(), job)
        return made

    def _cancel_existing(self, app_id: str) -> None:
        with told("nothing was cancelled"):
            super()._cancel_existing(app_id)

    def _delete_existing(self, app_id: str) -> None:
        with told("nothing was deleted"):
            super()._delete_existing(app_id)

    def _resolve_cfg(self, cfg: Any) -> Opts:
        options = super()._resolve_cfg(cfg)
        options.namespace = options.namespace or current_namespace()
        return options

    def _run_opts(self) -> runopts:
        options = super()._run_opts()
        told_of_it = "Namespace of the job. Left out: the kubeconfig context's; inside a pod, its service account's."
        options.add("namespace", type_=str, default=None, help=told_of_it)
        return options

    def _api_client(self) -> client.ApiClient:
        if self._client is None:
            configuration = client.Configuration()
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                _load_kubeconfig(configuration)
            self._client = client.ApiClient(configuration)
        return self._client


def _load_kubeconfig(configuration: client.Configuration) -> None:
    """Raises ConfigException, for a file too that is YAML and no kubeconfig."""
    try:
        config.load_kube_config(client_configuration=configuration)
    except (TypeError, AttributeError) as error:
        raise config.ConfigException(f"the kubeconfig is none: {error}") from error


def create_scheduler(
    session_name: str, client: Any = None, docker_client: Any = None, **others: Any
) -> KubernetesScheduler:
    """Makes the scheduler, as TorchX's plugins do."""
    return KubernetesScheduler(session_name, client, docker_client)
