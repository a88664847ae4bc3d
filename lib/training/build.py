"""Builds a training run: state, session, recorder and trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial

import torch

from lib import seeding
from lib.config import parser
from lib.config.options import height_and_width
from lib.data.compiled_augmentation import CompiledAugmentation
from lib.data.loader import mark_batch_size_dynamic
from lib.distributed import launch
from lib.distributed.consensus import run_on_all_ranks
from lib.distributed.device import PRECISIONS
from lib.distributed.signals import StopSignals
from lib.errors import UsageError
from lib.evaluation import features
from lib.method import terms
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.method.terms import EmbeddedBatch, Term
from lib.seeding import Stream
from lib.session import provenance
from lib.session.console import logger
from lib.session.locate import folder_of
from lib.session.run_folder import Session, create_folder
from lib.training import checkpoint, optim
from lib.training.checkpoint import TrainingState
from lib.training.recorder import Recorder
from lib.training.rehearsal import rehearse
from lib.training.setup import RunContext
from lib.training.trainer import Trainer


def build_trainer(context: RunContext) -> Trainer:
    """Builds a trainer in a new session, or one that resumes from the checkpoint. Call it on every rank.

    Raises:
        UsageError: the data or the checkpoint does not match the options, or the session cannot be written.
    """
    options, splits, ranks = context.options, context.splits, context.ranks
    learning_rate = run_on_all_ranks(ranks, lambda: optim.build_schedule(options))
    loss = run_on_all_ranks(ranks, lambda: terms.build(options))
    run_on_all_ranks(ranks, lambda: check_sizes(context))
    if options.compile:
        context, loss = compiled(context), compiled_loss(loss)
    state = build_state(context)
    if context.source:
        batches = context.loader(splits.train, train=False)
        embed = partial(features.extract, context.network, batches, "filling the memory bank")
        state.restore(context.loaded, context.source, embed=embed)
        context.loaded.clear()  # frees the checkpoint's memory bank
    size, precision = height_and_width(options.size), PRECISIONS[options.amp] if options.amp else None
    peak = rehearse(
        state, loss, ranks, batch_size=options.batch_size, size=size, precision=precision, views=options.views
    )
    logger().info("memory: %s", peak)
    session = run_on_all_ranks(ranks, lambda: open_session(context, start=(state.round, state.epoch)))
    signals = StopSignals(ranks)
    labels, evaluate = splits.train.labels, context.evaluator(splits.test)
    recorder = Recorder(
        session,
        options,
        signals,
        protocol=evaluate.name if evaluate else "",
        against=evaluate.against if evaluate else "",
        images=splits.train.images,
        labels=labels,
        epochs=session.epochs(),
    )
    return Trainer(
        options,
        state,
        context.loader(splits.train, train=True),
        learning_rate,
        recorder,
        loss,
        labels=None if labels is None else torch.from_numpy(labels).to(context.device),
        evaluate=evaluate,
        validate=context.evaluator(splits.val),
        evaluate_stage=context.stage_evaluator(),
        signals=signals,
        ranks=ranks,
    )


def compiled(context: RunContext) -> RunContext:
    """The context with the training transform compiled. The network is compiled already, for every kind of run."""
    training, testing = context.augmentations
    return replace(context, augmentations=(CompiledAugmentation(**vars(training)), testing))


def compiled_loss(parts: Sequence[Term]) -> tuple[Term, ...]:
    """The sum of the terms and its gradient as one term, compiled once for all batch sizes."""
    run = torch.compile(partial(terms.total, parts))

    def of_any_batch_size(batch: EmbeddedBatch) -> torch.Tensor:
        mark_batch_size_dynamic(batch.views)
        mark_batch_size_dynamic(batch.neighbourhoods)
        return run(batch)

    return (of_any_batch_size,)


def check_sizes(context: RunContext) -> None:
    """Raises UsageError if the batch size or the neighbourhood size does not suit the number of samples or ranks."""
    options, samples, ranks = context.options, len(context.splits.train), context.ranks.size
    each = f" with {options.views} views each" if options.views > 1 else ""
    if options.images_per_batch < 2 * ranks:
        raise UsageError(
            f"--batch-size {options.batch_size}: the batch is divided among {ranks} processes, and each needs at least "
            f"two images{each}; set it to {2 * ranks * options.views} or more"
        )
    if samples < options.images_per_batch:
        raise UsageError(
            f"{options.data_root or options.dataset}: {samples} training images{each} are fewer than a batch of "
            f"{options.batch_size}; set --batch-size to {samples * options.views} or less, or add images"
        )
    if options.ANs_size >= samples:
        raise UsageError(
            f"--ANs-size {options.ANs_size}: with {samples} training images an anchor has only {samples - 1} "
            f"neighbours; set it to {samples - 1} or less"
        )


def build_state(context: RunContext) -> TrainingState:
    """The initial training state."""
    options, samples = context.options, len(context.splits.train)
    assert options.seed is not None
    bank = MemoryBank(
        samples,
        options.low_dim,
        temperature=options.npc_temperature,
        momentum=options.npc_momentum,
        seed=seeding.seed_for(options.seed, Stream.MEMORY),
        device=context.device,
        ranks=context.ranks,
    )
    optimizer = optim.build_optimizer(options, context.network.parameters())
    scaler = torch.amp.GradScaler(context.device.type, enabled=options.amp == "fp16")
    instances = Neighbourhoods.none(samples, context.device)
    return TrainingState(context.network, optimizer, bank, instances, options.seed, scaler)


def open_session(context: RunContext, start: tuple[int, int]) -> Session:
    """Opens the session of the resumed checkpoint, or a new one. On ranks other than 0 it writes nothing."""
    options = context.options
    if options.debug or not context.ranks.is_rank0:
        return Session(None)
    own = folder_of(context.source) if context.source and not options.restart else None
    folder = own or context.begun or create_folder(options.sess_dir, options.session)
    session = Session.open(
        folder, parser.to_yaml(options), start=start, log_file=options.log_file, log_tfb=options.log_tfb
    )
    if own and context.source:
        checkpoint.make_latest(context.source)
    return session


def log_start(context: RunContext, session: Session) -> None:
    """Logs versions, hardware, data and network, and appends them to starts.jsonl."""
    options, splits = context.options, context.splits
    tests = f", {len(splits.test)} test images" if splits.test else ""
    names = (splits.labelled or splits.train).classes
    classes = f", {len(names)} classes" if names else ""
    parameters = sum(p.numel() for p in context.network.parameters())
    lines = {
        "session": session.folder or "none (--debug)",
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions().items()),
        "commit": provenance.commit() or "unknown (not a git checkout)",
        "device": provenance.hardware(context.device),
        "processes": context.ranks.size,
        "data": f"{options.dataset}, {len(splits.train)} training images{tests}{classes}",
        "network": f"{options.network}, {parameters / 1e6:.2f} M parameters, embedding {options.low_dim}",
        "seed": options.seed,
        "resumed from": context.source,
        "job": launch.job() or None,
    }
    lines = {name: text for name, text in lines.items() if text is not None}
    session.write_start({"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **lines})
    for name, text in lines.items():
        logger().info("%s: %s", name, text)
