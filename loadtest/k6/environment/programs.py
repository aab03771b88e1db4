"""The programs of an environment: tidegate, loadtest, redis-server and k6."""

import os
import pathlib
import shutil
import types

from . import k6
from .process import EnvironmentFault

ROOT = pathlib.Path(__file__).resolve().parents[3]


def build_directory():
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")


def find_programs(arguments):
    """All programs that a run needs. Sets the default of `arguments.report`."""
    arguments.report = (arguments.report or build_directory() / "k6-report").resolve()
    if arguments.base_url:
        return types.SimpleNamespace(k6=k6.find_or_build(), tidegate=None, loadtest=None)
    directories = [arguments.programs] if arguments.programs else [build_directory() / it for it in ("release", "debug")]
    names = ("tidegate", "loadtest")
    for directory in directories:
        if all(os.access(directory / name, os.X_OK) for name in names):
            break
    else:
        where = " nor in ".join(map(str, directories))
        raise EnvironmentFault(f"tidegate and loadtest are not in {where}: cargo build --package gateway --package loadtest")
    if shutil.which("redis-server") is None:
        raise EnvironmentFault("redis-server is missing (Debian: apt-get install redis-server)")
    found = [str((directory / name).resolve()) for name in names]
    return types.SimpleNamespace(k6=k6.find_or_build(), tidegate=found[0], loadtest=found[1])
