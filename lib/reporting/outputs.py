"""The results of a run: evaluation, report, queries and exports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import datasets
from lib.config.options import Options
from lib.errors import UsageError
from lib.evaluation import evaluate, features
from lib.evaluation.evaluate import EvaluationInputs
from lib.reporting import export, retrieval, session_data
from lib.reporting.report_data import Tested
from lib.session import image_grid
from lib.session.atomic_files import reason
from lib.session.console import SUMMARY, logger
from lib.session.locate import folder_of
from lib.session.run_folder import Session, create_folder
from lib.training import checkpoint
from lib.training.checkpoint import Checkpoint
from lib.training.recorder import Recorder
from lib.training.setup import RunContext

SIMILAR = 10
"""Number of training images that a query shows."""
PROJECTED = 1000
"""Maximum number of samples in TensorBoard's projector."""


def check(options: Options) -> None:
    """Raises UsageError if an export cannot be written; called before anything is loaded or trained."""
    export.check(options)
    if options.export_table or options.export_thumbnails:
        from lib.reporting import table  # imports scikit-learn, which takes seconds

        table.check(options)


def show(context: RunContext) -> None:
    """Produces the results that need no training: a report, similar images, or an evaluation with its exports."""
    if isinstance(context.options.report, Path):
        write_report(context, context.options.report, context.loaded)
    elif context.options.query:
        show_similar(context)
    else:
        run_evaluation(context)
        if own := context.on_rank0():
            export_results(own, own.loaded, folder_of(own.source) if own.source else None)


def finish(context: RunContext, recorder: Recorder, final: Checkpoint, history: list[dict[str, Any]]) -> bool:
    """Shows the summary and writes exports and report after training. Returns whether the last checkpoint was saved.

    Raises:
        UsageError: an export or the report cannot be written, although the checkpoint was saved.
    """
    session = recorder.session
    failures: list[UsageError] = []
    show_embeddings(context, final["npc"]["memory"], session)
    logger().info("\n%s", recorder.summary(history), extra=SUMMARY)
    logger().info("session: %s", session.folder or "none", extra=SUMMARY)
    with _collect(failures):
        export_results(context, final, session.folder)
    with _collect(failures):
        if context.options.report and session.folder:
            write_report(context, session.folder, final)
    for error in failures if recorder.unsaved else failures[:-1]:  # the last one is raised if the checkpoint was saved
        logger().error("%s", error)
    if recorder.unsaved:
        print(f"error: {recorder.unsaved}; free disk space, then resume with --resume", file=sys.stderr)
        return False
    if failures:
        raise failures[-1]
    return True


@contextmanager
def _collect(failures: list[UsageError]) -> Iterator[None]:
    """Adds a UsageError of the block to ``failures``, so that the following files are still written."""
    try:
        yield
    except UsageError as error:
        failures.append(error)


def show_embeddings(context: RunContext, memory: torch.Tensor, session: Session) -> None:
    """Writes evenly spaced rows of the memory bank (N, D) for TensorBoard's projector."""
    train = context.splits.train
    index = np.linspace(0, len(train) - 1, min(len(train), PROJECTED)).round().astype(int).tolist()
    labels = None if train.labels is None else [train.classes[label] for label in train.labels[index]]
    if context.options.log_tfb and session.folder:
        session.write_projector(memory[index].cpu().numpy(), labels, image_grid.thumbnails(train.images, index))


def run_evaluation(context: RunContext) -> None:
    """Evaluates the network, prints the table and writes evaluation.json."""
    options, source = context.options, context.source
    inputs = _evaluation_inputs(context)
    unlabelled = inputs.train_labels is None or inputs.test_labels is None
    if unlabelled and not {"cluster", "graph"} & set(options.protocol) and _exports(options):
        return
    rows = evaluate.evaluate(inputs, options)
    logger().info("%s", evaluate.text(rows), extra=SUMMARY)
    if source and not options.debug and context.ranks.is_rank0:
        session = folder_of(source)
        facts = {"checkpoint": str(source), "dataset": options.dataset, "network": options.network}
        reached = {name: context.loaded.get(name) for name in ("round", "epoch")}
        path = session / "evaluation.json" if session else source.with_suffix(".evaluation.json")
        evaluate.save(rows, path, {**facts, **reached, "seed": options.seed})


def _evaluation_inputs(context: RunContext) -> EvaluationInputs:
    train, test = context.splits.labelled or context.splits.train, context.splits.test
    evaluators = [context.evaluator(test, name) for name in context.options.protocol if name in ("knn", "nn")]
    assert context.options.seed is not None
    return EvaluationInputs(
        network=context.network,
        train=context.loader(train, train=False),
        test=None if test is None else context.loader(test, train=False),
        train_labels=train.labels,
        test_labels=None if test is None else test.labels,
        classes=len(train.classes),
        memory=context.loaded.get("npc", {}).get("memory"),
        evaluators=[evaluator for evaluator in evaluators if evaluator],
        seed=context.options.seed,
        device=context.device,
        ranks=context.ranks,
        embed=context.options.embed,
    )


def _exports(options: Options) -> bool:
    return bool(options.export_features or options.export_model or options.export_table)


def write_report(context: RunContext, folder: Path, loaded: Checkpoint) -> None:
    """Writes the report of a session with the network of the context.

    Raises:
        UsageError: the report cannot be written.
    """
    from lib.reporting import page  # imports matplotlib and scikit-learn, which takes seconds

    options, train, test = context.options, context.splits.train, context.splits.test
    evaluator = context.evaluator(test)
    compared = f"{evaluator.name} against training features, both computed with the test transform" if evaluator else ""
    tested = None
    if evaluator and test and test.labels is not None and train.labels is not None:
        embeddings = features.extract(context.embedder, context.loader(test, train=False), "test features")
        tested = Tested(
            images=test.images,
            labels=test.labels,
            features=embeddings.cpu().numpy(),
            protocol=compared,
            k=options.knn_k,
            sigma=options.knn_sigma or options.npc_temperature,
        )
    report_data = session_data.collect(
        folder,
        options,
        loaded,
        train=train,
        protocol=f"{evaluator.name} against {evaluator.against}" if evaluator else "",
        features=context.train_embeddings().cpu().numpy(),
        statistics=context.train_statistics().cpu().numpy(),
        tested=tested,
    )
    try:
        logger().info("report: %s", page.write(report_data, folder), extra=SUMMARY)
    except OSError as error:
        raise UsageError(
            f"{folder}: the report cannot be written: {reason(error)}; check free space and permissions"
        ) from None


def show_similar(context: RunContext) -> None:
    """Prints and draws the training images that are most similar to each image of ``--query``."""
    options = context.options
    queries = [(str(path), datasets.read_picture(path)) for path in options.query]
    pictures = context.loader(datasets.ImageSet([picture for _, picture in queries]), train=False)
    embeddings = features.extract(context.embedder, pictures, "pictures")
    logger().info("similarity: cosine of the embeddings, computed with the test transform")
    indices, similarities = retrieval.query(embeddings, context.train_embeddings(), SIMILAR)
    train = context.splits.train
    for row, (name, _) in enumerate(queries):
        logger().info("%s\n", retrieval.describe(name, indices[row], similarities[row], train), extra=SUMMARY)
    session = folder_of(context.source) if context.source else None
    folder = create_folder((session or options.sess_dir) / "queries", None)
    retrieval.save_picture(folder / "query.png", retrieval.draw(queries, indices, similarities, train))


def export_results(context: RunContext, loaded: Checkpoint, folder: Path | None) -> None:
    """Writes the exports that the options request. If one fails, the others are still written.

    Raises:
        UsageError: a file cannot be written, or a checkpoint of the session cannot be read.
    """
    options, splits = context.options, context.splits
    failures: list[UsageError] = []
    with _collect(failures):
        if options.export_features:
            parts = [
                export.Part(name, context.loader(split, train=False), split.labels, split.names, split.indices)
                for name, split in (("train", splits.train), ("val", splits.val), ("test", splits.test))
                if split
            ]
            export.save_features(options.export_features, context.embedder, parts, classes=splits.train.classes)
    with _collect(failures):
        if options.export_model:
            means, stds = context.means_and_stds
            export.save_model(options.export_model, context.network, options, means=means, stds=stds)
    with _collect(failures):
        if options.export_table:
            _export_table(context, loaded, folder, options.export_table)
    for error in failures[:-1]:
        logger().error("%s", error)
    if failures:
        raise failures[-1]


def _export_table(context: RunContext, loaded: Checkpoint, folder: Path | None, path: Path) -> None:
    from lib.reporting import table  # imports scikit-learn, which takes seconds

    splits, parts = context.splits, []
    for name, split in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if split:
            labels = np.full(len(split), table.NEVER) if split.labels is None else split.labels
            if split is splits.train:
                found = context.train_embeddings()
            else:
                found = features.extract(context.embedder, context.loader(split, train=False), f"{name} embeddings")
            parts.append(table.Split(name, split, found.float().cpu().numpy(), labels))
    classes = next((s.classes for s in (splits.train, splits.labelled, splits.test) if s and s.classes), ())
    if splits.labelled is not None:
        parts[0].labels[splits.labelled.indices] = splits.labelled.labels
    rounds = table.became_anchor(checkpoint.discoveries(folder, loaded, len(splits.train)), len(splits.train))
    images = [part.images.images for part in parts] if context.options.export_thumbnails else None
    table.save(path, table.columns(parts, classes, rounds, context.options), images)
