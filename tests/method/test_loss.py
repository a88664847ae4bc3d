"""The neighbourhood loss and its gradient compared with the naive oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracles
from lib.data.loader import mark_batch_size_dynamic
from lib.method import chunking
from lib.method.loss import LOSSES, Loss, neighbourhood_loss, similarity_weighted_loss

many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)

Case = tuple[np.ndarray, np.ndarray, list[list[int]]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Embeddings (B, D), memory (N, D) and each sample's neighbourhood: anchors and instance samples mixed."""
    kind, low_dim = draw(st.sampled_from(oracles.KINDS)), draw(st.integers(1, 5))
    samples, seed = draw(st.integers(1, 10)), draw(seeds)
    size = draw(st.integers(0, samples - 1))
    memory = oracles.rows(kind, samples, low_dim, seed)
    batch = draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=samples, unique=True))
    x = oracles.rows("random", len(batch), low_dim, seed + 1)
    random = np.random.default_rng(seed)
    own = []
    for sample in batch:
        others = [j for j in random.permutation(samples).tolist() if j != sample][:size]
        own.append([sample, *(others if random.random() < 0.6 else [])])
    return x, memory, own


def padded(own: list[list[int]]) -> torch.Tensor:
    """(B, 1 + K), padded with -1 where a neighbourhood is smaller than the largest."""
    width = max(map(len, own))
    return torch.tensor([[*members, *[-1] * (width - len(members))] for members in own])


@pytest.fixture(params=[1, 4, 2**20], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one column, of several and of all."""
    monkeypatch.setattr(chunking, "CPU_BLOCK", request.param)


def by_logits(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The loss of given logits (B, N), which serve as embeddings of N dimensions with the identity as memory."""
    memory = torch.eye(logits.shape[1], dtype=logits.dtype)
    return neighbourhood_loss(logits, memory, own, temperature=1)


@many
@given(cases(), st.sampled_from([0.05, 0.1, 1.0, 5.0]))
def test_loss_equals_the_oracle(case: Case, temperature: float) -> None:
    x, memory, own = case
    loss = neighbourhood_loss(torch.from_numpy(x), torch.from_numpy(memory), padded(own), temperature=temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(oracles.loss(x, memory, own, temperature), rel=1e-9, abs=1e-11)


@many
@given(cases(), st.sampled_from([0.05, 0.1, 1.0, 5.0]))
def test_gradient_equals_the_oracle(case: Case, temperature: float) -> None:
    x, memory, own = case
    leaf = torch.from_numpy(x).requires_grad_()
    neighbourhood_loss(leaf, torch.from_numpy(memory), padded(own), temperature=temperature).backward()
    assert leaf.grad is not None
    expected = oracles.gradient(x, memory, own, temperature)
    np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-8, atol=1e-11)


@many
@given(cases(), st.sampled_from([0.05, 0.1, 1.0, 5.0]))
def test_similarity_weighted_loss_and_gradient_equal_the_oracle(case: Case, temperature: float) -> None:
    x, memory, own = case
    leaf = torch.from_numpy(x).requires_grad_()
    loss = similarity_weighted_loss(leaf, torch.from_numpy(memory), padded(own), temperature=temperature)
    loss.backward()
    expected = torch.from_numpy(x).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for embedding, (sample, *others) in zip(expected, own, strict=True):
        p = (torch.from_numpy(memory) @ embedding / temperature).softmax(dim=0)
        total -= (p[sample] + sum(max(0, memory[sample] @ memory[j]) * p[j] for j in others)).log() / len(x)
    total.backward()
    assert leaf.grad is not None and expected.grad is not None
    torch.testing.assert_close(loss.detach(), total.detach())
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-6, atol=1e-9)


def test_similarity_weighted_loss_leaves_out_opposite_neighbours() -> None:
    memory = torch.tensor([[1.0, 0], [-1, 0], [0.6, 0.8]])
    x = torch.tensor([[0.8, 0.6]])
    alone = neighbourhood_loss(x, memory, torch.tensor([[0]]), temperature=0.5)
    with_opposite = similarity_weighted_loss(x, memory, torch.tensor([[0, 1]]), temperature=0.5)
    with_similar = similarity_weighted_loss(x, memory, torch.tensor([[0, 2]]), temperature=0.5)
    with_both = neighbourhood_loss(x, memory, torch.tensor([[0, 2]]), temperature=0.5)
    assert with_opposite == pytest.approx(alone.item())
    assert with_both < with_similar < alone


@many
@given(cases(), st.sampled_from([1e-3, 1e-5, 1e-10]))
def test_loss_and_gradient_are_finite_where_probabilities_underflow(case: Case, temperature: float) -> None:
    x, memory, own = case
    leaf = torch.from_numpy(x.astype(np.float32)).requires_grad_()
    loss = neighbourhood_loss(leaf, torch.from_numpy(memory.astype(np.float32)), padded(own), temperature=temperature)
    loss.backward()
    assert leaf.grad is not None
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


def test_loss_of_a_distant_instance_does_not_underflow() -> None:
    logits = torch.tensor([[-1000.0, 1000.0, 0.0]])  # p is 0 in float32
    assert by_logits(logits, torch.tensor([[0]])).item() == 2000


def test_loss_of_uniform_probabilities_equals_the_formula() -> None:
    logits = torch.zeros(2, 12)
    assert by_logits(logits, torch.tensor([[0], [5]])).item() == pytest.approx(math.log(12))
    assert by_logits(logits, torch.tensor([[0, 1, 2], [5, 4, 3]])).item() == pytest.approx(math.log(4))
    mixed = by_logits(logits, torch.tensor([[0, 1, 2], [5, -1, -1]])).item()
    assert mixed == pytest.approx((math.log(4) + math.log(12)) / 2)


def test_neighbourhood_of_all_samples_has_zero_loss() -> None:
    logits = torch.tensor([[0.3, -2.0, 5.0]], dtype=torch.float64)
    assert by_logits(logits, torch.tensor([[2, 0, 1]])).item() == pytest.approx(0, abs=1e-15)


def test_single_sample_has_zero_loss() -> None:
    assert by_logits(torch.tensor([[3.0]]), torch.tensor([[0]])).item() == 0


def test_padding_indices_contribute_no_gradient() -> None:
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    by_logits(logits, torch.tensor([[2, -1, -1]])).backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), [[0.25, 0.25, -0.75, 0.25]])


def test_gradient_flows_to_embeddings_and_not_to_the_memory() -> None:
    memory = torch.from_numpy(oracles.rows("random", 6, 3, seed=1)).requires_grad_()
    before = memory.detach().clone()
    x = torch.from_numpy(oracles.rows("random", 2, 3, seed=2)).requires_grad_()
    neighbourhood_loss(x, memory, torch.tensor([[1, 2], [4, -1]]), temperature=0.5).backward()
    assert x.grad is not None and memory.grad is None
    assert torch.equal(memory, before)


def test_loss_without_requires_grad_is_equal_and_has_no_graph() -> None:
    x, memory = (torch.from_numpy(oracles.rows("random", n, 3, seed=n)) for n in (2, 6))
    own = torch.tensor([[1, 2], [4, -1]])
    alone = neighbourhood_loss(x, memory, own, temperature=0.5)
    assert not alone.requires_grad
    assert torch.equal(alone, neighbourhood_loss(x.requires_grad_(), memory, own, temperature=0.5).detach())


def test_upstream_gradient_scales_the_gradient() -> None:
    x, memory = (torch.from_numpy(oracles.rows("random", n, 3, seed=n)) for n in (2, 6))
    gradients = []
    for factor in (1.0, -2.5):
        leaf = x.clone().requires_grad_()
        (factor * neighbourhood_loss(leaf, memory, torch.tensor([[1], [4]]), temperature=0.5)).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], -2.5 * gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("plain", LOSSES.values(), ids=LOSSES)
def test_compiled_loss_is_equal_and_not_recompiled_for_batch_sizes(plain: Loss, block: None) -> None:
    torch.compiler.reset()
    run, draw = torch.compile(plain, backend="aot_eager", fullgraph=True), torch.Generator().manual_seed(0)
    memory = torch.nn.functional.normalize(torch.randn(50, 4, generator=draw), dim=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (16, 16, 7, 12):
            x = torch.nn.functional.normalize(torch.randn(batch, 4, generator=draw), dim=1)
            own = torch.randint(50, (batch, 3), generator=draw)
            own[::2, 1:] = -1
            found = []
            for loss in (plain, run):
                leaf = x.clone().requires_grad_()
                for tensor in (leaf, own):
                    mark_batch_size_dynamic(tensor)
                value = loss(leaf, memory, own, temperature=0.1)
                value.backward()
                found.append((value.detach(), leaf.grad))
            torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
