"""All components look before anything is submitted: at options, at what is read, and at where things are written."""

from pathlib import Path

import pytest
from torchx.specs.builders import materialize_appdef

from fuxi_torchrec.config.parsing import load_config, to_yaml
from launch import components
from tests.helpers.sweeps import write_sweep

IMAGE = ("--image", "registry.example.com/team/fuxi:0.1")
MOUNT = ("--mounts", "type=volume,src=training,dst=/data")
READONLY = ("--mounts", "type=volume,src=training,dst=/data,readonly")
NESTED = ("--mounts", "type=volume,src=a,dst=/data,type=volume,src=b,dst=/data/raw/,readonly")
INSIDE = (*IMAGE, *MOUNT)

SMOKE = ("--config", "configs/smoke/fuxi-beta.yaml")
DATA = ("--data.path", "/data/ml-1m")
EVENTS = ("events", "--user-column", "u", "--item-column", "i", "--time-column", "t")
SYNTHETIC = ("synthetic", "--users", "9", "--items", "9", "--events-per-user", "5")

MISTAKES = {
    # what is written inside an image
    "train onto a readonly mount": (
        ("train", *SMOKE, *IMAGE, *READONLY, "--output", "/data/run", "--", *DATA), "/data is mounted readonly"),
    "train out of the mount": (
        ("train", *SMOKE, *INSIDE, "--output", "/data/../tmp/a", "--", *DATA), "--output: /tmp/a would be lost"),
    "train beside the mount": (
        ("train", *SMOKE, *INSIDE, "--output", "/data2/a", "--", *DATA), "--output: /data2/a would be lost"),
    "train onto a readonly mount within another": (
        ("train", *SMOKE, *IMAGE, *NESTED, "--output", "/data/raw/x", "--", *DATA), "/data/raw is mounted readonly"),
    "train's output relative": (
        ("train", *SMOKE, *INSIDE, "--output", "runs/a", "--", *DATA), "--output: runs/a: inside an image"),
    "train's data relative": (
        ("train", *SMOKE, *INSIDE, "--output", "/data/a", "--", "--data.path", "data/ml-1m"), "data.path: data/ml-1m: inside"),
    "train's checkpoints relative": (
        ("train", *SMOKE, *INSIDE, "--output", "/data/a", "--", *DATA, "--trainer.checkpoint_folder", "kept"),
        "trainer.checkpoint_folder: kept: inside"),
    "train's checkpoints lost": (
        ("train", *SMOKE, *INSIDE, "--output", "/data/a", "--", *DATA, "--trainer.checkpoint_folder", "/kept"),
        "trainer.checkpoint_folder: /kept would be lost"),
    "prepare without a mount": (("prepare", *IMAGE, *SYNTHETIC, "--output", "/data/x"), "mounted into it is nothing"),
    "prepare's output relative": (("prepare", *INSIDE, *SYNTHETIC, "--output", "made"), "--output: made: inside an image"),
    "prepare onto a readonly mount": (
        ("prepare", *IMAGE, *READONLY, *SYNTHETIC, "--output", "/data/x"), "/data is mounted readonly"),
    "prepare's source relative": (
        ("prepare", *INSIDE, *EVENTS, "--source", "/data/a.csv", "b.csv", "--output", "/data/x"), "--source: b.csv: inside"),
    "prepare's titles relative": (
        ("prepare", *INSIDE, *EVENTS, "--source=/data/a.csv", "--item_titles=t.csv", "--output", "/data/x"),
        "--item-titles: t.csv: inside"),
    "evaluate's run relative": (("evaluate", *INSIDE, "--run", "runs/a"), "--run: runs/a: inside an image"),
    "evaluate's run on no mount": (("evaluate", *INSIDE, "--run", "/data/../runs/a"), "--run: /runs/a would be lost"),
    "evaluate's output lost": (
        ("evaluate", *INSIDE, "--run", "/data/a", "--", "--output", "/tmp/m.json"), "--output: /tmp/m.json would be lost"),
    "evaluate's data relative": (
        ("evaluate", *INSIDE, "--run", "/data/a", "--", "--data.path=d"), "--data.path: d: inside an image"),
    "evaluate on a GPU without one": (
        ("evaluate", *INSIDE, "--run", "/data/a", "--", "--device", "cuda"), "--device: cuda, but no GPU"),
    "sweep without an output": (("sweep", *INSIDE, "--config", "sweep.yaml"), "--output: name a full path inside the image"),
    "sweep's output lost": (
        ("sweep", *INSIDE, "--config", "sweep.yaml", "--", "--output", "/x"), "--output: /x would be lost"),
    "sweep's data relative": (
        ("sweep", *INSIDE, "--config", "sweep.yaml", "--", "--output", "/data/s"), "data.path: data/ml-1m: inside an image"),
    # mounts
    "the same folder with a slash": (
        ("train", *SMOKE, *IMAGE, "--mounts", "type=volume,src=a,dst=/data,type=volume,src=b,dst=/data/"), "mounted twice"),
    "shared memory with a slash": (
        ("prepare", "--mounts", "type=bind,src=/a,dst=//dev/shm/", *SYNTHETIC, "--output", "x"), "/dev/shm"),
    "a mount with dots": (("train", *SMOKE, "--mounts", "type=volume,src=a,dst=/data/../b"), "without '..'"),
    "a relative mount": (("train", *SMOKE, "--mounts", "type=volume,src=a,dst=data"), "dst=data: name a full path"),
    "a mount over the image": (("train", *SMOKE, "--mounts", "type=volume,src=a,dst=/"), "would hide the whole image"),
    "a relative folder of the host": (("train", *SMOKE, "--mounts", "type=bind,src=a,dst=/data"), "src=a: name a full path"),
    "a folder as a claim": (("train", *SMOKE, "--mounts", "type=volume,src=/a,dst=/data"), "src=/a is no name of a volume"),
    "a mount without a place": (("train", *SMOKE, "--mounts", "type=volume,src=a"), "dst is missing"),
    "readonly that is not": (("train", *SMOKE, "--mounts", "type=volume,src=a,dst=/d,readonly=false"), "write readonly alone"),
    # what is seen from here
    "evaluate's unknown option": (("evaluate", "--run", "run", "--", "--splits", "test"), "--splits"),
    "evaluate's further word": (("evaluate", "--run", "run", "--", "test"), "test"),
    "evaluate's wrong split": (("evaluate", "--run", "run", "--", "--split", "train"), "--split train: this run's data.split"),
    "evaluate's wrong device": (("evaluate", "--run", "run", "--", "--device", "tpu"), "trainer.device"),
    "evaluate's run missing": (("evaluate", "--run", "none"), "none: no run here"),
    "evaluate's run without a checkpoint": (("evaluate", "--run", "begun"), "no checkpoint here; train the run first"),
    "evaluate's checkpoint missing": (("evaluate", "--run", "run", "--", "--checkpoint", "step-9"), "step-9: not in"),
    "evaluate's data missing": (("evaluate", "--run", "run", "--", "--data.path", "configs"), "configs: no data set here"),
    "evaluate's output unwritable": (
        ("evaluate", "--run", "run", "--", "--output", "/proc/m.json"), "--output: /proc/m.json: cannot be written"),
    "train's checkpoints unwritable": (
        ("train", *SMOKE, "--", "--data.path", "data/ml-1m", "--trainer.checkpoint_folder", "/proc/kept"),
        "trainer.checkpoint_folder: /proc/kept: cannot be written"),
    "prepare's source missing": (("prepare", "movielens", "--source", "ml.zip", "--output", "x"), "ml.zip: no such file"),
    "prepare's titles missing": (
        ("prepare", *EVENTS, "--source", "configs/*/*.yaml", "--item-titles", "t", "--output", "x"), "/t: no such file"),
    "prepare's unknown option": (("prepare", *SYNTHETIC, "--output", "x", "--user", "3"), "--user"),
    "prepare onto a data set": (("prepare", *SYNTHETIC, "--output", "data/ml-1m"), "a data set is there already"),
    "prepare where nothing can be": (("prepare", *SYNTHETIC, "--output", "/proc/x"), "--output: /proc/x: cannot be written"),
    "sweep's unknown option": (("sweep", "--config", "sweep.yaml", "--", "--concurency", "2"), "--concurency"),
    "sweep's wrong value": (("sweep", "--config", "sweep.yaml", "--", "--concurrency", "0"), "--concurrency: 0 is too small"),
    "sweep's wrong place": (("sweep", "--config", "sweep.yaml", "--", "--nnodes", "0"), "--nnodes: 0 is too small"),
    "sweep's unknown scheduler": (("sweep", "--config", "sweep.yaml", "--", "--scheduler", "slurp"), "--scheduler: slurp"),
    "sweep's output unwritable": (
        ("sweep", "--config", "sweep.yaml", "--", "--output", "/proc/s"), "--output: /proc/s: cannot be written"),
    "sweep's unknown key": (("sweep", "--config", "wrong.yaml"), "unknown key model.width"),
    "sweep's data missing": (("sweep", "--config", "nodata.yaml"), "no data set here"),
    "sweep's pipeline wrong": (("sweep", "--config", "pipeline.yaml"), "required: --users"),
    "sweep's config missing": (("sweep", "--config", "none.yaml"), "none.yaml: no such sweep config"),
}  # fmt: skip


@pytest.fixture
def there(here):
    """The folder of `here` with a run that was trained, one that has begun, and sweeps."""
    config = load_config(SMOKE[1], ["--data.path", str(here / "data" / "ml-1m")])
    for name in ("run", "begun"):
        (here / name).mkdir()
        (here / name / "config.yaml").write_text(to_yaml(config))
    (here / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name, values in (
        ("wrong", {"grid": {"model.width": 1}}),
        ("nodata", {"grid": {"data.path": ["data/ml-1m", "configs"]}}),
        ("pipeline", {"grid": {"data.path": "made"}, "prepare": {"made": "synthetic --items 3"}}),
        ("sweep", {"grid": {"data.path": "data/ml-1m"}}),  # the name that they are written by
    ):
        Path(write_sweep(here, **values)).rename(here / f"{name}.yaml")
    return here


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_submitted(there, capsys, mistake):
    (component, *words), says = MISTAKES[mistake]
    before = names(there)
    with pytest.raises(SystemExit) as ended:
        materialize_appdef(getattr(components, component), words)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert says in said[0] and names(there) == before


def script(app):
    (role,) = app.roles
    return role.args[-1]


IN = {"image": IMAGE[1], "mounts": MOUNT[1].split(",")}


def test_inside_an_image_paths_are_passed_on_in_their_normal_form(there):
    train = components.train("--data.path", "/data//d/", config=SMOKE[1], output="/data/./runs/x/", **IN)
    assert "--output /data/runs/x " in script(train) and "--data.path /data/d" in script(train)
    assert "--output /data " in script(components.train(*DATA, config=SMOKE[1], output="/data", **IN))
    bucket = ("--data.path", "s3://b/d", "--trainer.checkpoint_folder", "s3://b/c")
    assert "--data.path s3://b/d --trainer.checkpoint_folder s3://b/c" in script(
        components.train(*bucket, config=SMOKE[1], output="/data/x", **IN)
    )
    prepare = components.prepare(*EVENTS, "--source", "/data/a//b.csv", "s3://b/c.csv", "--output", "/data/x/", **IN)
    assert "--source /data/a/b.csv s3://b/c.csv --output /data/x" in script(prepare)
    evaluate = components.evaluate("--output", "/data/m.json", run="/data/./x", **IN)
    assert script(evaluate).endswith("evaluate /data/x --output /data/m.json")
    readonly = {**IN, "mounts": READONLY[1].split(",")}
    assert script(components.evaluate(run="/data/x", **readonly)).endswith("evaluate /data/x")


def test_a_writable_mount_within_a_readonly_one_takes_the_run(there):
    mounts = "type=volume,src=a,dst=/data,readonly,type=volume,src=b,dst=/data/runs".split(",")
    train = components.train(*DATA, config=SMOKE[1], output="/data/runs/x", image=IMAGE[1], mounts=mounts)
    assert "--output /data/runs/x " in script(train)


def test_evaluate_and_sweep_are_told_full_paths_and_a_sweep_its_folder(there):
    evaluate = components.evaluate("--data.path=data/ml-1m", "--output", "m.json", "--device", "cpu", run="run")
    assert f"evaluate {there}/run --data.path={there}/data/ml-1m --output {there}/m.json --device cpu" in script(evaluate)
    assert f"launch.sweep sweep.yaml --output {there}/runs/sweep --concurrency 2" in script(
        components.sweep("--concurrency", "2", config="sweep.yaml")
    )
    assert f"--output {there}/mine" in script(components.sweep("--output", "mine", config="sweep.yaml"))


def test_what_a_sweep_prepares_need_not_be_there(there):
    prepare = {"made": "synthetic --users 9 --items 9 --events-per-user 5"}
    config = write_sweep(there, grid={"data.path": ["made", "data/ml-1m"]}, prepare=prepare)
    assert "launch.sweep" in script(components.sweep(config=config))
