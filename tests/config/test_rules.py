"""What a configuration is refused for, key by key: in `rules` alone, before anything is built."""

import math
from dataclasses import replace

import pytest

from fuxi_torchrec.config import Config, ModelConfig, config_keys
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.errors import UserError


def changed(key, value):
    """The default config with one key changed."""
    section, name = key.split(".")
    config = Config()
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize(
    "changes, key",
    [
        (dict(channels=[]), "channels"),
        (dict(channels=["positional", "positional"]), "channels"),
        (dict(channels=["temporal", "bucketed_temporal"]), "channels"),
        (dict(encoder="hstu", channels=["positional"]), "channels"),
        (dict(encoder="sasrec", num_heads=3), "num_heads"),
        (dict(num_blocks=0), "num_blocks"),
        (dict(dropout=1.0), "dropout"),
        (dict(ffn_multiply=0.01), "ffn_multiply"),
        (dict(ffn_multiply=0.0, encoder="sasrec"), "ffn_multiply"),
    ],
)
def test_sizes_of_a_model_that_do_not_fit_are_named(changes, key):
    with pytest.raises(UserError, match=f"model.{key}"):
        check(Config(model=ModelConfig(**changes)))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("loss.sampling_alpha", 400.0, "must be at most 8"),
        ("model.mixing_tolerance", 0.0, "must be at least 1e-12"),
        ("model.mixing_tolerance", -1.0, "must be at least 1e-12"),
        ("trainer.seed", 10**23, "must be at most 18446744073709551615"),
        ("trainer.timeout_minutes", 1e300, "must be at most 525600"),
        ("optimizer.betas", (0.9, 1.0), "must be less than 1"),
        ("data.temporal_cutoffs", [2**63], "must be at most 9223372036854775807"),
        ("table.hbm_gb", 0.0, "must be greater than 0; null takes the default"),
    ],
)
def test_a_number_outside_of_its_bounds_is_named_with_the_bound(key, value, says):
    with pytest.raises(UserError, match=f"^{key}: .* {says}"):
        check(changed(key, value))


NUMBERS = [name for name, key in config_keys().items() if any(word in str(key.type) for word in ("int", "float"))]


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds_that_no_infinite_and_no_huge_one_passes(key):
    is_list = isinstance(getattr(getattr(Config(), key.split(".")[0]), key.split(".")[1]), tuple) or "cutoffs" in key
    for number in (math.nan, math.inf, -math.inf, -(10**400)):
        with pytest.raises(UserError, match=f"^{key}: .*must be"):
            check(changed(key, [number, number] if is_list else number))


@pytest.mark.parametrize("key", [name for name in config_keys() if name.split(".")[1] in ("path", "checkpoint_folder")])
def test_a_path_with_a_control_character_is_refused(key):
    for character in "\0\n\x1b":
        with pytest.raises(UserError, match=f"^{key}: .*cannot be printed"):
            check(changed(key, f"runs{character}"))
