"""The options of a command line, with those of the session that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import models
from lib.config import parser
from lib.config.options import Options
from lib.errors import UsageError
from lib.session.locate import folder_of, latest, locate


def resolve(argv: Sequence[str]) -> Options:
    """The options. A run that is resumed without ``--cfgs``, and a report, have the session's options as defaults.

    Raises:
        UsageError: an option that is not known, or a value that it cannot have.
    """
    options = parser.read_options(argv)
    if isinstance(options.report, Path):
        folder = options.report
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"{folder}: is no session's folder; pass --report one that holds config.yaml")
        if not latest(folder).is_file():
            raise UsageError(f"{folder}: has no checkpoint; a report can be made when the run's first epoch is done")
        options = parser.read_options([*argv, "--resume", str(folder)], base=folder / "config.yaml")
    elif options.resume and not options.cfgs and (session := folder_of(locate(options.resume))):
        options = parser.read_options(argv, base=session / "config.yaml")
    if not options.compare:
        parser.choose(datasets.DATASETS, options.dataset, "--dataset")
        parser.choose(models.NETWORKS, options.network, "--network")
    return options
