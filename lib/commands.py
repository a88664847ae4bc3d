"""What the program does with its options: train, test, show."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lib import seeding
from lib.config import parser
from lib.config.options import Options
from lib.distributed import consensus, device, launch
from lib.distributed.processes import World
from lib.distributed.signals import STATUS, Interrupts, Stopped
from lib.errors import UsageError
from lib.evaluation import features
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.reporting import compare, image_grid, test_run
from lib.seeding import Stream
from lib.session import provenance
from lib.session.console import SUMMARY, logger, start_logging
from lib.session.locate import folder_of
from lib.session.run_folder import Session, create_folder
from lib.training import checkpoint, memory_plan, optim, recorder, trainer
from lib.training.checkpoint import TrainingState
from lib.training.free_memory import free
from lib.training.plan import Helpers, build_plan
from lib.training.setup import Setting, prepare

ROOT = Path(__file__).parent.parent


def run(options: Options, words: Sequence[str], world: World | None = None) -> int:
    """Does what the options ask for; the exit status.

    Args:
        options: the resolved options.
        words: the command line they come from, to start further processes with.
        world: the processes that were launched together; None: this one alone.
    """
    world = world or World()
    start_logging(options.brief)
    if options.compare:
        show_comparison(options)
        return 0
    options = choose_gpus(options)
    if len(options.gpus) > 1 and not launch.is_launched() and not options.is_for_one:
        device.select(options.gpus)  # before it is refused once for each
        return launch.run(ROOT / "main.py", words, len(options.gpus))
    setting = prepare(options, world)
    if isinstance(options.report, Path):
        load_network(setting)
        test_run.write_report(setting, options.report, setting.loaded)
    elif options.query:
        load_network(setting)
        test_run.show_similar(setting)
    elif options.test_only:
        load_network(setting)
        test_run.test(setting)
        if alone := setting.alone():
            test_run.export_results(alone, alone.loaded, folder_of(alone.source) if alone.source else None)
    else:
        return train(setting)
    return 0


def choose_gpus(options: Options) -> Options:
    """The options with GPUs that are here; where nothing is trained, others or the CPU replace those that are not."""
    if not options.gpus and torch.cuda.is_available():
        logger().info("%s is not used; --gpus 0 uses it", torch.cuda.get_device_name(0))
    if not (options.test_only or options.is_for_one):
        return options
    gpus = device.available(options.gpus)
    if gpus != options.gpus:
        missing, place = ",".join(map(str, options.gpus)), f"GPU {gpus[0]}" if gpus else "the CPU"
        logger().warning("--gpus %s: not on this machine; %s takes their place", missing, place)
    return options.model_copy(update={"gpus": gpus})


def train(setting: Setting) -> int:
    """Trains in a new session, or goes on in the checkpoint's; the exit status."""
    options, splits, world = setting.options, setting.splits, setting.world
    images, labels = splits.train.images, splits.train.labels
    learning_rate = consensus.together(world, lambda: optim.build_schedule(options))
    plan = consensus.together(world, lambda: build_plan(options, learning_rate, len(images), world.size))
    memory = consensus.together(world, lambda: plan_memory(setting))
    state = build_state(setting)
    if setting.source:
        batches = setting.loader(splits.train, train=False)
        embed = partial(features.extract, setting.network, batches, "filling the memory bank")
        state.restore(setting.loaded, setting.source, embed=embed)
        setting.loaded.clear()  # the whole bank is in it
    session = consensus.together(world, lambda: open_session(setting, start=(state.round, state.epoch)))

    def show(round: int, found: Neighbourhoods) -> None:
        path = session.of_round("neighbours", round, found.num_anchors, "png")
        with session.spare("the picture of anchors and neighbours"):
            if path and (picture := image_grid.save(path, images, labels, found)):
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
            trainer.run(state, plan, helpers)
        final = state.checkpoint(options.network, session.name)
        if alone := setting.alone():
            finish(alone, session, final, recorder.summary(state.history, helpers), bool(state.unsaved))
    except Stopped as stop:
        resume = f"resume with: python main.py --resume {shlex.quote(str(session.folder))}"
        again = resume if session.folder else "nothing is stored (--debug)"
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
    test_run.show_embeddings(setting, final["npc"]["memory"], session)
    logger().info("\n%s", summary, extra=SUMMARY)
    logger().info("session: %s", session.folder or "none", extra=SUMMARY)
    failures: list[UsageError] = []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except UsageError as error:
            failures.append(error)

    attempt(lambda: test_run.export_results(setting, final, session.folder))
    if options.report and session.folder:  # also where an export fails
        folder = session.folder
        attempt(lambda: test_run.write_report(setting, folder, final))
    for error in failures if is_unsaved else failures[:-1]:  # the last is raised, unless the status is 3 anyway
        logger().error("%s", error)
    if failures and not is_unsaved:
        raise failures[-1]


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
    optimizer = optim.build_optimizer(options, setting.network.parameters())
    scaler = torch.amp.GradScaler(setting.device.type, enabled=options.amp == "fp16")
    instances = Neighbourhoods.none(samples, setting.device)
    return TrainingState(setting.network, optimizer, bank, instances, options.seed, scaler)


def open_session(setting: Setting, start: tuple[int, int]) -> Session:
    """The session of the checkpoint that training goes on from, or a new one."""
    options = setting.options
    if options.debug or not setting.world.is_first:
        return Session(None)
    own = folder_of(setting.source) if setting.source and not options.restart else None
    folder = own or setting.begun or create_folder(options.sess_dir, options.session)
    session = Session.open(
        folder, parser.to_yaml(options), start=start, log_file=options.log_file, log_tfb=options.log_tfb
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
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions().items()),
        "commit": provenance.commit() or "unknown (not a git checkout)",
        "device": provenance.hardware(setting.device),
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
