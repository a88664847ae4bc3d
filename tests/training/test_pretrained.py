"""Weights of any origin: what is taken of them, what is said, and what is never opened."""

from __future__ import annotations

import io
import json
import logging
import pickle
import pickletools
import struct
import subprocess
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

import models
from lib.errors import UsageError
from lib.session.console import logger
from lib.training import checkpoint, pretrained
from lib.training.pretrained import load_pretrained, match, read


class Small(torch.nn.Module):
    """Eight tensors beside the counter of its normalisation."""

    def __init__(self, low_dim: int = 3) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.linear = torch.nn.Linear(4, low_dim)


TENSORS = "conv.weight conv.bias bn.weight bn.bias bn.running_mean bn.running_var linear.weight linear.bias".split()


def small(seed: int, **how: Any) -> Small:
    torch.manual_seed(seed)
    network = Small(**how)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(torch.rand(value.shape) * 9)
    return network


@pytest.fixture
def message() -> Iterator[list[str]]:
    """What the program's logger is told."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    log, listener, level = logger(), Listener(), logger().level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(listener)
    log.setLevel(level)


def refusal(path: Path, network: torch.nn.Module | None = None) -> str:
    with pytest.raises(UsageError) as refused:
        load_pretrained(network or small(0), path)
    text = str(refused.value)
    assert text.startswith(f"{path}: ") and text.isprintable() and 20 < len(text) < 600
    assert "weights_only" not in text
    return text


def python2(raw: bytes) -> bytes:
    """A file in PyTorch's old format as Python 2 pickled it: text as byte strings, integers over 32 bits as text."""
    file, out = io.BytesIO(raw), b""
    for _ in range(5):  # magic number, protocol, machine, content, keys of the storages behind them
        codes = [(code.name, value, place) for code, value, place in pickletools.genops(file)]
        ends = [place for *_, place in codes[1:]] + [file.tell()]
        for (name, value, place), end in zip(codes, ends, strict=True):
            if name == "BINUNICODE":
                text = value.encode()
                out += b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))
                out += text
            elif name == "LONG1" and abs(value) < 2**63:  # longer ones were of another type there, too
                out += b"I%d\n" % value
            else:
                out += raw[place:end]
    return out + raw[file.tell() :]


def old(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def new(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "zip": new,
    "the old format": old,
    "Python 2": lambda content: python2(old(content)),
}
FORMS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "net": lambda state: {"net": state, "acc": 0.5, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": "small", "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "bare": lambda state: state,
    "bare, plain": dict,
    "parameters": lambda state: OrderedDict(
        (k, torch.nn.Parameter(v, v.is_floating_point())) for k, v in state.items()
    ),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_form_is_taken_wholly(writer: str, form: str, wrapped: bool, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    state = (torch.nn.DataParallel(theirs) if wrapped else theirs).state_dict()
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(WRITERS[writer](FORMS[form](state)))
    assert (b"module." in path.read_bytes()) is wrapped
    found = load_pretrained(mine, path)
    assert sorted(found.loaded) == sorted(theirs.state_dict()) and not found.unexpected_keys and not found.missing_keys
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    again = small(3)
    checkpoint.load_network(again, checkpoint.load(path), path)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_file_of_python_2_has_no_text_of_python_3() -> None:
    """What the test above opens is really another file."""
    raw = python2(old(small(1).state_dict()))
    names = {code.name for code, *_ in pickletools.genops(raw[raw.index(b"\x80\x02", 100) :])}
    assert "SHORT_BINSTRING" in names and "BINUNICODE" not in names


def test_what_python_2_alone_pickled_that_way_is_read(tmp_path: Path) -> None:
    """PyTorch 1.0's optimisers name parameters by their addresses; texts of more than 255 bytes have their own code."""
    ids = [140_250_000_000_008, -140_250_000_000_016, 2**31, 7, 2**80]
    content = {
        "net": small(1).state_dict(),
        "optimizer": {"state": {i: {"momentum_buffer": torch.full((2,), 3.0)} for i in ids}, "ids": ids},
        "acc": 0.25,
        "session": "übung" + 300 * "x",
        "flags": (True, False, None),
    }
    raw = python2(old(content))
    file, codes = io.BytesIO(raw), set[str]()
    for _ in range(5):
        codes |= {code.name for code, *_ in pickletools.genops(file)}
    assert {"INT", "BINSTRING", "SHORT_BINSTRING", "LONG1"} <= codes and "BINUNICODE" not in codes
    (tmp_path / "a.ckpt").write_bytes(raw)
    back = read(tmp_path / "a.ckpt")
    assert list(back["optimizer"]["state"]) == ids == back["optimizer"]["ids"]
    assert all(entry["momentum_buffer"].tolist() == [3, 3] for entry in back["optimizer"]["state"].values())
    assert all(back[key] == content[key] for key in ("acc", "session", "flags"))
    assert all(torch.equal(back["net"][name], value) for name, value in content["net"].items())


class Built:
    """Pickled as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("writer", ["the old format", "Python 2"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_are_read_as_every_version_pickled_them(writer: str, tmp_path: Path) -> None:
    one, two = torch.arange(4.0), torch.arange(5.0)
    content = {
        "0.1": Built(torch._utils._rebuild_tensor, one.storage(), 0, (2, 2), (2, 1)),
        "early": Built(torch.nn.parameter.Parameter, two, True),
    }
    (tmp_path / "a.pth").write_bytes(WRITERS[writer](content))
    found = read(tmp_path / "a.pth")["weights"]
    assert torch.equal(found["0.1"], one.reshape(2, 2)) and torch.equal(found["early"], two)


def test_storages_of_a_gpu_come_to_the_cpu(tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    raw = python2(old(theirs.state_dict())).replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage")
    (tmp_path / "a.pth").write_bytes(raw.replace(b"U\x03cpu", b"U\x06cuda:0"))
    assert b"cuda:0" in (tmp_path / "a.pth").read_bytes()
    load_pretrained(mine, tmp_path / "a.pth")
    assert torch.equal(mine.conv.weight, theirs.conv.weight)


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.bin"])
def test_safetensors_are_known_by_what_they_hold(name: str, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / name, {"format": "pt"})
    assert not load_pretrained(mine, tmp_path / name).missing_keys
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize("writer", WRITERS)
def test_pytorch_s_files_may_have_any_ending(writer: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(WRITERS[writer](small(1).state_dict()))
    assert not load_pretrained(small(2), tmp_path / "a.safetensors").missing_keys


def test_checkpoint_keeps_its_keys_and_weight_files_have_none(tmp_path: Path) -> None:
    (tmp_path / "run.ckpt").write_bytes(new(FORMS["net"](small(1).state_dict())))
    (tmp_path / "other.pth").write_bytes(new(FORMS["state_dict"](small(1).state_dict())))
    assert {"net", "acc", "epoch"} == set(read(tmp_path / "run.ckpt"))
    assert {"weights"} == set(read(tmp_path / "other.pth"))


def test_torchvision_s_weights_lose_their_head_and_it_is_said(tmp_path: Path, message: list[str]) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    (tmp_path / "resnet18-f37072fd.pth").write_bytes(old(theirs))
    network = models.build("imagenet-resnet18", low_dim=16)
    before = network.fc.weight.clone()
    found = load_pretrained(network, tmp_path / "resnet18-f37072fd.pth")
    assert set(found.unexpected_keys) == {"fc.weight", "fc.bias"} == set(found.missing_keys)
    own = network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in theirs.items() if not name.startswith("fc."))
    assert torch.equal(network.fc.weight, before)
    text = "\n".join(message)
    assert "loaded 100 of 102 tensors" in text and "layer1 20" in text
    assert "unexpected keys, not loaded: fc.weight (of shape [1000, 512] where the network has [16, 512])" in text
    assert "missing keys, left as initialised: fc.weight, fc.bias" in text
    assert sum(line.startswith("WARNING") and "embedding layer" in line for line in message) == 1


def test_weights_with_the_head_bring_no_warning(tmp_path: Path, message: list[str]) -> None:
    (tmp_path / "a.pth").write_bytes(new(small(1).state_dict()))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert message == [f"INFO {tmp_path / 'a.pth'}: loaded 8 of 8 tensors: conv 2, bn 4, linear 2"]


def test_a_head_without_its_bias_is_no_random_projection(tmp_path: Path, message: list[str]) -> None:
    state = small(1).state_dict()
    del state["linear.bias"]
    (tmp_path / "a.pth").write_bytes(new(state))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert message[1:] == ["INFO missing keys, left as initialised: linear.bias"]


def test_the_path_that_is_taken_away_is_said(tmp_path: Path, message: list[str]) -> None:
    (tmp_path / "a.pth").write_bytes(new({f"module.{name}": v for name, v in small(1).state_dict().items()}))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert len(message) == 1 and "8 of 8 tensors (prefix 'module.' removed): conv 2" in message[0]


def test_fresh_tensors_before_the_head_bring_no_warning_either(tmp_path: Path, message: list[str]) -> None:
    state = {name: value for name, value in small(1).state_dict().items() if not name.startswith("conv.")}
    (tmp_path / "a.pth").write_bytes(new(state))
    assert load_pretrained(small(2), tmp_path / "a.pth").missing_keys == ["conv.weight", "conv.bias"]
    assert not any(line.startswith("WARNING") for line in message)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_convolutions_of_an_alexnet_trained_on_gpus_are_found(prefix: str) -> None:
    with torch.device("meta"):
        network = models.build("alexnet-small", low_dim=8)
    own = network.state_dict()
    theirs = {prefix + name.replace("features.", "features.module."): value for name, value in own.items()}
    found = match(network, theirs)
    assert sorted(found.loaded) == sorted(own) and not found.unexpected_keys and found.prefix == prefix


@pytest.mark.parametrize("prefix", ["module.", "module.encoder_q.", "backbone.", "a.b.c.d."])
def test_a_path_before_every_name_is_taken_away(prefix: str) -> None:
    theirs = {prefix + name: value for name, value in small(1).state_dict().items()}
    found = match(small(2), {**theirs, "queue": torch.zeros(5)})
    assert (
        found.prefix == prefix and not found.missing_keys and found.unexpected_keys == {"queue": "not in this network"}
    )


def test_of_two_networks_in_a_file_the_one_that_fits_better_is_taken() -> None:
    state = small(1).state_dict()
    teacher = {
        f"{path}{name}": value + 1
        for path in ("teacher.", "")
        for name, value in state.items()
        if name.startswith("bn.")
    }
    student = {f"student.{name}": value for name, value in state.items()}
    found = match(small(2), {**student, **teacher})
    assert found.prefix == "student." and set(found.unexpected_keys) == set(teacher)
    assert all(torch.equal(value, state[name]) for name, value in found.loaded.items())


def test_names_lead_nowhere_where_the_shapes_are_others() -> None:
    state = small(1).state_dict()
    wider = {f"teacher.{name}": value[None] for name, value in state.items()}
    fitting = {f"student.{name}": value for name, value in state.items() if name != "conv.bias"}
    found = match(small(2), {**wider, **fitting})
    assert found.prefix == "student." and found.missing_keys == ["conv.bias"]


@pytest.mark.parametrize("there", range(9))
def test_less_than_half_of_the_tensors_is_refused(there: int, tmp_path: Path) -> None:
    state = small(1).state_dict()
    kept = {name: state[name] for name in TENSORS[:there]}
    (tmp_path / "a.pth").write_bytes(
        new({**kept, "other.weight": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(3)})
    )
    mine = small(2)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    if there < 4:
        text = refusal(tmp_path / "a.pth", mine)
        assert f"only {there} of the network's 8 tensors" in text and "other.weight" in text
        assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    else:
        found = load_pretrained(mine, tmp_path / "a.pth")
        assert found.missing_keys == TENSORS[there:] and set(found.unexpected_keys) == {"other.weight"}
        now = mine.state_dict()
        assert all(torch.equal(now[name], state[name] if name in kept else before[name]) for name in TENSORS)


def test_a_refusal_says_why_the_file_s_tensors_do_not_fit(tmp_path: Path) -> None:
    strange = {"conv.weight": torch.zeros(4, 3, 7, 7), "linear.bias": torch.zeros(3, dtype=torch.int8)}
    (tmp_path / "a.pth").write_bytes(new({"state_dict": strange}))
    text = refusal(tmp_path / "a.pth")
    assert "conv.weight (of shape [4, 3, 7, 7] where the network has [4, 3, 3, 3])" in text
    assert "linear.bias (of type int8)" in text and "--network" in text and "conv.bias" in text and "and 5 more" in text


@pytest.mark.parametrize("form", ["net", "state_dict", "model"])
def test_weights_of_nothing_are_refused(form: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(new(FORMS[form]({})))
    assert "only 0 of the network's 8 tensors" in refusal(tmp_path / "a.pth")


def test_a_counter_that_counts_nothing_is_left_out() -> None:
    found = match(small(2), {**small(1).state_dict(), "bn.num_batches_tracked": torch.tensor(3.0)})
    assert found.unexpected_keys == {"bn.num_batches_tracked": "of type float32"} and not found.missing_keys


def test_counters_that_old_files_lack_are_not_missed(tmp_path: Path, message: list[str]) -> None:
    state = {name: value for name, value in small(1).state_dict().items() if name in TENSORS}
    (tmp_path / "a.pth").write_bytes(old(state))
    assert load_pretrained(small(2), tmp_path / "a.pth").missing_keys == []
    assert len(message) == 1 and "8 of 8" in message[0]


def test_long_lists_of_names_are_cut(tmp_path: Path, message: list[str]) -> None:
    more = {f"other{i}": torch.zeros(1) for i in range(30)}
    (tmp_path / "a.pth").write_bytes(new({**small(1).state_dict(), **more}))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert "other19 (not in this network) and 10 more" in message[1] and "other20" not in message[1]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_the_network_s(kind: torch.dtype, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    state = {n: v.to(kind) if v.is_floating_point() else v for n, v in theirs.state_dict().items()}
    (tmp_path / "a.pth").write_bytes(new(state))
    load_pretrained(mine, tmp_path / "a.pth")
    assert mine.conv.weight.dtype == torch.float32
    assert torch.equal(mine.conv.weight, theirs.conv.weight.to(kind).float())


STRANGE: dict[str, Callable[[torch.Tensor], Any]] = {
    "whole numbers": lambda value: value.long(),
    "yes or no": lambda value: value.bool(),
    "no memory": lambda value: value.to("meta"),
    "quantised": lambda value: torch.quantize_per_tensor(value.detach(), 0.1, 0, torch.qint8),
    "complex": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse(),
    "a list": lambda value: value.tolist(),
    "text": str,
    "nothing": lambda value: None,
    "another shape": lambda value: value[None],
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_no_weights_are_left_out_with_the_reason(kind: str, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(small(1).state_dict())
    state["conv.weight"] = STRANGE[kind](state["conv.weight"])
    (tmp_path / "a.pth").write_bytes(new({"state_dict": state}))
    mine = small(2)
    before = mine.conv.weight.clone()
    found = load_pretrained(mine, tmp_path / "a.pth")
    assert (
        list(found.unexpected_keys) == ["conv.weight"]
        and found.missing_keys == ["conv.weight"]
        and found.unexpected_keys["conv.weight"]
    )
    assert torch.equal(mine.conv.weight, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_out() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])  # PyTorch 2.6 reads them from files
    assert match(small(2), {**small(1).state_dict(), "conv.weight": nested}).unexpected_keys == {
        "conv.weight": "not a plain tensor"
    }


def test_names_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(new({"state_dict": {**small(1).state_dict(), 5: torch.zeros(1)}}))
    assert set(load_pretrained(small(2), tmp_path / "a.pth").unexpected_keys) == {"5"}


@pytest.mark.parametrize(
    "content",
    [{}, [], None, 5, torch.zeros(3), {"epoch": 3}, {"state_dict": 5}, {"a": torch.zeros(1), "b": 2}],
    ids=str,
)
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(new(content))
    assert "no weights" in refusal(tmp_path / "a.pth")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.proof)],)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(
    writer: str, form: str, ending: str, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    content = FORMS[form](small(1).state_dict()) if form != "parameters" else dict(small(1).state_dict())
    content["evil"] = Evil(proof)
    path = tmp_path / f"a{ending}"
    path.write_bytes(WRITERS[writer](content))
    text = refusal(path)
    assert not proof.exists()
    assert "could run code" in text
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # the trap is a real one
    assert proof.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_whole_network_pickled_is_not_opened(writer: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(WRITERS[writer](torch.nn.Linear(2, 2)))
    assert "other than tensors and plain containers" in refusal(tmp_path / "a.pth")


def test_a_program_of_torchscript_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(new(small(1).state_dict()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].split("/")[0] + "/constants.pkl", pickle.dumps((), protocol=2))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert "other than tensors and plain containers" in refusal(path)
    assert not heard


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_of_pytorch_cut_short_anywhere_is_refused(writer: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "a.pth", WRITERS[writer]({"a": torch.arange(3.0), "b": torch.zeros(2, 2)})
    for length in [*range(30), *range(30, len(whole), 11 if writer == "zip" else 1)]:
        path.write_bytes(whole[:length])
        assert "damaged" in refusal(path)


@pytest.mark.parametrize("writer", [*WRITERS, "safetensors"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_damaged_byte_never_ends_in_a_traceback(flip: int, writer: str, tmp_path: Path) -> None:
    state, path = {"a": torch.arange(3.0)}, tmp_path / "a.pth"
    whole = safetensors.torch.save(state) if writer == "safetensors" else WRITERS[writer](state)
    for place in range(0, len(whole), 9 if writer == "zip" else 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        refusal(path)


def test_a_safetensors_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = safetensors.torch.save(small(1).state_dict())
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"conv.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refusal(path)


def test_a_checkpoint_is_read_without_a_copy_of_it(tmp_path: Path) -> None:
    """Of a bank of many gigabytes one is enough; what PyTorch allocates for tensors is not traced."""
    path = tmp_path / "large.ckpt"
    checkpoint.save({"net": {"a": torch.zeros(3)}, "npc": {"memory": torch.ones(2**16, 128)}}, path)
    tracemalloc.start()
    loaded = checkpoint.load(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded["npc"]["memory"].sum() == 2**23
    assert most < 4e6 < path.stat().st_size


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    refusal(tmp_path)


def test_a_pickle_that_is_not_pytorch_s_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"net": {}}, protocol=2))
    refusal(tmp_path / "a.pkl")


def test_the_head_is_the_last_layer_whatever_it_is_called() -> None:
    with torch.device("meta"):
        heads = {
            name: pretrained.head(models.build(name, low_dim=4))
            for name in ("resnet10", "imagenet-resnet18", "alexnet")
        }
    assert heads == {"resnet10": "linear.weight", "imagenet-resnet18": "fc.weight", "alexnet": "classifier.6.weight"}
