"""Processes of a gloo process group for tests, which are started once and then run one function after another."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from numpy.testing import assert_allclose

from lib.distributed.processes import Ranks
from runs import LIMIT

GRACE = 20
"""Seconds that the other processes may take to reply after one failed: they may hang in a collective."""


class Team:
    """G processes. After a failure all are restarted, since some may hang in a collective.

    Args:
        size: G.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            environment = {"RANK": rank, "WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=_serve, args=(environment, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the pipe closes when the process ends
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The return values of ``work(ranks, *arguments)`` of all processes; fails if one of them fails."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((work, arguments))
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        limit = LIMIT
        while len(answers) + len(errors) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers | errors}
            ready = wait(list(waiting), timeout=limit)
            for pipe in ready:
                try:
                    error, answer = pipe.recv()
                except EOFError:
                    error, answer = f"process {waiting[pipe]} died", None
                (errors if error else answers)[waiting[pipe]] = error or answer
            if errors:
                limit = GRACE
            if not ready:
                errors |= {rank: f"process {rank} did not reply" for rank in waiting.values()}
        if errors:
            self.close()
        assert not errors, "\n".join(errors.values())
        return [answers[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(environment: dict[str, Any], pipe: Connection) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  # gloo prints messages when a process ends
    ranks = Ranks.from_environment()
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send((None, work(ranks, *copy.deepcopy(arguments))))  # tensors arrive in shared memory
        except BaseException:
            pipe.send((f"process {ranks.rank}:\n{traceback.format_exc()}", None))


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Compares tensors and floats with a tolerance of 1e-5 and all else exactly."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs.keys() - {"images_per_s", "train_s", "evaluate_s", "num_batches_tracked"}:
            assert_alike(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other, where)
    elif isinstance(theirs, (torch.Tensor, float)):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=where)
    else:
        assert ours == theirs, where
