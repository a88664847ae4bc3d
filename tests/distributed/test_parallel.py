"""Several ranks give the results of a single process: loss, gradients, bank, anchors, neighbours, kNN, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

import models
from lib.config.options import Options
from lib.data.augmentation import Augmentation
from lib.data.loader import Loader
from lib.distributed import device
from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from lib.distributed.sync_batchnorm import convert
from lib.errors import ReportedElsewhereError, UsageError
from lib.evaluation import linear_probe
from lib.evaluation.classifier import Evaluator
from lib.evaluation.features import extract
from lib.evaluation.knn import top_k_accuracy, weighted_knn
from lib.method import diagnostics, terms
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.run_folder import Session
from lib.training import checkpoint, optim
from lib.training.checkpoint import TrainingState
from lib.training.recorder import Recorder
from lib.training.trainer import Trainer
from patches import blocks_of, chunks_of
from team import Team, assert_alike

CPU = torch.device("cpu")
SINGLE = Ranks()
near = {"rtol": 1e-5, "atol": 1e-5}


def rows_of(samples: int, low_dim: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(samples, low_dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# the steps of the method


def loss_and_gradient(ranks: Ranks, embeddings: torch.Tensor, memory: torch.Tensor, members: torch.Tensor) -> Any:
    sizes = ranks.local_batch_sizes(len(embeddings))
    own = embeddings[ranks.slice_in(sizes)].clone().requires_grad_()
    gathered = ranks.all_gather_batch(own, sizes)
    with blocks_of(64):
        loss = neighbourhood_loss(gathered, ShardedRows.scatter(memory, ranks), members, temperature=0.1)
    (3 * loss).backward()
    assert own.grad is not None
    return loss.item(), own.grad


@pytest.mark.parametrize(("batch", "samples", "k"), [(8, 24, 1), (3, 23, 3), (2, 10, 1), (1, 3, 2), (13, 101, 5)])
def test_loss_and_gradient_equal_those_of_a_single_process(batch: int, samples: int, k: int, team: Team) -> None:
    draw = torch.Generator().manual_seed(batch)
    embeddings, memory = rows_of(batch, seed=1), rows_of(samples, seed=2)
    memory[0] *= 0.1  # shorter than 1, like a row before its first update
    index = torch.randperm(samples, generator=draw)[:batch]
    others = torch.randint(samples, (batch, k), generator=draw)
    others[::2] = -1
    members = torch.cat([index[:, None], others], dim=1)
    loss, gradient = loss_and_gradient(SINGLE, embeddings, memory, members)
    expected = reference_loss(embeddings, memory, members)
    assert loss == pytest.approx(expected, abs=1e-5)
    answers = team.run(loss_and_gradient, embeddings, memory, members)
    assert_allclose([loss for loss, _ in answers], loss, **near)
    assert_allclose(torch.cat([part for _, part in answers]), gradient, **near)


def reference_loss(embeddings: torch.Tensor, memory: torch.Tensor, members: torch.Tensor) -> float:
    """The full softmax in double precision."""
    share = (embeddings.double() @ memory.double().t() / 0.1).softmax(dim=1)
    inside = [share[i, [j for j in row if j >= 0]].sum() for i, row in enumerate(members.tolist())]
    return -torch.stack(inside).log().mean().item()


def bank_states(ranks: Ranks, samples: int, whole: torch.Tensor, chunk: int) -> Any:
    with chunks_of(chunk):
        return bank_states_in_chunks(ranks, samples, whole)


def bank_states_in_chunks(ranks: Ranks, samples: int, whole: torch.Tensor) -> Any:
    bank = MemoryBank(samples, 5, temperature=0.1, momentum=0.3, seed=4, device="cpu", ranks=ranks)
    first = bank.state_dict()["memory"].clone()
    index = torch.randperm(samples, generator=torch.Generator().manual_seed(2))[: max(1, samples // 2)]
    bank.update(rows_of(len(index), seed=9), index)
    updated = bank.state_dict()["memory"].clone()
    bank.load_state_dict({"memory": whole})
    return first, updated, bank.state_dict()["memory"].clone(), len(bank.memory)


@pytest.mark.parametrize("chunk", [7, 2**22])
@pytest.mark.parametrize("samples", [3, 24, 25])
def test_memory_bank_equals_that_of_a_single_process(samples: int, chunk: int, team: Team) -> None:
    whole = rows_of(samples)
    expected = bank_states(SINGLE, samples, whole, 2**22)
    answers = team.run(bank_states, samples, whole, chunk)
    for ours, theirs in zip(answers[0][:3], expected[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert sum(part for *_, part in answers) == samples
    assert all(len(saved) == 0 for answer in answers[1:] for saved in answer[:3])


def discovered(ranks: Ranks, memory: torch.Tensor, size: int, block: int, temperature: float) -> Any:
    with blocks_of(block):
        given = ShardedRows.scatter(memory, ranks)
        return discover(given, temperature=temperature, anchors=len(memory) // 3, size=size)


@pytest.mark.parametrize("kind", ["unit rows", "rows of all lengths"])
@pytest.mark.parametrize(
    ("samples", "size", "block"), [(24, 1, 2**20), (23, 3, 60), (7, 6, 16), (3, 1, 16), (130, 5, 400)]
)
def test_discovery_equals_that_of_a_single_process(kind: str, samples: int, size: int, block: int, team: Team) -> None:
    memory = rows_of(samples)
    temperature = 0.1
    if kind == "rows of all lengths":
        memory *= torch.linspace(0.1, 3, samples)[:, None]
        temperature = 0.05
    alone = discovered(SINGLE, memory, size, block, temperature)
    for answer in team.run(discovered, memory, size, block, temperature):
        assert torch.equal(answer.anchors, alone.anchors) and torch.equal(answer.position, alone.position)
        assert torch.equal(answer.neighbours, alone.neighbours) and torch.equal(answer.instances, alone.instances)
        assert_allclose(answer.entropy, alone.entropy, **near)


def knn_scores(
    ranks: Ranks, queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor
) -> Any:
    mine = ranks.shard(len(queries))
    scores = weighted_knn(queries[mine], ShardedRows.scatter(bank, ranks), labels, classes=4, k=7, sigma=0.1)
    return scores, top_k_accuracy(scores, truth[mine], 1, ranks)


@pytest.mark.parametrize(("queries", "samples"), [(10, 30), (3, 7), (1, 9), (11, 3)])
def test_knn_equals_that_of_a_single_process(queries: int, samples: int, team: Team) -> None:
    draw = torch.Generator().manual_seed(0)
    given = rows_of(queries, seed=5), rows_of(samples, seed=6), torch.randint(4, (samples,), generator=draw)
    truth = torch.randint(4, (queries,), generator=draw)
    scores, accuracy = knn_scores(SINGLE, *given, truth)
    answers = team.run(knn_scores, *given, truth)
    assert_allclose(torch.cat([part for part, _ in answers]), scores, **near)
    assert [share for _, share in answers] == [accuracy] * len(answers)


def measured(ranks: Ranks, memory: torch.Tensor, rows: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "ROWS", rows)
        before = None
        for round in range(2):
            figures, before = diagnostics.measure(
                ShardedRows.scatter(memory, ranks), before, round=round, temperature=0.1, size=3
            )
            memory = F.normalize(memory + 0.1, dim=1)
    return figures


@pytest.mark.parametrize("rows", [10, 100])
def test_health_equals_that_of_a_single_process(rows: int, team: Team) -> None:
    memory = rows_of(41)
    alone = measured(SINGLE, memory, rows)
    for figures in team.run(measured, memory, rows):
        assert figures == pytest.approx(alone, rel=1e-5, abs=1e-5)


def probed(ranks: Ranks, train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "STEPS", (30, 60))
        return linear_probe.probe(
            ShardedRows.scatter(train, ranks),
            labels,
            ShardedRows.scatter(test, ranks),
            truth,
            classes=3,
            seed=1,
            device=CPU,
            what="probe",
        )


def test_linear_probe_equals_that_of_a_single_process(team: Team) -> None:
    draw = torch.Generator().manual_seed(0)
    labels, truth = torch.arange(301) % 3, torch.arange(50) % 3
    train, test = (F.one_hot(part, 8) + torch.randn(len(part), 8, generator=draw) for part in (labels, truth))
    alone = probed(SINGLE, train, labels, test, truth)
    assert 0.5 < alone.top1 < 1
    assert team.run(probed, train, labels, test, truth) == [alone] * len(team.run(probed, train, labels, test, truth))


# a whole run


SAMPLES, SIZE = 27, 8


def images_of(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


def loader_of(ranks: Ranks, batch: int, *, train: bool, count: int = SAMPLES, views: int = 1) -> Loader:
    augmentation = Augmentation(
        resize=SIZE,
        size=(SIZE, SIZE),
        means=(0.5, 0.5, 0.5),
        stds=(0.2, 0.2, 0.2),
        scale=(0.3, 1) if train else None,
        flip=train,
        centred=not train,
    )
    images = torch.from_numpy(images_of(count))
    seed = 5 if train else None
    return Loader(images, augmentation, batch_size=batch, workers=0, seed=seed, device=CPU, ranks=ranks, views=views)


class Precise(torch.nn.Module):
    """A network in double precision. In single precision, rounding differences would grow from step to step."""

    def __init__(self, network: torch.nn.Module, frozen: bool) -> None:
        super().__init__()
        self.network = network.double()
        self.frozen = frozen

    def train(self, mode: bool = True) -> Precise:
        """Keeps frozen batch normalisation in inference mode."""
        self.training = mode
        self.network.train(mode and not self.frozen)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.double())


def trained(
    ranks: Ranks, kind: str, batch: int, iter_size: int, start: Any, folder: str | None, rounds: int = 2, **changes: Any
) -> Any:
    """Trains two rounds; returns the checkpoint, the metrics and the accuracy of the last epoch."""
    torch.manual_seed(0)
    network = models.build("resnet10-w16", low_dim=6)
    placed = device.place(network, CPU, ranks, sync_bn=kind == "sync")
    network = Precise(placed, kind == "frozen")
    bank = MemoryBank(SAMPLES, 6, temperature=0.2, momentum=0.5, seed=1, device="cpu", ranks=ranks)
    bank.memory = bank.memory.double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    state = TrainingState(network, optimizer, bank, Neighbourhoods.none(SAMPLES), 5)
    if start:
        state.restore(start, Path("a.ckpt"), embed=lambda: torch.zeros(()))
    labels, truth = np.arange(SAMPLES) % 3, np.arange(5) % 3
    test = loader_of(ranks, 4, train=False, count=5)
    evaluator = Evaluator(
        "knn", test=test, test_labels=truth, train_labels=labels, classes=3, k=5, sigma=0.1, device=CPU, ranks=ranks
    )
    options = Options(
        network="resnet10-w16",
        max_round=rounds,
        max_epoch=2,
        ANs_select_rate=0.5,
        ANs_size=2,
        iter_size=iter_size,
        batch_size=batch,
        **changes,
    )
    session = Session(Path(folder) if folder and ranks.is_rank0 else None, log_tfb=False)
    Trainer(
        options,
        state,
        loader_of(ranks, options.images_per_batch, train=True, views=options.views),
        optim.fixed(0.01),
        Recorder(session, options, protocol=evaluator.name, images=images_of(SAMPLES)),
        labels=torch.from_numpy(labels),
        evaluate=evaluator,
        terms=terms.build(options),
        ranks=ranks,
    ).fit()
    session.close()
    features = extract(network, loader_of(ranks, 4, train=False), "features")
    return state.checkpoint("resnet10-w16", ""), features


@pytest.mark.parametrize("kind", ["frozen", "sync"])
@pytest.mark.parametrize(("batch", "iter_size"), [(8, 1), (12, 2)])  # the last batch has three images
def test_training_run_equals_that_of_a_single_process(
    kind: str, batch: int, iter_size: int, team: Team, tmp_path: Path
) -> None:
    alone, features = trained(SINGLE, kind, batch, iter_size, None, None)
    answers = team.run(trained, kind, batch, iter_size, None, str(tmp_path))
    assert_alike(answers[0][0], alone)
    assert_allclose(torch.cat([part for _, part in answers]), features, rtol=1e-4, atol=1e-5)
    assert len(answers[1][0]["npc"]["memory"]) == 0
    saved = checkpoint.load(tmp_path / "checkpoint" / "latest.ckpt")
    assert (saved["round"], saved["epoch"]) == (1, 2)
    for part in ("net", "optimizer", "npc", "ANs_discovery"):
        assert_alike(saved[part], alone[part])


BEYOND: dict[str, dict[str, Any]] = {
    "views": {"views": 2},
    "view loss": {"views": 2, "view_loss": 0.5},
    "entropy": {"entropy_loss": 0.2},
    "similarity-weighted": {"loss": "similarity-weighted"},
    "neighbourhoods": {"ANs_size_first": 1, "ANs_reciprocal_first": True, "ANs_every": 1},
}
"""Options of docs/beyond.md that change a step."""


def trained_beyond(ranks: Ranks, changes: dict[str, Any]) -> Any:
    return trained(ranks, "sync", 8, 1, None, None, **changes)[0]


@pytest.mark.parametrize("name", BEYOND)
def test_options_beyond_the_paper_equal_a_single_process(name: str, team: Team) -> None:
    alone = trained_beyond(SINGLE, BEYOND[name])
    assert_alike(team.run(trained_beyond, BEYOND[name])[0], alone)
    assert alone["passes"] == 4 * SAMPLES * BEYOND[name].get("views", 1)
    assert alone["history"][-1]["passes"] == 4 * BEYOND[name].get("views", 1)


@pytest.mark.parametrize("best", [False, True])
def test_checkpoint_resumes_with_another_number_of_ranks(best: bool, team: Team) -> None:
    """The state after the first round, saved by a single process and resumed by several ranks, and vice versa."""
    whole, _ = trained(SINGLE, "sync", 8, 1, None, None)
    begun = stopped_after_a_round(SINGLE)
    begun = checkpoint.without_copies(begun) if best else begun
    assert_alike(team.run(trained, "sync", 8, 1, begun, None)[0][0], whole)
    begun = team.run(stopped_after_a_round)[0]
    assert_alike(trained(SINGLE, "sync", 8, 1, begun, None)[0], whole)


def stopped_after_a_round(ranks: Ranks) -> Any:
    return trained(ranks, "sync", 8, 1, None, None, rounds=1)[0]


def test_training_without_synchronised_batch_normalisation_is_finite(team: Team) -> None:
    """The result differs from a single process, which normalises over larger batches."""
    content, features = team.run(trained, "own", 8, 1, None, None)[0]
    assert features.isfinite().all() and all(value.isfinite().all() for value in content["net"].values())
    assert content["history"][-1]["loss"] > 0


def normalised(ranks: Ranks, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Synchronised batch normalisation of the local part of (B, C, H, W): output, gradient and running statistics."""
    own = images[ranks.slice_in(ranks.local_batch_sizes(len(images)))].clone().requires_grad_()
    layer = convert(torch.nn.BatchNorm2d(images.shape[1]), ranks, sync=True).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=images.dtype == torch.bfloat16):
        out = layer(own)
    (out.float().square() * torch.arange(128) / 128).sum().backward()
    assert own.grad is not None
    return out.detach(), own.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_synchronised_statistics_are_computed_in_float32(dtype: torch.dtype, team: Team) -> None:
    """The pixel count of the batch, 131,072, overflows fp16."""
    drawn = torch.Generator().manual_seed(0)
    images = (torch.randn(8, 2, 128, 128, generator=drawn) * 3 + 1).to(dtype)
    plain = torch.nn.BatchNorm2d(2).train()
    given = images.float().clone().requires_grad_()
    expected = plain(given)
    (expected.square() * torch.arange(128) / 128).sum().backward()
    ours = team.run(normalised, images)
    rounding = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for part, reference in enumerate((expected.detach(), given.grad)):
        assert reference is not None
        joined = torch.cat([answer[part] for answer in ours])
        assert joined.dtype == dtype
        torch.testing.assert_close(joined.float(), reference, rtol=rounding, atol=rounding)
    for _, _, mean, var in ours:
        torch.testing.assert_close(mean, plain.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var, plain.running_var, rtol=1e-5, atol=1e-5)


def resumed(ranks: Ranks, there: Path, samples: int) -> Any:
    """The state of each rank after loading a checkpoint that only rank 0 can read."""
    source, loaded = checkpoint.load_resumed(there if ranks.is_rank0 else there.parent / "not here.ckpt", ranks)
    bank = MemoryBank(samples, 5, temperature=0.1, momentum=0.3, seed=4, device="cpu", ranks=ranks)
    memory = loaded["npc"]["memory"]
    bank.load_state_dict(loaded["npc"])
    return source, loaded["net"], memory.is_meta, memory.shape, bank.memory, ShardedRows.scatter(memory, ranks).local


@pytest.mark.parametrize("samples", [3, 10])
def test_rank_0_reads_the_checkpoint_and_scatters_the_rows(samples: int, team: Team, tmp_path: Path) -> None:
    there, memory = tmp_path / "a.ckpt", rows_of(samples)
    net = {"weight": torch.arange(3.0)}
    checkpoint.save({"net": net, "npc": {"params": torch.zeros(2), "memory": memory}}, there)
    answers = team.run(resumed, there, samples)
    for rank, (source, theirs, is_meta, shape, _, _) in enumerate(answers):
        assert source == there and torch.equal(theirs["weight"], net["weight"])
        assert is_meta == (rank > 0) and shape == memory.shape
    for part in (4, 5):
        assert torch.equal(torch.cat([answer[part] for answer in answers]), memory)


def damaged(ranks: Ranks, there: Path) -> str:
    try:
        checkpoint.load_resumed(there, ranks)
    except ReportedElsewhereError:
        return "elsewhere"
    except UsageError as error:
        return str(error)
    return "read"


@pytest.mark.parametrize("memory", [torch.eye(3).to_sparse(), None, [1.0]])
def test_memory_bank_that_is_not_dense_is_refused_on_all_ranks(memory: Any, team: Team, tmp_path: Path) -> None:
    checkpoint.save({"net": {}, "npc": {"memory": memory}}, tmp_path / "a.ckpt")
    message, *others = team.run(damaged, tmp_path / "a.ckpt")
    assert "its memory bank is not a plain tensor" in message and set(others) == {"elsewhere"}
