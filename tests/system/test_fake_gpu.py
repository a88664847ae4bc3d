"""The program's computations on a simulated GPU: all tensors are on the right device, and a step never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import models
from datasets import ImageSet, Splits
from fake_cuda import CUDA, Trace, trace
from lib.config.options import Options
from lib.data import loader as loader_module
from lib.data.augmentation import Augmentation, for_testing
from lib.data.loader import Loader
from lib.distributed import data_parallel, sync_batchnorm
from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from lib.distributed.signals import GPU_STEPS
from lib.evaluation import classifier, clustering, evaluate, features, graph_clustering, knn, linear_probe
from lib.evaluation.evaluate import EvaluationInputs
from lib.evaluation.nearest_neighbours import nearest_neighbours
from lib.method import diagnostics, discovery
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods, consistency
from lib.method.terms import PAPER_TERMS, build
from lib.reporting import outputs, page, report_data
from lib.reporting.report_data import ReportData
from lib.session import metrics
from lib.training import checkpoint
from lib.training.checkpoint import TrainingState
from lib.training.optim import build_optimizer
from lib.training.rehearsal import rehearse
from lib.training.setup import RunContext
from lib.training.trainer import NonFiniteCheck, Trainer

SAMPLES, LOW_DIM, BATCH = 50_000, 128, 128
AUGMENTATION = Augmentation((32, 32), (32, 32), (0.5,) * 3, (0.2,) * 3, (0.2, 1.0), jitter=(0.4,) * 4, grey=0.2)


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """A single process, and the last of two processes with collectives that do nothing."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, lambda *arguments: None)

    monkeypatch.setattr(data_parallel, "OVERLAPPING", ())  # DistributedDataParallel needs a process group

    class Exchanged:
        def wait(self) -> None: ...

    monkeypatch.setattr(dist, "P2POp", lambda *arguments: arguments)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [Exchanged()])
    monkeypatch.setattr(data_parallel, "OVERLAPPING", ())  # DistributedDataParallel needs a process group
    size = int(request.param)
    return Ranks(size - 1, size)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def rows_of(samples: int, ranks: Ranks) -> ShardedRows:
    return ShardedRows(empty(ranks.shard_sizes(samples)[ranks.rank], LOW_DIM), samples, ranks)


def state_of(
    ranks: Ranks, *, anchors: int = SAMPLES // 4, samples: int = SAMPLES, optimizer: str = "SGD", **options: Any
) -> TrainingState:
    with torch.device(CUDA):
        network = models.build("resnet18", low_dim=LOW_DIM)
    bank = MemoryBank(samples, LOW_DIM, temperature=0.1, momentum=0.5, seed=0, device=CUDA, ranks=ranks)
    long = partial(empty, dtype=torch.long)
    neighbourhoods = Neighbourhoods(
        long(anchors), long(samples - anchors), long(samples), long(anchors, 1), empty(samples)
    )
    stepper = getattr(torch.optim, optimizer)(network.parameters(), lr=0.03, **options)
    return TrainingState(network, stepper, bank, neighbourhoods, 0, round=1, total=torch.zeros((), device=CUDA))


@pytest.fixture(autouse=True)
def backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.nn.Module]]:
    """The autograd engine cannot run: the networks in the list get gradients instead."""
    networks: list[torch.nn.Module] = []

    def instead(loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        assert loss.device == CUDA and loss.dim() == 0
        for network in networks:
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", instead)
    yield networks


def a_step(
    ranks: Ranks, networks: list[torch.nn.Module], options: Options, state: Callable[[], TrainingState]
) -> Trace:
    def given() -> Trainer:
        trainer = Trainer(
            options,
            state(),
            None,  # type: ignore[arg-type]
            lambda epoch: 0.03,
            None,  # type: ignore[arg-type]
            terms=build(options),
            ranks=ranks,
        )
        networks.append(trainer.state.network)
        return trainer

    def work(trainer: Trainer) -> tuple[torch.device, torch.dtype]:
        assert trainer.steps_between_requests == (GPU_STEPS if ranks.size > 1 else 1)
        check = NonFiniteCheck(trainer)
        for number in range(2):
            images = empty(BATCH // ranks.size, 3, 32, 32)
            index = empty(trainer.options.images_per_batch, dtype=torch.long)
            loss = trainer.backward((images, index), number, 1)
            check.add(loss, number)
            trainer.optimizer_step()
        assert trainer.state.bank.memory.device == CUDA
        return loss.device, loss.dtype

    return trace(work, given)


@pytest.mark.parametrize("anchors", [0, SAMPLES // 4, SAMPLES])
@pytest.mark.parametrize(
    ("optimizer", "values"),
    [("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}), ("Adam", {}), ("RMSprop", {"momentum": 0.9})],
)
def test_step_never_waits_for_the_gpu(
    anchors: int, optimizer: str, values: dict[str, Any], ranks: Ranks, backward: list[torch.nn.Module]
) -> None:
    state = partial(state_of, ranks, anchors=anchors, optimizer=optimizer, **values)
    found = a_step(ranks, backward, Options(), state)
    assert not found.waits
    assert found.result == (CUDA, torch.float32)
    assert found.kernels > 500  # the step was traced


def test_gradient_scaler_never_waits_with_a_fused_optimiser(
    ranks: Ranks, backward: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    steps: list[torch.Tensor] = []  # the optimiser's kernel, which is not there for fake tensors, gets the flag
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, found_inf, **__: steps.append(found_inf))

    def state() -> TrainingState:
        state = state_of(ranks, momentum=0.9, fused=True)
        state.scaler = torch.amp.GradScaler("cuda", enabled=True)
        return state

    found = a_step(ranks, backward, Options(amp="fp16"), state)
    assert not found.waits and found.kernels > 500
    assert [flag.device for flag in steps] == [CUDA] * 2


def test_adam_of_a_cpu_resumes_fused_on_a_gpu() -> None:
    """Its fused kernel takes the number of steps from the GPU."""

    def adam(device: torch.device, **options: Any) -> torch.optim.Adam:
        weight = torch.nn.Parameter(torch.ones(3, device=device))
        weight.grad = torch.ones_like(weight)
        return torch.optim.Adam([weight], **options)

    def work() -> list[torch.Tensor]:
        before, now = adam(torch.device("cpu")), adam(CUDA, fused=True)
        before.step()
        checkpoint.load_optimizer(now, before.state_dict(), Path("a.ckpt"))
        assert now.param_groups[0]["fused"]
        return list(next(iter(now.state.values())).values())

    assert [value.device for value in trace(work).result] == [CUDA] * 3


BEYOND = {
    "views": {"views": 2},
    "view loss": {"views": 2, "view_loss": 0.5},
    "entropy": {"entropy_loss": 0.2},
    "similarity-weighted": {"loss": "similarity-weighted"},
}
"""Options of docs/beyond.md that change a step."""


@pytest.mark.parametrize("name", BEYOND)
def test_options_beyond_the_paper_never_wait_in_a_step(
    name: str, ranks: Ranks, backward: list[torch.nn.Module]
) -> None:
    found = a_step(ranks, backward, Options(**BEYOND[name]), partial(state_of, ranks))
    assert not found.waits and found.result == (CUDA, torch.float32) and found.kernels > 500


def test_synchronised_batch_normalisation_never_waits_in_a_step(ranks: Ranks, backward: list[torch.nn.Module]) -> None:
    def state() -> TrainingState:
        state = state_of(ranks)
        sync_batchnorm.convert(state.network, ranks, sync=True)
        return state

    found = a_step(ranks, backward, Options(sync_bn=True), state)
    assert not found.waits and found.result == (CUDA, torch.float32) and found.kernels > 500


def test_wait_in_a_step_is_found(
    ranks: Ranks, backward: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the trace itself: skipping non-finite batches reads each loss, as ``--help`` states."""
    found = a_step(ranks, backward, Options(on_nonfinite="skip"), partial(state_of, ranks))
    assert found.places() == {"training/trainer.py backward"}
    assert found.waits.total() == 2


def test_tensor_on_the_wrong_device_is_found() -> None:
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        trace(lambda: empty(3) + torch.empty(3))


@pytest.mark.parametrize("on_worker", [False, True])
def test_augmentation_never_waits_for_the_gpu(on_worker: bool) -> None:
    random_numbers = np.random.default_rng(0).random((BATCH, 32))
    images = partial(empty, BATCH, 32, 32, 3, dtype=torch.uint8)
    augment = AUGMENTATION.augment_on_device if on_worker else AUGMENTATION
    found = trace(lambda: augment(images(), random_numbers))
    assert not found.waits
    assert found.result.shape == (BATCH, 3, 32, 32) and found.result.device == CUDA


@pytest.mark.parametrize("views", [1, 2])
def test_batches_are_made_on_the_gpu_without_a_wait(views: int, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.data.loader._prefetch", lambda batches, *arguments: batches)

    def work() -> list[tuple[torch.Tensor, torch.Tensor]]:
        images = empty(1000, 32, 32, 3, dtype=torch.uint8)
        loader = Loader(
            images, AUGMENTATION, batch_size=BATCH // views, workers=0, seed=0, device=CUDA, ranks=ranks, views=views
        )
        return list(loader.epoch())

    found = trace(work)
    assert not found.waits
    assert {tensor.device for batch in found.result for tensor in batch} == {CUDA}


def test_rehearsal_uses_tensors_of_the_gpu_only(
    ranks: Ranks, backward: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.autograd.set_grad_enabled(True))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def work() -> str:
        return rehearse(state_of(ranks), PAPER_TERMS, ranks, batch_size=BATCH, size=(32, 32))

    assert trace(work).result == "1.00 GiB at the peak of one step of 128 images"


@pytest.mark.parametrize("reciprocal_first", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_discovery_waits_for_the_gpu_twice(size: int, reciprocal_first: bool, ranks: Ranks) -> None:
    options = {"temperature": 0.1, "anchors": 5_000, "size": size, "reciprocal_first": reciprocal_first}
    found = trace(lambda: discovery.discover(rows_of(20_000, ranks), **options))
    assert found.waits == {
        "_local_scalar_dense at method/discovery.py entropy_and_topk": 2,  # one copy of two numbers
        "nonzero at method/neighbourhoods.py _positions": 1,
    }
    assert found.kernels > 300


def test_fallback_of_discovery_never_waits(ranks: Ranks) -> None:
    found = trace(lambda: discovery.entropy_and_topk_by_row_maximum(rows_of(20_000, ranks), temperature=0.1, size=1))
    assert not found.waits
    assert {tensor.device for tensor in found.result} == {CUDA}


def test_consistency_waits_once() -> None:
    long = partial(empty, dtype=torch.long)
    found = trace(lambda: consistency(long(1000), long(1000, 1), long(SAMPLES)))
    assert found.waits.total() == 1


def test_knn_waits_for_its_accuracies_only(ranks: Ranks) -> None:
    def work() -> classifier.Accuracy:
        labels = torch.empty(SAMPLES, dtype=torch.long, device=CUDA)
        scores = knn.weighted_knn(empty(500, LOW_DIM), rows_of(SAMPLES, ranks), labels, classes=10, k=200, sigma=0.1)
        assert scores.device == CUDA
        return classifier.Accuracy(
            *(knn.top_k_accuracy(scores, empty(500, dtype=torch.long), k, ranks) for k in (1, 5))
        )

    found = trace(work)
    assert found.waits == {
        "_local_scalar_dense at evaluation/knn.py top_k_accuracy": 4
    }  # one copy of two numbers, twice


def test_health_figures_wait_a_fixed_number_of_times(ranks: Ranks) -> None:
    def given() -> tuple[ShardedRows, diagnostics.State]:
        bank = rows_of(SAMPLES, ranks)
        return bank, diagnostics.measure(bank, None, round=0, temperature=0.1, size=1)[1]

    found = trace(lambda both: diagnostics.measure(*both, round=1, temperature=0.1, size=1), given)
    assert found.result[1].rows.device == CUDA
    assert found.waits == {
        "cpu to cuda at method/diagnostics.py measure": 2,  # the measured rows, the quantiles
        "_local_scalar_dense at method/diagnostics.py measure": 6,  # one copy of five quantiles, the largest hub
        "bincount at method/diagnostics.py measure": 1,
        "_unique2 at method/diagnostics.py _reciprocal": 1,
        "_local_scalar_dense at method/diagnostics.py _reciprocal": 1,
        "_local_scalar_dense at method/diagnostics.py _kept": 1,
        "_local_scalar_dense at method/diagnostics.py _drift": 1,
        "bincount at method/diagnostics.py _hubs": 1,
        "_local_scalar_dense at method/diagnostics.py _hubs": 3,
    }


def test_features_are_extracted_without_a_wait_until_the_end(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.data.loader._prefetch", lambda batches, *arguments: batches)

    def given() -> tuple[torch.nn.Module, Loader]:
        images = empty(1000, 32, 32, 3, dtype=torch.uint8)
        with torch.device(CUDA):
            network = models.build("resnet10-w16", low_dim=LOW_DIM)
        return network, Loader(images, AUGMENTATION, batch_size=BATCH, workers=0, seed=None, device=CUDA, ranks=ranks)

    found = trace(lambda both: features.extract(*both, "features"), given)
    assert found.result.device == CUDA and not found.waits


def test_linear_probe_waits_only_for_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "STEPS", (1, 8))

    def work() -> linear_probe.Probed:
        labels = torch.zeros(1000, dtype=torch.long)
        train, test = torch.empty(1000, 64, dtype=torch.float16), torch.empty(100, 64, dtype=torch.float16)
        return linear_probe.probe(train, labels, test, labels[:100], classes=10, seed=0, device=CUDA, what="probe")

    assert {wait.rsplit(" ", 1)[0] for wait in trace(work).waits} == {
        "cpu to cuda at evaluation/linear_probe.py",
        "cuda to cpu at evaluation/linear_probe.py",
    }


def test_the_search_for_neighbours_does_not_wait() -> None:
    assert not trace(lambda: nearest_neighbours(empty(SAMPLES, LOW_DIM), 10, empty(3, LOW_DIM))).waits
    assert not trace(lambda: nearest_neighbours(empty(SAMPLES, LOW_DIM), 10)).waits


TRAIN, TESTS, CLASSES = 400, 120, 10


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that became arrays. The fake tensors have no values but must be on the host."""
    shapes: list[tuple[int, ...]] = []

    def array(tensor: torch.Tensor) -> np.ndarray:
        assert tensor.device.type == "cpu"
        shapes.append(tuple(tensor.shape))
        return np.zeros(tensor.shape, np.float32 if tensor.is_floating_point() else np.int64)

    monkeypatch.setattr(torch.Tensor, "numpy", array)
    monkeypatch.setattr(linear_probe, "STEPS", (1, 8))
    monkeypatch.setattr("lib.data.loader._prefetch", lambda batches, *arguments: batches)
    monkeypatch.setattr(dist, "send", lambda *arguments: None)
    return shapes


def context_of(options: Options, ranks: Ranks, *, labels: bool = True, memory: Any = None) -> RunContext:
    """A context as ``prepare`` returns it: images and labels are arrays; a checkpoint's bank is in host memory."""
    draw = np.random.default_rng(0)
    train, test = (
        ImageSet(
            draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            draw.integers(0, CLASSES, count) if labels else None,
            tuple("abcdefghij") if labels else (),
        )
        for count in (TRAIN, TESTS)
    )
    with torch.device(CUDA):
        network = models.build("resnet10-w16", low_dim=LOW_DIM)
    colours = (0.5,) * 3, (0.2,) * 3
    augmentations = AUGMENTATION, for_testing(options, *colours)
    loaded = {"npc": {"memory": memory}} if memory is not None else {}
    return RunContext(options, Splits(train, test), colours, augmentations, CUDA, network, None, loaded, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [True, False])
def test_evaluation_waits_for_features_and_accuracies_only(
    labels: bool, ranks: Ranks, on_host: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clusterings run on the host: their input is an array."""
    clustered: list[tuple[int, ...]] = []

    def cluster(embeddings: np.ndarray, *arguments: Any, **named: Any) -> clustering.Clustering:
        clustered.append(embeddings.shape)
        return clustering.Clustering("k-means", np.zeros(len(embeddings)), {})

    monkeypatch.setattr(clustering, "cluster", cluster)
    monkeypatch.setattr(graph_clustering, "cluster", cluster)
    ranks = ranks if ranks.size == 1 else Ranks(0, ranks.size)  # rank 0, which clusters
    monkeypatch.setattr(dist, "recv", lambda *arguments: None)
    protocols = ("knn", "nn", "linear", "cluster") if labels else ("cluster", "knn")
    options = Options(protocol=protocols, linear_layers=("conv5", "fc"), seed=0, size=32, resize=32)

    def given() -> EvaluationInputs:
        memory = torch.empty(TRAIN, LOW_DIM)
        context = context_of(options, ranks, labels=labels, memory=memory)
        return outputs._evaluation_inputs(context)

    found = trace(lambda inputs: evaluate.evaluate(inputs, options), given)
    gathering = (
        "evaluation/evaluate.py _label_free_rows" if ranks.size == 1 else "distributed/sharded.py gather_to_rank0"
    )
    bank = "scatter" if ranks.size == 1 else "copy_from_rank0"
    expected = {
        "cuda to cpu at evaluation/linear_probe.py extract_stages",  # the features of each batch
        "cpu to cuda at evaluation/evaluate.py _features",  # the embeddings
        f"cpu to cuda at distributed/sharded.py {bank}",  # the checkpoint's memory bank
        "_local_scalar_dense at evaluation/knn.py top_k_accuracy",
        "cpu to cuda at evaluation/linear_probe.py <genexpr>",  # mean and deviation
        "cpu to cuda at evaluation/linear_probe.py probe",  # its batches
        "cpu to cuda at evaluation/linear_probe.py _accuracy",
        "cuda to cpu at evaluation/linear_probe.py _accuracy",
    }
    health = {wait for wait in found.waits if " at method/" in wait}  # covered by a separate test
    assert bool(health) is not labels
    assert set(found.waits) - health == {f"cuda to cpu at {gathering}", *(expected if labels else ())}
    assert clustered == [(TRAIN, LOW_DIM)] * (1 if labels else 2)  # without labels also on the graph
    assert len(found.result) == (7 if labels else 3)


@pytest.mark.slow
@pytest.mark.parametrize("is_final", [False, True])
def test_report_receives_arrays_in_host_memory(
    is_final: bool, on_host: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a loaded checkpoint, and of the state after training, which is on the GPU."""
    written: list[ReportData] = []
    monkeypatch.setattr(page, "write", lambda data, folder: written.append(data))
    monkeypatch.setattr(metrics, "read", lambda folder: [{"round": 0, "epoch": 0}])
    monkeypatch.setattr(report_data, "find_collapse", lambda *arguments, **named: "")
    options = Options(seed=0, size=32, resize=32)

    def given() -> tuple[RunContext, dict[str, Any]]:
        context = context_of(options, Ranks())
        state = state_of(Ranks(), anchors=100, samples=TRAIN)
        state.epoch = 1
        content = state.checkpoint("resnet18", "")
        return context, content if is_final else checkpoint.copy_to_host(content)

    found = trace(lambda both: outputs.write_report(both[0], tmp_path, both[1]), given)
    assert found.waits == {
        "cpu to cuda at training/setup.py placed": 2,  # training and test images
        "cpu to cuda at evaluation/classifier.py __init__": 2,  # their labels
        "cuda to cpu at reporting/report_data.py collect": 2,  # embeddings and statistics of the training images
        "cuda to cpu at reporting/report_data.py _tested": 1,  # embeddings of the test images
        **({"cuda to cpu at method/neighbourhoods.py <genexpr>": 5} if is_final else {}),  # what a discovery found
    }
    (data,) = written
    assert data.tested and isinstance(data.features, np.ndarray) and isinstance(data.rounds[0].neighbours, np.ndarray)
    assert {(TRAIN, LOW_DIM), (TESTS, LOW_DIM), (100, 1)} <= set(on_host)


def test_prefetching_uses_one_stream_in_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[object] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            streams.append(self)

        def wait_stream(self, other: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    loader_module._prefetch_stream.cache_clear()
    streams = [stream for _ in range(3) for stream in [loader_module._prefetch_stream(CUDA)]]
    assert len(set(map(id, streams))) == 1
    batches = [(torch.zeros(2), torch.arange(2)) for _ in range(3)]
    assert list(loader_module._prefetch(iter(batches), CUDA)) == batches
    loader_module._prefetch_stream.cache_clear()


@pytest.mark.parametrize(("optimizer", "fused"), [("sgd", True), ("adam", True), ("rmsprop", None)])
def test_fused_optimiser_is_used_if_pytorch_has_it(optimizer: str, fused: bool | None) -> None:
    """Fused kernels cannot be simulated, so only the choice is tested."""
    on_gpu = trace(lambda: build_optimizer(Options(optimizer=optimizer), [torch.nn.Parameter(empty(3, 3))])).result
    assert on_gpu.defaults.get("fused") == fused
    on_cpu = build_optimizer(Options(optimizer=optimizer), [torch.nn.Parameter(torch.zeros(3, 3))])
    assert on_cpu.defaults.get("fused") is None
