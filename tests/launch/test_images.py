"""Images: jobs that could never start are refused before anything is submitted."""

import pytest

from fuxi_torchrec.errors import UserError
from launch.images import check_image, check_image_given
from launch.sweep import __main__ as sweep
from tests.helpers.dryrun import refused
from tests.helpers.sweeps import write_sweep

DIGEST = "sha256:" + "0123456789abcdef" * 4
GOOD = (
    "fuxi",
    "fuxi:0.1",
    "team/fuxi:V1.2-Beta_3",
    "registry.example.com/team/fuxi-torchrec:0.1",
    "Registry.Example.com/fuxi",
    "localhost/fuxi",
    "localhost:5000/fuxi:latest",
    "10.0.0.1:5000/a/b/c_d/e__f/g.h/i--j",
    "[2001:db8::1]:5000/fuxi",
    f"fuxi@{DIGEST}",
    f"registry.example.com:443/team/fuxi:0.1@{DIGEST}",
    DIGEST,
)
BAD = {
    "": "an empty name",
    "my image": "a blank in the name",
    "fuxi ": "a blank in the name",
    "Fuxi": "capitals in 'Fuxi'",
    "Team/fuxi:1": "capitals in 'Team'",
    "registry.example.com/Team/fuxi": "capitals in 'Team'",
    "fuxi:": "'' is no tag",
    "fuxi:a b": "a blank",
    "fuxi:.1": "'.1' is no tag",
    "fuxi:" + "1" * 129: "is no tag",
    "fuxi@sha256:12": "is no digest",
    "fuxi@": "is no digest",
    "https://registry.example.com/fuxi": "has no scheme",
    "registry.example.com/": "'' is no part",
    "/data/fuxi": "'' is no part",
    "a//b": "'' is no part",
    "-fuxi": "'-fuxi' is no part",
    "fuxi_": "'fuxi_' is no part",
    "a___b": "'a___b' is no part",
    "-host.com/fuxi": "'-host.com' is no host",
    "host:port/fuxi": "'host:port' is no host",
    "a" * 256: "longer than 255",
    "fuxi\n": "a blank",
    "füxi": "'füxi' is no part",
}


@pytest.mark.parametrize("image", GOOD)
def test_a_registrys_names_pass(image):
    check_image(image)


@pytest.mark.parametrize("image", BAD)
def test_any_other_name_is_refused_with_what_is_wrong(image):
    with pytest.raises(UserError) as told:
        check_image(image)
    assert BAD[image] in str(told.value) and "\n" not in str(told.value)


WORDS = {
    "train": ("--config", "configs/smoke/fuxi-beta.yaml", "--", "--data.path", "data/ml-1m"),
    "prepare": ("synthetic", "--users", "9", "--items", "9", "--events-per-user", "5", "--output", "made"),
}


@pytest.mark.parametrize("component", WORDS)
@pytest.mark.parametrize("scheduler", ["kubernetes", "local_docker"])
def test_a_scheduler_of_containers_is_given_no_job_without_an_image(here, capsys, scheduler, component):
    cfg = ("-cfg", "queue=q,validate_spec=False") if scheduler == "kubernetes" else ()
    words = ("-s", scheduler, *cfg, "--workspace", "", f"launch/components.py:{component}", *WORDS[component])
    for options in (("--dryrun",), ()):
        assert f"--image: {scheduler} runs containers" in refused((*options, *words), capsys)


def test_a_sweep_that_submits_needs_an_image_too(tmp_path, capsys):
    path = write_sweep(tmp_path, grid={"trainer.seed": 0})
    assert sweep.main([path, "--output", str(tmp_path / "out"), "--scheduler", "kubernetes"]) == 2
    assert "--image: kubernetes runs containers" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_name_is_looked_at_for_every_component(here, capsys):
    for component, words in WORDS.items():
        said = refused(("--dryrun", f"launch/components.py:{component}", "--image", "Fuxi:1", *words), capsys)
        assert "--image: 'Fuxi:1': capitals in 'Fuxi'" in said


def test_other_schedulers_need_no_image():
    for scheduler in ("local_cwd", "slurm"):
        check_image_given(None, scheduler)
