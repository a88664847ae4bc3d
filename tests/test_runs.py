"""Tests of how the tests start the program."""

from __future__ import annotations

from pathlib import Path

import psutil

import runs

PROGRAM = """
import subprocess, sys
child = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
input()
"""


def test_child_in_another_group_is_killed_and_keeps_no_pipe_open(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = runs.start(program=(str(program),))
    assert process.stdout
    child = psutil.Process(int(process.stdout.readline()))
    runs.end_started()
    assert not psutil.wait_procs([child], timeout=runs.LIMIT)[1]
