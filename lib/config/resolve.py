"""Combines the command line with the options of the session that it names."""

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
    """Parses a command line. The session's options are the defaults of ``--report FOLDER``, and of ``--resume``
    without ``--cfgs``.

    Raises:
        UsageError: an option or name is unknown, a value is invalid, or the session or checkpoint is missing.
    """
    options = parser.read_options(argv)
    if isinstance(options.report, Path):
        folder = options.report
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"{folder}: not a session folder: it has no config.yaml; give --report a session folder")
        if not latest(folder).is_file():
            raise UsageError(f"{folder}: has no checkpoint yet; wait until the first epoch of the run is complete")
        options = parser.read_options([*argv, "--resume", str(folder)], base=folder / "config.yaml")
    elif options.resume and not options.cfgs and (session := folder_of(locate(options.resume))):
        options = parser.read_options(argv, base=session / "config.yaml")
    if not options.compare:
        check_names(options)
    return options


def check_names(options: Options) -> None:
    """Raises UsageError unless the data set and the network are known. The names of a package are checked later."""
    parser.choose(datasets.DATASETS, options.dataset, "--dataset")
    if not models.package_of(options.network):  # which knows its names, and takes seconds to import
        named = {**models.NETWORKS, **{f"{package}/NAME": None for package in models.PACKAGES}}
        parser.choose(named, options.network, "--network")
