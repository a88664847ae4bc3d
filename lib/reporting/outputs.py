"""The results of a run: evaluation, report, queries and exports."""

from __future__ import annotations

import shlex
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
from lib.evaluation.nearest_neighbours import nearest_neighbours
from lib.reporting import export
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
EXPORTS = ("export-features", "export-model", "export-table")
"""Options that name a file to write."""


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
        Stopped: by a signal; ``what_is_left`` says what was not written.
    """
    session = recorder.session
    recorder.signals.ranks = context.ranks  # the other ranks are done: from here on it stops at once
    with recorder.signals.defer():
        show_embeddings(context, final["npc"]["memory"], session)
    logger().info("\n%s", recorder.summary(history), extra=SUMMARY)
    logger().info("session: %s", session.folder or "none", extra=SUMMARY)
    try:
        with _deferred_errors() as failures:
            with _collect(failures):
                export_results(context, final, session.folder)
            with _collect(failures):
                if context.options.report and session.folder:
                    write_report(context, session.folder, final)
    except UsageError as error:
        if not recorder.unsaved:
            raise
        logger().error("%s", error)
    if recorder.unsaved:
        print(f"error: {recorder.unsaved}; free disk space, then resume with --resume", file=sys.stderr)
    return not recorder.unsaved


def what_is_left(options: Options, recorder: Recorder) -> str:
    """What a run that was stopped in ``finish`` has written and has not, and the command that writes the rest.

    The report comes last, so it is never complete then.
    """
    paths = {f"--{name}": getattr(options, name.replace("-", "_")) for name in EXPORTS}
    exports = {flag: path for flag, path in paths.items() if path}
    written = ["the last checkpoint"] if recorder.session.folder and not recorder.unsaved else []
    written += [str(path) for path in exports.values() if path.exists()]
    left = [f"{flag} {shlex.quote(str(path))}" for flag, path in exports.items() if not path.exists()]
    if options.export_thumbnails and options.export_table and not options.export_table.exists():
        left.append("--export-thumbnails")
    if options.report and recorder.session.folder:
        left.append("--report")
    text = f"written: {', '.join(written) or 'nothing'}"
    if recorder.unsaved:
        text += f"; {recorder.unsaved}"
    if left:
        text += f"; not written: {', '.join(left)}"
    if not recorder.session.folder:
        return f"{text}; no session is stored (--debug)"
    if left or recorder.unsaved:
        rest = " ".join(["python main.py --resume", shlex.quote(str(recorder.session.folder)), *left])
        text += f"; write the rest with: {rest}"
    return text


@contextmanager
def _deferred_errors() -> Iterator[list[UsageError]]:
    """A list for the errors of the block: at its end the last one is raised and the others are logged.

    If a signal stops the block, all of them are logged.
    """
    failures: list[UsageError] = []
    last = None
    try:
        yield failures
        last = failures.pop() if failures else None
    finally:
        for error in failures:
            logger().error("%s", error)
    if last:
        raise last


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
    exports = options.export_features or options.export_model or options.export_table
    if exports and unlabelled and not {"cluster", "graph"} & set(options.protocol):
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


def write_report(context: RunContext, folder: Path, loaded: Checkpoint) -> None:
    """Writes the report of a session with the network of the context.

    Raises:
        UsageError: the report cannot be written.
    """
    from lib.reporting import page, report_data  # page imports matplotlib and scikit-learn, which takes seconds

    try:
        path = page.write(report_data.collect(context, folder, loaded), folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: the report cannot be written: {reason(error)}; check free space and permissions"
        ) from None
    logger().info("report: %s", path, extra=SUMMARY)


def show_similar(context: RunContext) -> None:
    """Prints and draws the training images that are most similar to each image of ``--query``."""
    from lib.reporting import retrieval  # imports matplotlib, which takes half a second

    options = context.options
    queries = [(str(path), datasets.read_picture(path)) for path in options.query]
    pictures = context.loader(datasets.ImageSet([picture for _, picture in queries]), train=False)
    embeddings = features.extract(context.embedder, pictures, "pictures")
    logger().info("similarity: cosine of the embeddings, computed with the test transform")
    found = nearest_neighbours(context.train_embeddings(), SIMILAR, embeddings, "looking up")
    indices, similarities = found.samples.cpu(), found.similarities.cpu()
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
    options = context.options
    splits = _splits(context) if options.export_features or options.export_table else []
    with _deferred_errors() as failures:
        with _collect(failures):
            if options.export_features:
                export.save_features(options.export_features, splits)
        with _collect(failures):
            if options.export_model:
                means, stds = context.means_and_stds
                export.save_model(options.export_model, context.network, options, means=means, stds=stds)
        with _collect(failures):
            if options.export_table:
                from lib.reporting import table  # imports scikit-learn, which takes seconds

                samples = len(context.splits.train)
                rounds = table.became_anchor(checkpoint.discoveries(folder, loaded, samples), samples)
                columns = table.columns(splits, context.splits.labelled, rounds, options)
                images = [split.images.images for split in splits] if options.export_thumbnails else None
                table.save(options.export_table, columns, images)


def _splits(context: RunContext) -> list[export.Split]:
    """The splits with their embeddings."""
    found = [export.Split("train", context.splits.train, context.train_embeddings().float().cpu().numpy())]
    for name, images in (("val", context.splits.val), ("test", context.splits.test)):
        if images:
            rows = features.extract(context.embedder, context.loader(images, train=False), f"{name} embeddings")
            found.append(export.Split(name, images, rows.float().cpu().numpy()))
    return found
