"""Every key of a run's configuration (schema), what goes together (rules), YAML in and out (parsing). No torch here."""

from fuxi_torchrec.config.schema import *  # noqa: F403
