"""All steps as one job of one node, which runs them in turn: a chain where jobs cannot wait for each other (Kubernetes)."""

import inspect
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Dict, List

from torchx.specs import AppDef

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from launch.chain.here import refuse_several_nodes
from launch.chain.steps import Step
from launch.environment import interpreter, quoted

if TYPE_CHECKING:
    from torchx.runner import Runner

# What says where a job runs is the pod's; the steps in it get the rest.
OF_THE_POD = ("nnodes", "memMB", "devices", "image", "mounts", "env", "metadata", "max_retries", "rdzv_port", "resume")
# What all steps have in common where they share a pod.
ALIKE = ("image", "mounts", "env", "metadata")


def pod(steps: List[Step]) -> AppDef:
    """Makes the job. Its node is train's, or that of the last step where the chain trains nothing. Raises UserError for
    a step that cannot run, or not in the same pod."""
    for step in steps:
        if step.place.image is None:
            raise UserError(f"{step.name}: --image: name the image to run in, behind the chain's file for all steps")
    main = next((step for step in steps if step.name == "train"), steps[-1])
    apps: Dict[str, AppDef] = {}
    for step in steps:
        step.after = list(apps)
        apps[step.name] = step.app()
        how = "a chain is one pod here; prepare first, then submit train alone by torchx run"
        refuse_several_nodes(step, apps[step.name], how)
        for name in ALIKE:
            if step.options.get(name) != main.options.get(name):
                how = f"give --{name} once for all steps, behind the chain's file or as its key all"
                raise UserError(f"{step.name}: --{name} is not {main.name}'s, but both run in one pod; {how}")
    words = [f"--{step.name}={shlex.join(words_of(step))}" for step in steps]
    command = "exec " + quoted([interpreter(main.place.image), "-m", "launch.chain", "-s", "local_cwd", *words])
    return replace(apps[main.name], roles=[main.place.role("chain", command)])


def submit_pod(steps: List[Step], runner: "Runner", cfg: JsonObject, workspace: str, dryrun: bool) -> int:
    """Submits the job, or prints what would be submitted. Returns 0. Raises UserError."""
    request = runner.dryrun(pod(steps), "kubernetes", cfg=cfg, workspace=workspace or None)
    if dryrun:
        print(request)
        return 0
    handle = runner.schedule(request)
    print(f"chain     {handle}")
    print(f"watch     torchx log --tail {handle}/chain; torchx status {handle}")
    print(f"stop      torchx cancel {handle}")
    print("go on     the same command, when the job has ended; what is done stays")
    return 0


def words_of(step: Step) -> List[str]:
    """Writes a step's arguments as words again, without those of the pod."""
    parameters = inspect.signature(step.component).parameters
    words: List[Any] = []
    for name, value in step.options.items():
        if name not in OF_THE_POD and value != parameters[name].default:
            words += [f"-{name}" if len(name) == 1 else f"--{name}", value]
    return [*map(str, words), *([] if step.name == "prepare" else ["--"]), *step.words]
