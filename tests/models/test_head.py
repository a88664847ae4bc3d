"""The two-layer head in every family of networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import models
from lib.training import pretrained
from models import NetworkError

FAMILIES = [("resnet10-w16", "linear", 8), ("imagenet-resnet18", "fc", 32), ("alexnet-small", "classifier.6", 16)]


@pytest.mark.parametrize(("name", "head", "size"), FAMILIES)
def test_mlp_head_replaces_the_last_layer(name: str, head: str, size: int) -> None:
    torch.manual_seed(0)
    own = models.build(name, low_dim=6).state_dict()
    torch.manual_seed(0)
    network = models.build(name, low_dim=6, size=(size, size), head="mlp").eval()
    values = network.state_dict()
    renamed = {f"{head}.2.{part}": f"{head}.{part}" for part in ("weight", "bias")}
    hidden = {f"{head}.0.weight", f"{head}.0.bias"}
    assert values.keys() - own.keys() == {*renamed, *hidden}
    assert all(torch.equal(values[key], own[renamed.get(key, key)]) for key in values.keys() - hidden)
    assert pretrained.head(network) == f"{head}.2.weight"

    seen: list[torch.Tensor] = []
    network.get_submodule(head).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    found = network(torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)))
    units = (seen[0] @ values[f"{head}.0.weight"].t() + values[f"{head}.0.bias"]).clamp(min=0)
    expected = F.normalize(units @ values[f"{head}.2.weight"].t() + values[f"{head}.2.bias"], dim=1)
    torch.testing.assert_close(found, expected)


def test_network_without_a_last_linear_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Convolutional(torch.nn.Module):
        def stages(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {}

    monkeypatch.setitem(models.NETWORKS, "convolutional", lambda low_dim: Convolutional())
    with pytest.raises(NetworkError, match="--head mlp: the network convolutional does not end in a linear layer"):
        models.build("convolutional", low_dim=4, head="mlp")
