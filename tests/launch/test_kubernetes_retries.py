"""Restarts and names on Kubernetes: --max_retries N is N restarts everywhere, and every derived name fits."""

import warnings

import pytest
import yaml
from torchx.runner import get_runner
from torchx.specs import AppDef, Resource, Role

from fuxi_torchrec.errors import UserError
from launch import jobs
from launch.kubernetes.names import check_names
from launch.place import Place

pytestmark = pytest.mark.thorough

RESTART = [{"event": "PodEvicted", "action": "RestartJob"}, {"event": "PodFailed", "action": "RestartJob"}]


def dryrun(app, scheduler="kubernetes", **cfg):
    with get_runner() as runner:
        return runner.dryrun(app, scheduler, {"queue": "q", "validate_spec": False, **cfg} if not cfg else cfg)


def manifest(app):
    return yaml.safe_load(str(dryrun(app)))


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_so_many_restarts_are_one_run_more_for_volcano(plugged_in, restarts):
    """It ends a job where its failed runs are maxRetry; one without restarts ends as a whole at the first failure."""
    app = jobs.application("run", Place(nnodes=2, max_retries=restarts).role("train", "x"))
    spec = manifest(app)["spec"]
    assert spec["maxRetry"] == restarts + 1
    assert [(task["maxRetry"], task["policies"]) for task in spec["tasks"]] == [(restarts + 1, RESTART)] * 2


def test_elsewhere_the_number_stays_and_the_application_keeps_it(plugged_in, monkeypatch):
    app = jobs.application("run", Place(max_retries=2).role("train", "x"))
    assert dryrun(app).app.roles[0].max_retries == app.roles[0].max_retries == 2
    monkeypatch.setattr("torchx.schedulers.slurm_scheduler.version", lambda: (24, 11))
    assert "TORCHX_MAX_RETRIES=2\n" in dryrun(app, "slurm", partition="p").request.materialize()


def test_other_peoples_applications_keep_volcanos_meaning(plugged_in):
    role = Role("r", "i", entrypoint="x", max_retries=2, resource=Resource(1, 0, 1))
    assert manifest(AppDef("a", [role]))["spec"]["maxRetry"] == 2


def test_torchx_warning_on_volcanos_retries_is_silent_and_no_other(plugged_in, monkeypatch):
    from launch.kubernetes import scheduler

    app = jobs.application("run", Place(max_retries=2).role("train", "x"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dryrun(app)
    made = scheduler.TorchXScheduler._submit_dryrun
    monkeypatch.setattr(
        scheduler.TorchXScheduler, "_submit_dryrun", lambda *given: warnings.warn("another", stacklevel=1) or made(*given)
    )
    with pytest.warns(UserWarning, match="another"):
        dryrun(app)


LONG = "runs/ml-20m-fuxi-beta-large-with-a-rather-long-name-2026-11-25"


@pytest.mark.parametrize("path", [LONG, "/data/runs/0123456789012345678901234567890123456789", "x-" * 40, "-", "7"])
def test_all_that_the_cluster_names_after_a_job_fits(plugged_in, path):
    """Pods are JOB-ROLE-NODE-0, on any number of nodes; the config map is JOB-svc. TorchX adds at most 15 characters."""
    name = jobs.application(path, Place().role("evaluate", "x")).name
    unique = f"{name}-{'x' * 14}"
    assert len(f"{unique}-evaluate-99999-0") <= 63 and len(f"{unique}-svc") <= 63
    assert name[0].isalpha() and name[-1].isalnum() and len(name) <= 28


def test_a_name_that_fits_three_nodes_and_not_a_thousand_is_noticed():
    job = {"metadata": {"name": "n" * 52}, "spec": {"tasks": [{"name": "train-2"}]}}
    check_names(job)
    with pytest.raises(UserError, match="-train-1000-0: a pod's name may have 63 characters, this has 65"):
        check_names({**job, "spec": {"tasks": [{"name": "train-2"}, {"name": "train-1000"}]}})


def test_longer_names_of_pods_are_refused_without_a_server_too(plugged_in):
    app = AppDef("a" * 32, [Role("evaluate-everything", "i", entrypoint="x", resource=Resource(1, 0, 1))])
    with pytest.raises(UserError, match="a pod's name may have 63 characters"):
        dryrun(app)
