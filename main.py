"""Anchor Neighbourhood Discovery from the command line; ``python main.py --help`` lists the options.

Wires options to data, network, memory bank and session, then trains or evaluates. It computes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import torch

import datasets
from lib import (
    agreement,
    checkpoint,
    compare,
    config,
    curriculum,
    device,
    environment,
    features,
    gallery,
    launch,
    memory_plan,
    records,
    results,
    schedule,
    seeding,
)
from lib.checkpoint import TrainingState
from lib.console import FIRST, SUMMARY, UsageError, logger, start_logging
from lib.files import printable, reason
from lib.free_memory import free
from lib.interrupt import STATUS, Interrupts, Stopped
from lib.memory_bank import MemoryBank
from lib.neighbourhoods import Neighbourhoods
from lib.options import Options
from lib.plan import Helpers, build_plan
from lib.seeding import Stream
from lib.session import Session, create_folder, folder_of
from lib.setting import Setting, prepare
from lib.world import World, is_loss


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, or stopped by SIGUSR1; 1 the loss is not finite; 2 input that cannot be used; 3 the last
    checkpoint could not be saved; 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    world = World.join()
    try:
        options = agreement.together(world, lambda: resolve(words))
        if options.print_args:
            print(config.to_yaml(options), end="")
            return 0
        if len(options.gpus) > 1 and not launch.is_launched() and not is_for_one(options):
            device.select(options.gpus)  # before it is refused once for each
            return launch.run(Path(__file__), words, len(options.gpus))
        start_logging(options.brief)
        if options.compare:
            show_comparison(options)
            return 0
        setting = prepare(options, world)
        if isinstance(options.report, Path):
            load_network(setting)
            results.write_report(setting, options.report, setting.loaded)
        elif options.query:
            load_network(setting)
            results.show_similar(setting)
        elif options.test_only:
            load_network(setting)
            results.test(setting)
            if alone := setting.alone():
                results.export_results(alone, alone.loaded, folder_of(alone.source) if alone.source else None)
        else:
            return train(setting)
    except agreement.ToldElsewhereError:
        return 2
    except (UsageError, datasets.DataError) as error:
        said = str(error).rpartition("DataError: ")[2]  # a worker's comes behind its traceback
        return refuse(printable(said.strip()))
    except curriculum.NonFiniteLossError as error:
        return refuse(str(error), status=1) if FIRST else 1  # the same in every process
    except torch._dynamo.exc.TorchDynamoException as error:
        return refuse(f"--compile: PyTorch cannot compile the network here ({reason(error)}); leave it out")
    except OSError as error:
        place = printable(str(error.filename or "the file system"))
        return refuse(f"{place}: cannot be used: {reason(error)}; mend that, or choose another place")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            return refuse("memory ran out; set --batch-size or --size lower, or choose a smaller --network")
        if launch.is_launched() and is_loss(error):
            return refuse("another process of the run has ended; --resume with the session's folder goes on", status=1)
        raise
    except KeyboardInterrupt:
        print("interrupted; --resume with the session's folder goes on after its last whole epoch", file=sys.stderr)
        return 130
    return 0


def refuse(sentence: str, status: int = 2) -> int:
    """Says why the run ends; its exit status."""
    print(f"error: {sentence}", file=sys.stderr)
    return status


def is_for_one(options: Options) -> bool:
    """Whether it is shown and not trained."""
    return isinstance(options.report, Path) or bool(options.query or options.compare)


def resolve(argv: Sequence[str]) -> Options:
    """The options; a run that goes on without ``--cfgs``, and a report, start from their session's own."""
    options = config.read_options(argv)
    if is_for_one(options) and launch.is_launched():
        raise UsageError("--report, --query and --compare are for one process; start them without a launcher")
    if isinstance(options.report, Path):
        folder = options.report
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"{folder}: is no session's folder; pass --report one that holds config.yaml")
        if not checkpoint.latest(folder).is_file():
            raise UsageError(f"{folder}: has no checkpoint; a report can be made when the run's first epoch is done")
        return config.read_options([*argv, "--resume", str(folder)], base=folder / "config.yaml")
    if options.resume is None or options.cfgs:
        return options
    session = folder_of(checkpoint.locate(options.resume))
    return config.read_options(argv, base=session / "config.yaml") if session else options


def train(setting: Setting) -> int:
    """Trains in a new session, or goes on in the checkpoint's; the exit status."""
    options, splits, world = setting.options, setting.splits, setting.world
    images, labels = splits.train.images, splits.train.labels
    learning_rate = agreement.together(world, lambda: schedule.build_schedule(options))
    plan = agreement.together(world, lambda: build_plan(options, learning_rate, len(images), world.size))
    memory = agreement.together(world, lambda: plan_memory(setting))
    state = build_state(setting)
    if setting.source:
        batches = setting.loader(splits.train, train=False)
        embed = partial(features.extract, setting.network, batches, "filling the memory bank")
        state.restore(setting.loaded, setting.source, embed=embed)
        setting.loaded.clear()  # the whole bank is in it
    session = agreement.together(world, lambda: open_session(setting, start=(state.round, state.epoch)))

    def show(round: int, found: Neighbourhoods) -> None:
        path = session.of_round("neighbours", round, found.num_anchors, "png")
        with session.spare("the picture of anchors and neighbours"):
            if path and (picture := gallery.save(path, images, labels, found)):
                session.write_picture("ANs/Neighbours", np.asarray(picture), round)

    interrupts = Interrupts(world)
    helpers = Helpers(
        batches=setting.loader(splits.train, train=True),
        evaluate=setting.evaluator(splits.test),
        validate=setting.evaluator(splits.val),
        labels=None if labels is None else torch.from_numpy(labels).to(setting.device),
        session=session,
        on_discovery=show,
        network_name=options.network,
        interrupts=interrupts,
        world=world,
    )
    try:
        with interrupts:
            describe(setting, session, memory)
            curriculum.run(state, plan, helpers)
        final = state.checkpoint(options.network, session.name)
        if alone := setting.alone():
            finish(alone, session, final, records.summary(state.history, helpers), bool(state.unsaved))
    except Stopped as stop:
        again = f"go on with: python main.py --resume {session.folder}" if session.folder else "nothing is stored"
        step = f"round {state.round}, epoch {state.epoch + 1}, step {state.step}"
        logger().info("stopped by %s after %s; %s", stop.signal.name, step, again, extra=SUMMARY)
        return STATUS[stop.signal]
    finally:
        session.close()
    if state.unsaved:
        print(f"error: {state.unsaved}; make room and go on with --resume", file=sys.stderr)
        return 3
    return 0


def finish(setting: Setting, session: Session, final: checkpoint.Checkpoint, summary: str, is_unsaved: bool) -> None:
    """What a run shows and hands over when it is done."""
    options = setting.options
    results.show_embeddings(setting, final["npc"]["memory"], session)
    logger().info("\n%s", summary, extra=SUMMARY)
    logger().info("session: %s", session.folder or "none", extra=SUMMARY)
    try:
        if options.report and session.folder:
            results.write_report(setting, session.folder, final)
        results.export_results(setting, final, session.folder)
    except UsageError as error:
        if not is_unsaved:  # which is worse, and is told by the status
            raise
        logger().error("%s", error)


def show_comparison(options: Options) -> None:
    """Prints sessions side by side and writes the same as CSV and as a picture."""
    found = compare.compare(options.compare)
    logger().info("%s", compare.text(found), extra=SUMMARY)
    for path in compare.write(found, options.sess_dir):
        logger().info("written: %s", path, extra=SUMMARY)


def load_network(setting: Setting) -> None:
    """The network of the checkpoint, where nothing is trained."""
    if setting.source:
        checkpoint.load_network(setting.network, setting.loaded, setting.source)
    elif not setting.options.pretrained:
        logger().warning("no --resume: the network has random weights")


def build_state(setting: Setting) -> TrainingState:
    """Everything that training changes, as it is before the first step."""
    options, samples = setting.options, len(setting.splits.train)
    assert options.seed is not None
    bank = MemoryBank(
        samples,
        options.low_dim,
        temperature=options.npc_temperature,
        momentum=options.npc_momentum,
        seed=seeding.seed_for(options.seed, Stream.MEMORY),
        device=setting.device,
        world=setting.world,
    )
    optimizer = schedule.build_optimizer(options, setting.network.parameters())
    scaler = torch.amp.GradScaler(setting.device.type, enabled=options.amp == "fp16")
    nobody = Neighbourhoods.none(samples, setting.device)
    return TrainingState(setting.network, optimizer, bank, nobody, options.seed, scaler)


def open_session(setting: Setting, start: tuple[int, int]) -> Session:
    """The session of the checkpoint that training goes on from, or a new one."""
    options = setting.options
    if options.debug or not setting.world.is_first:
        return Session(None)
    own = folder_of(setting.source) if setting.source and not options.restart else None
    folder = own or setting.begun or create_folder(options.sess_dir, options.session)
    session = Session.open(
        folder, config.to_yaml(options), start=start, log_file=options.log_file, log_tfb=options.log_tfb
    )
    if own and setting.source:
        checkpoint.make_latest(setting.source)
    return session


def plan_memory(setting: Setting) -> str:
    """What training will hold in memory, in words; UsageError where it does not fit."""
    splits, device = setting.splits, setting.device
    held = [split.held for split in (splits.train, splits.test, splits.val) if split]
    planned = memory_plan.of_options(
        setting.options,
        setting.network,
        device,
        samples=len(splits.train),
        images=sum(held),
        resident=sum(held) if device.type == "cuda" else 0,
        processes=setting.world.size,
    )
    planned.check(free(torch.device("cpu")), free(device) if device.type == "cuda" else 0)
    return planned.text().replace("\n", "; ")


def describe(setting: Setting, session: Session, memory: str) -> None:
    """The head of the log: what runs, on what, with what."""
    options, splits = setting.options, setting.splits
    tests = f", {len(splits.test)} test images" if splits.test else ""
    classes = f", {len(splits.train.classes)} classes" if splits.train.classes else ""
    parameters = sum(p.numel() for p in setting.network.parameters())
    lines = {
        "session": session.folder or "none (--debug stores nothing)",
        "versions": ", ".join(f"{name} {number}" for name, number in environment.versions().items()),
        "commit": environment.commit() or "unknown (not a git checkout)",
        "device": environment.hardware(setting.device),
        "processes": setting.world.size,
        "data": f"{options.dataset}, {len(splits.train)} training images{tests}{classes}",
        "network": f"{options.network}, {parameters / 1e6:.2f} M parameters, embedding {options.low_dim}",
        "memory": f"expected at most: {memory}",
        "seed": options.seed,
        "going on from": setting.source,
        "job": launch.job() or None,
    }
    lines = {name: text for name, text in lines.items() if text is not None}
    session.write_start({"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **lines})
    for name, text in lines.items():
        logger().info("%s: %s", name, text)


if __name__ == "__main__":
    launch.end(main())
