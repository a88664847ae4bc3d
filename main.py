"""Anchor Neighbourhood Discovery from the command line; ``python main.py --help`` lists the options.

Wires options to data, network, memory bank and session, then trains or evaluates. It computes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import datasets
import models
from lib import (
    augment,
    checkpoint,
    compare,
    config,
    curriculum,
    device,
    environment,
    evaluation,
    export,
    features,
    gallery,
    lookup,
    memory_plan,
    review,
    schedule,
    seeding,
    weights,
)
from lib.checkpoint import Checkpoint, TrainingState
from lib.console import SUMMARY, UsageError, logger, progress, start_logging
from lib.evaluation import Subject
from lib.free_memory import free
from lib.loader import Loader
from lib.material import Tested
from lib.memory_bank import MemoryBank
from lib.neighbourhoods import Neighbourhoods
from lib.options import Options
from lib.protocols import Evaluator
from lib.seeding import Stream
from lib.session import LATEST, Session, create_folder, folder_of

SIMILAR = 10
"""Training images that a query shows."""
PROJECTED = 1000
"""Samples that TensorBoard's projector shows at most."""


@dataclass(frozen=True)
class Setting:
    """What both a training and a test run start from."""

    options: Options  # with a seed
    splits: datasets.Splits
    colours: tuple[datasets.Colour, datasets.Colour]  # means and deviations
    augmentations: tuple[augment.Augmentation, augment.Augmentation]  # for training, for testing
    device: torch.device
    network: torch.nn.Module
    source: Path | None  # of the checkpoint
    loaded: Checkpoint  # empty without --resume
    resident: dict[int, torch.Tensor] = field(default_factory=dict)  # images on the device, by their array's id

    def loader(self, split: datasets.ImageSet, *, train: bool) -> Loader:
        """Batches of a split: shuffled and augmented, or in order and as they are."""
        return Loader(
            self.placed(split.images),
            self.augmentations[0 if train else 1],
            batch_size=self.options.batch_size,
            workers=self.options.workers_num,
            seed=self.options.seed if train else None,
            device=self.device,
        )

    def placed(self, images: Sequence[np.ndarray] | np.ndarray) -> Sequence[np.ndarray] | torch.Tensor:
        """One array of images as a tensor on the device, which all loaders share; others as they are."""
        if not isinstance(images, np.ndarray):
            return images
        if id(images) not in self.resident:
            self.resident[id(images)] = torch.from_numpy(images).to(self.device)
        return self.resident[id(images)]

    def evaluator(self, queries: datasets.ImageSet | None, protocol: str | None = None) -> Evaluator | None:
        """A protocol, by default the training's, over test images or those held out; None where labels are missing."""
        options, train = self.options, self.splits.train
        if queries is None or queries.labels is None or train.labels is None:
            return None
        return Evaluator(
            protocol or options.training_protocol,
            test=self.loader(queries, train=False),
            test_labels=queries.labels,
            train_labels=train.labels,
            classes=len(train.classes),
            k=options.knn_k,
            sigma=options.knn_sigma or options.npc_temperature,
            device=self.device,
        )

    def subject(self) -> Subject:
        """What a test run judges."""
        train, test = self.splits.train, self.splits.test
        evaluators = [self.evaluator(test, name) for name in self.options.protocol if name in ("knn", "nn")]
        assert self.options.seed is not None
        return Subject(
            network=self.network,
            train=self.loader(train, train=False),
            test=None if test is None else self.loader(test, train=False),
            train_labels=train.labels,
            test_labels=None if test is None else test.labels,
            classes=len(train.classes),
            memory=self.loaded.get("npc", {}).get("memory"),
            evaluators=[evaluator for evaluator in evaluators if evaluator],
            seed=self.options.seed,
            device=self.device,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used, 130 interrupted."""
    try:
        options = resolve(sys.argv[1:] if argv is None else argv)
        if options.print_args:
            print(config.to_yaml(options), end="")
            return 0
        start_logging(options.brief)
        if options.compare:
            show_comparison(options)
            return 0
        setting = prepare(options)
        if isinstance(options.report, Path):
            load_network(setting)
            write_report(setting, options.report, setting.loaded)
        elif options.query:
            load_network(setting)
            show_similar(setting)
        elif options.test_only:
            load_network(setting)
            test(setting)
            export_results(setting, setting.loaded, folder_of(setting.source) if setting.source else None)
        else:
            train(setting)
    except (UsageError, datasets.DataError) as error:
        print(f"error: {str(error).splitlines()[-1]}", file=sys.stderr)  # a worker's comes behind its traceback
        return 2
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"error: --compile: PyTorch cannot compile the network here ({reason}); leave it out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume with the session's folder goes on after its last whole epoch", file=sys.stderr)
        return 130
    return 0


def resolve(argv: Sequence[str]) -> Options:
    """The options; a run that goes on without ``--cfgs``, and a report, start from their session's own."""
    options = config.read_options(argv)
    if isinstance(options.report, Path):
        folder = options.report
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"{folder}: is no session's folder; pass --report one that holds config.yaml")
        if not (folder / "checkpoint" / LATEST).is_file():
            raise UsageError(f"{folder}: has no checkpoint; a report can be made when the run's first epoch is done")
        return config.read_options([*argv, "--resume", str(folder)], base=folder / "config.yaml")
    if options.resume is None or options.cfgs:
        return options
    session = folder_of(checkpoint.locate(options.resume))
    return config.read_options(argv, base=session / "config.yaml") if session else options


def prepare(options: Options) -> Setting:
    """Checks everything that can be checked before anything is written."""
    place = device.select(options.gpus)
    data_source = config.choose(datasets.DATASETS, options.dataset, "--dataset")
    config.choose(models.NETWORKS, options.network, "--network")
    export.check(options)
    if options.export_neighbourhoods:
        lookup.check(options.export_neighbourhoods)
    source = checkpoint.locate(options.resume) if options.resume else None
    loaded = checkpoint.load(source) if source else {}
    seed = seeding.choose(options.seed, loaded.get("seed"))
    options = options.model_copy(update={"seed": seed})
    torch.manual_seed(seeding.seed_for(seed, Stream.WEIGHTS))  # the network's first weights
    network = models.build(options.network, low_dim=options.low_dim)
    if options.pretrained and not source:
        weights.load_pretrained(network, options.pretrained)
    splits = load_data(options)
    colours = options.means or data_source.means, options.stds or data_source.stds
    augmentations = augment.for_training(options, *colours), augment.for_testing(options, *colours)
    device.allow_tf32(options.tf32)
    network = device.place(network, options.gpus, place, compile=options.compile)
    return Setting(options, splits, colours, augmentations, place, network, source, loaded)


def load_data(options: Options) -> datasets.Splits:
    """The splits, with what the user should know about them said once."""

    def bar(items: Iterable[Any], what: str, total: int, unit: str) -> Iterable[Any]:
        return progress(items, what, unit, total)

    splits = datasets.load(
        options.dataset,
        options.data_root,
        strict=options.strict_data,
        download=options.download,
        boxes=options.bounding_boxes,
        progress=bar,
    )
    if options.val_fraction:
        splits = datasets.hold_out(splits, options.val_fraction)
    for note in splits.notes:
        logger().info("%s", note)
    for name, reason in splits.skipped:
        logger().warning("unreadable, left out: %s: %s", name, reason)
    if splits.skipped:
        logger().warning("%d unreadable images were left out; --strict-data refuses them", len(splits.skipped))
    if splits.train.labels is None:
        logger().info("the training images have no labels: accuracy and consistency are not computed")
    elif splits.test is None or splits.test.labels is None:
        logger().info("there are no labelled test images: accuracy is not computed")
    return splits


def train(setting: Setting) -> None:
    """Trains in a new session, or goes on in the checkpoint's."""
    options, splits = setting.options, setting.splits
    images, labels = splits.train.images, splits.train.labels
    plan = curriculum.build_plan(options, schedule.build_schedule(options), samples=len(images))
    memory = plan_memory(setting)
    state = build_state(setting)
    if setting.source:
        batches = setting.loader(splits.train, train=False)
        embed = partial(features.extract, setting.network, batches, "filling the memory bank")
        state.restore(setting.loaded, setting.source, embed=embed)
    session = open_session(setting, start=(state.round, state.epoch))

    def show(round: int, found: Neighbourhoods) -> None:
        path = session.of_round("neighbours", round, found.num_anchors, "png")
        if path and (picture := gallery.save(path, images, labels, found)):
            session.write_picture("ANs/Neighbours", np.asarray(picture), round)

    helpers = curriculum.Helpers(
        batches=setting.loader(splits.train, train=True),
        evaluate=setting.evaluator(splits.test),
        validate=setting.evaluator(splits.val),
        labels=None if labels is None else torch.from_numpy(labels).to(setting.device),
        session=session,
        on_discovery=show,
        network_name=options.network,
    )
    try:
        describe(setting, session, memory)
        curriculum.run(state, plan, helpers)
        show_embeddings(setting, state.bank.memory, session)
        logger().info("\n%s", curriculum.summary(state.history, helpers), extra=SUMMARY)
        logger().info("session: %s", session.folder or "none", extra=SUMMARY)
        final = state.checkpoint(options.network, session.name)
        if options.report and session.folder:
            write_report(setting, session.folder, final)
        export_results(setting, final, session.folder)
    finally:
        session.close()


def show_embeddings(setting: Setting, memory: torch.Tensor, session: Session) -> None:
    """Some rows of the memory bank, evenly spaced, for TensorBoard's projector."""
    train = setting.splits.train
    index = np.linspace(0, len(train) - 1, min(len(train), PROJECTED)).round().astype(int).tolist()
    labels = None if train.labels is None else [train.classes[label] for label in train.labels[index]]
    if setting.options.log_tfb and session.folder:
        session.write_projector(memory[index].cpu().numpy(), labels, gallery.thumbnails(train.images, index))


def test(setting: Setting) -> None:
    """Prints the table of a test run, and keeps the figures with the session."""
    options, source = setting.options, setting.source
    subject = setting.subject()
    unlabelled = subject.train_labels is None or subject.test_labels is None
    if unlabelled and "cluster" not in options.protocol and _exports(options):
        return
    rows = evaluation.evaluate(subject, options)
    logger().info("%s", evaluation.text(rows), extra=SUMMARY)
    if source and not options.debug:
        session = folder_of(source)
        facts = {"checkpoint": str(source), "dataset": options.dataset, "network": options.network}
        reached = {name: setting.loaded.get(name) for name in ("round", "epoch")}
        path = session / "evaluation.json" if session else source.with_suffix(".evaluation.json")
        evaluation.save(rows, path, {**facts, **reached, "seed": options.seed})


def write_report(setting: Setting, folder: Path, loaded: Checkpoint) -> None:
    """Writes the report of a session, whose network is the setting's."""
    from lib import report  # draws with matplotlib and scikit-learn, which take seconds to import

    options, train, test = setting.options, setting.splits.train, setting.splits.test
    evaluator = setting.evaluator(test)
    tested = None
    if evaluator and test and test.labels is not None:
        embeddings = features.extract(setting.network, setting.loader(test, train=False), "test features")
        tested = Tested(
            images=test.images,
            labels=test.labels,
            features=embeddings.cpu().numpy(),
            protocol=f"{evaluator.name} against the memory bank",
            k=options.knn_k,
            sigma=options.knn_sigma or options.npc_temperature,
        )
    material = review.material(
        folder,
        options,
        loaded,
        images=train.images,
        labels=train.labels,
        classes=train.classes,
        protocol=f"{evaluator.name} against the memory bank" if evaluator else "",
        tested=tested,
    )
    logger().info("report: %s", report.write(material, folder), extra=SUMMARY)


def show_comparison(options: Options) -> None:
    """Prints sessions side by side and writes the same as CSV and as a picture."""
    found = compare.compare(options.compare)
    logger().info("%s", compare.text(found), extra=SUMMARY)
    for path in compare.write(found, options.sess_dir):
        logger().info("written: %s", path, extra=SUMMARY)


def _exports(options: Options) -> bool:
    return bool(options.export_features or options.export_model or options.export_neighbourhoods)


def load_network(setting: Setting) -> None:
    """The network of the checkpoint, where nothing is trained."""
    if setting.source:
        checkpoint.load_network(setting.network, setting.loaded, setting.source)
    elif not setting.options.pretrained:
        logger().warning("no --resume: the network has random weights")


def memory_of(setting: Setting, loaded: Checkpoint) -> torch.Tensor:
    """The rows of the checkpoint's memory bank, or the training images' embeddings where it has none of theirs."""
    memory = loaded.get("npc", {}).get("memory")
    train = setting.splits.train
    if isinstance(memory, torch.Tensor) and memory.shape == (len(train), setting.options.low_dim):
        return memory.to(setting.device)
    return features.extract(setting.network, setting.loader(train, train=False), "training features")


def known(setting: Setting) -> lookup.Gallery:
    """The training images by name and class."""
    train = setting.splits.train
    return lookup.Gallery(train.images, train.names, train.labels, train.classes)


def show_similar(setting: Setting) -> None:
    """Prints the training images most similar to each picture of ``--query``, and draws them."""
    options = setting.options
    queries = [lookup.Query(str(path), datasets.read_picture(path)) for path in options.query]
    pictures = setting.loader(datasets.ImageSet([query.image for query in queries]), train=False)
    embeddings = features.extract(setting.network, pictures, "pictures")
    logger().info(
        "similar: by cosine with the memory bank, or where there is none with the training images' embeddings"
    )
    indices, similarities = lookup.query(embeddings, memory_of(setting, setting.loaded), SIMILAR)
    gallery = known(setting)
    for row, query in enumerate(queries):
        logger().info("%s\n", lookup.describe(query.name, indices[row], similarities[row], gallery), extra=SUMMARY)
    session = folder_of(setting.source) if setting.source else None
    folder = create_folder((session or options.sess_dir) / "queries", None)
    lookup.save_picture(folder / "query.png", lookup.draw(queries, indices, similarities, gallery))


def export_results(setting: Setting, loaded: Checkpoint, folder: Path | None) -> None:
    """Writes what the user asks for.

    Args:
        setting: with the network as it is now.
        loaded: the checkpoint of now.
        folder: the session's, or None.
    """
    options, splits = setting.options, setting.splits
    if options.export_features:
        parts = [
            export.Part(name, setting.loader(split, train=False), split.labels, split.names)
            for name, split in (("train", splits.train), ("test", splits.test))
            if split
        ]
        classes = splits.train.classes
        export.save_features(options.export_features, setting.network, parts, classes=classes)
    if options.export_model:
        means, stds = setting.colours
        export.save_model(options.export_model, setting.network, options, means=means, stds=stds)
    if options.export_neighbourhoods:
        found = checkpoint.discoveries(folder, loaded, len(splits.train))
        lookup.save_neighbourhoods(
            options.export_neighbourhoods,
            memory=memory_of(setting, loaded),
            temperature=options.npc_temperature,
            size=options.ANs_size,
            rounds=lookup.became_anchor(found, len(splits.train)),
            gallery=known(setting),
        )


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
    )
    optimizer = schedule.build_optimizer(options, setting.network.parameters())
    scaler = torch.amp.GradScaler(setting.device.type, enabled=options.amp == "fp16")
    nobody = Neighbourhoods.none(samples, setting.device)
    return TrainingState(setting.network, optimizer, bank, nobody, options.seed, scaler)


def open_session(setting: Setting, start: tuple[int, int]) -> Session:
    """The session of the checkpoint that training goes on from, or a new one."""
    options = setting.options
    if options.debug:
        return Session(None)
    folder = folder_of(setting.source) if setting.source and not options.restart else None
    folder = folder or create_folder(options.sess_dir, options.session)
    return Session.open(
        folder, config.to_yaml(options), start=start, log_file=options.log_file, log_tfb=options.log_tfb
    )


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
        "data": f"{options.dataset}, {len(splits.train)} training images{tests}{classes}",
        "network": f"{options.network}, {parameters / 1e6:.2f} M parameters, embedding {options.low_dim}",
        "memory": f"expected at most: {memory}",
        "seed": options.seed,
        "going on from": setting.source,
    }
    lines = {name: text for name, text in lines.items() if text is not None}
    session.write_start({"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **lines})
    for name, text in lines.items():
        logger().info("%s: %s", name, text)


if __name__ == "__main__":
    sys.exit(main())
