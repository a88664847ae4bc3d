"""Anchor Neighbourhood Discovery from the command line; ``python main.py --help`` lists the options.

PyTorch takes seconds to import. What needs it is imported once the options are known to be valid, so that ``--help``
and errors in options appear at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lib.config import parser
from lib.config.options import Options
from lib.config.resolve import resolve
from lib.distributed import launch
from lib.errors import UsageError
from lib.reporting import failures
from lib.session.console import SUMMARY, closed_pipe_allowed, logger, start_logging

if TYPE_CHECKING:
    from lib.distributed.processes import Ranks
    from lib.training.setup import RunContext


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, or stopped by SIGUSR1; 1 the loss is not finite; 2 input that cannot be used; 3 the last
    checkpoint could not be saved; 70 an error of the program, or of another process of the run; 130 and 143 stopped by
    Ctrl-C and SIGTERM.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return run(words)
    except Exception as error:
        known = failures.explain(error)
        if known is None:
            print(failures.traceback_of(error), file=sys.stderr)
        status, sentence = known or (launch.UNEXPECTED, f"{failures.describe(error)}; its traceback is above")
        if sentence:
            print(f"error: {sentence}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("interrupted; to resume a run that stores a session, use --resume with its folder", file=sys.stderr)
        return 130


def run(words: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    options, ranks = read_on_all_ranks(words) if launch.is_launched() else (resolve(words), None)
    if options.print_args:
        with closed_pipe_allowed():
            print(parser.to_yaml(options), end="")
        return 0

    from lib.distributed import device
    from lib.reporting import compare, export, outputs
    from lib.training import setup

    start_logging(options.brief)
    if options.compare:
        compare.show(options.compare, options.sess_dir)
        return 0
    options = device.choose_gpus(options)
    if len(options.gpus) > 1 and not launch.is_launched() and not options.is_for_one:
        device.select(options.gpus)  # an invalid GPU is refused here, once
        return launch.run(Path(__file__), words, len(options.gpus))
    export.check(options)
    context = setup.prepare(options, ranks)
    if not (options.test_only or options.is_for_one):
        return train(context)
    setup.load_network(context)
    outputs.show(context)
    return 0


def read_on_all_ranks(words: Sequence[str]) -> tuple[Options, Ranks]:
    """The options and the ranks of a process that a launcher started. An error on one rank is raised on all."""
    from lib.distributed import device
    from lib.distributed.consensus import run_on_all_ranks
    from lib.distributed.processes import Ranks

    def read() -> Options:
        options = resolve(words)
        if options.is_for_one:
            raise UsageError("--report, --query and --compare are for one process; start them without a launcher")
        return options

    gpu = None
    with suppress(UsageError):  # raised on all ranks together, below and in ``prepare``
        gpu = device.of_process(read().gpus)
    ranks = Ranks.from_environment(gpu)
    return run_on_all_ranks(ranks, read), ranks


def train(context: RunContext) -> int:
    """Trains in a new session, or in that of the resumed checkpoint; returns the exit status."""
    from lib.distributed.signals import STATUS, Stopped
    from lib.reporting import outputs
    from lib.training import build

    trainer = build.build_trainer(context)
    session, state, recorder = trainer.recorder.session, trainer.state, trainer.recorder
    try:
        with trainer.signals:
            build.log_start(context, session)
            trainer.fit()
            final = state.checkpoint(context.options.network, session.name)  # of all ranks together
            if (own := context.on_rank0()) and not outputs.finish(own, recorder, final, state.history):
                return 3
    except Stopped as stop:
        resume = f"resume with: python main.py --resume {shlex.quote(str(session.folder))}"
        again = resume if session.folder else "nothing is stored (--debug)"
        step = f"round {state.round}, epoch {state.epoch + 1}, step {state.step}"
        if state.round == context.options.max_round:
            step, again = "the last epoch", outputs.what_is_left(context.options, recorder)
        logger().info("stopped by %s after %s; %s", stop.signal.name, step, again, extra=SUMMARY)
        return STATUS[stop.signal]
    except Exception as error:
        if told := failures.in_session(error, session):
            raise told from error
        raise
    finally:
        session.close()
    return 0


if __name__ == "__main__":
    status = 0
    with closed_pipe_allowed():
        status = main()
    launch.end(status)
