"""TorchX's Slurm scheduler, which submits an elastic job (--nnodes MIN:MAX) as an array of one-node jobs.

TorchX makes one heterogeneous job of several nodes. Slurm ends or requeues all of its parts with any one's node, whatever
--no-kill says, since each part has one node; and a job of several nodes with --no-kill goes on without a lost node, but never
gets another. Of an array Slurm requeues the one element whose node is lost, and starts it on the next free node, where
torchrun joins the others again. (Slurm 24.11; docs/elastic.md)

The installed package registers it under TorchX's own name, slurm; all other jobs are submitted as before.
"""

import subprocess
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import (
    SlurmBatchRequest,
    SlurmOpts,
    SlurmReplicaRequest,
    SlurmScheduler,
    appstate_from_slurm_state,
)
from torchx.specs import AppDef, AppDryRunInfo, AppState, ReplicaStatus, Role, RoleStatus, macros

from launch.environment import JOIN_SECONDS

LOOK_SECONDS = 5
SCRIPT = """#!/bin/bash
#SBATCH {sbatch}

export PYTHONUNBUFFERED=1
export SLURM_UNBUFFEREDIO=1
export TORCHX_MAX_RETRIES={max_retries}

# The nodes meet where element 0 runs; it may have been started again elsewhere.
state=RUNNING FIRST_NODE=$SLURMD_NODENAME
for ((waited = 0; SLURM_ARRAY_TASK_ID > 0; waited += {look})); do
    read -r state FIRST_NODE < <(squeue --noheader --states all --jobs "${{SLURM_ARRAY_JOB_ID}}_0" --format "%T %N")
    case $state in
    RUNNING) break ;;
    COMPLETED | FAILED | CANCELLED | TIMEOUT | DEADLINE | OUT_OF_MEMORY) echo "the job is over: $state" && exit 0 ;;
    esac
    [ $waited -lt {join} ] || break
    sleep {look}
done
export FIRST_NODE

exitcode=1
if [ "$state" = RUNNING ]; then
    srun {srun}
    exitcode=$?
fi

echo "element $SLURM_ARRAY_TASK_ID exited with code $exitcode"
if [ $exitcode -ne 0 ]; then
    if [ "$TORCHX_MAX_RETRIES" -gt "${{SLURM_RESTART_COUNT:-0}}" ]; then
        # By its number in the array: the last element's own id is the array's, and would requeue all of it.
        scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    fi
    exit $exitcode
fi
# Trained to the end: elements that still wait for a node are not needed any more.
scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
"""


@dataclass(repr=False)
class ArrayRequest(SlurmBatchRequest):
    """An sbatch of an array whose elements all run one replica."""

    replica: Optional[SlurmReplicaRequest] = field(default=None, kw_only=True)

    def materialize(self) -> str:
        """Writes the batch script."""
        assert self.replica is not None
        sbatch, srun = self.replica.materialize()
        # The array's id is the job's; each element has an id of its own besides.
        words = " ".join(srun).replace("$SLURM_JOB_ID", "$SLURM_ARRAY_JOB_ID")
        places = {"max_retries": self.max_retries, "join": JOIN_SECONDS, "look": LOOK_SECONDS}
        return SCRIPT.format(sbatch=" ".join(sbatch), srun=words, **places)


class ElasticSlurmScheduler(SlurmScheduler):
    """TorchX's Slurm scheduler, with elastic jobs as arrays."""

    def _submit_dryrun(self, app: AppDef, cfg: SlurmOpts) -> AppDryRunInfo[SlurmBatchRequest, SlurmOpts]:
        made = super()._submit_dryrun(app, cfg)
        (role, *others), request = app.roles, made.request
        if role.min_replicas is None or others:
            return made
        elements = ArrayRequest(
            cmd=request.cmd,
            replicas={},
            job_dir=request.job_dir,
            max_retries=request.max_retries,
            images_to_push=request.images_to_push,
            replica=_element(role, next(iter(request.replicas.values()))),
        )
        return AppDryRunInfo(elements, repr)

    def describe(self, app_id: str) -> Optional[DescribeAppResponse]:
        """Returns a job's state, None where Slurm knows none; of an array the state of its elements together."""
        states = _element_states(app_id)
        if not states:
            return super().describe(app_id)
        role = _job_name(app_id)
        replicas = [ReplicaStatus(id=index, role=role, state=states[index], hostname="") for index in sorted(states)]
        return DescribeAppResponse(
            app_id=app_id,
            roles=[Role(name=role, image="", num_replicas=len(replicas))],
            roles_statuses=[RoleStatus(role, replicas)],
            state=_together(list(states.values())),
        )


def create_scheduler(session_name: str, **options: Any) -> ElasticSlurmScheduler:
    """Makes the scheduler; TorchX calls it."""
    return ElasticSlurmScheduler(session_name, docker_client=options.get("docker_client"))


def _element(role: Role, first: SlurmReplicaRequest) -> SlurmReplicaRequest:
    """What each element runs: the first replica's options, with what differs between elements left to its shell."""
    values = macros.Values(
        img_root=role.image, app_id=macros.app_id, replica_id="$SLURM_ARRAY_TASK_ID", rank0_env="FIRST_NODE"
    )
    own = values.apply(role)
    array = {"array": f"0-{role.num_replicas - 1}", "nodes": "1", "open-mode": "append"}
    # Where `torchx log` looks for them. A start that follows another goes on in its files.
    files = {"output": f"slurm-%A-{role.name}-%a.out", "error": f"slurm-%A-{role.name}-%a.err", "open-mode": "append"}
    return replace(
        first,
        name=role.name,
        args=list(own.args),
        env=dict(own.env),
        sbatch_opts={**array, **first.sbatch_opts},
        srun_opts={**first.srun_opts, **files},
    )


def _element_states(app_id: str) -> Dict[int, AppState]:
    """The state of every element of an array, {} for a job that is none. squeue knows the present, sacct (where there is
    accounting) what is over."""
    states: Dict[int, AppState] = {}
    for command in (
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format", "JobID,State", "--jobs", app_id],
        ["squeue", "--noheader", "--array", "--states", "all", "--format", "%i|%T", "--jobs", app_id],
    ):
        for line in _lines(command):
            job, _, state = line.partition("|")
            array, _, index = job.partition("_")
            if array == app_id and index.isdigit():
                states[int(index)] = appstate_from_slurm_state(state.split()[0].rstrip("+"))
    return states


def _job_name(app_id: str) -> str:
    names = _lines(["squeue", "--noheader", "--states", "all", "--format", "%j", "--jobs", app_id])
    names = names or _lines(["sacct", "--noheader", "--parsable2", "--allocations", "--format", "JobName", "--jobs", app_id])
    return names[0] if names else ""


def _lines(command: List[str]) -> List[str]:
    """What a command of Slurm's prints; nothing where it fails, as for jobs that it has forgotten, or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except FileNotFoundError:
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _together(states: List[AppState]) -> AppState:
    """The state of a job by its elements': a lost element is none that failed, where another trained to the end."""
    order = (AppState.RUNNING, AppState.PENDING, AppState.SUCCEEDED, AppState.CANCELLED, AppState.FAILED)
    return next((state for state in order if state in states), AppState.UNKNOWN)
