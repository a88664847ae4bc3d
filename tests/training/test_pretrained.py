"""Weights from other programs: what is loaded, what is logged, and which files are refused."""

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
    """Eight tensors and the batch counter of BatchNorm."""

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
def logged() -> Iterator[list[str]]:
    """The lines that the program logs."""
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
    """A file in PyTorch's legacy format as Python 2 pickled it: text as byte strings, integers over 32 bits as text."""
    file, out = io.BytesIO(raw), b""
    for _ in range(5):  # magic number, protocol, machine, content, keys of the storages behind them
        codes = [(code.name, value, place) for code, value, place in pickletools.genops(file)]
        ends = [place for *_, place in codes[1:]] + [file.tell()]
        for (name, value, place), end in zip(codes, ends, strict=True):
            if name == "BINUNICODE":
                text = value.encode()
                out += b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + struct.pack("<i", len(text))
                out += text
            elif name == "LONG1" and abs(value) < 2**63:  # Python 2 had another type for longer ones, too
                out += b"I%d\n" % value
            else:
                out += raw[place:end]
    return out + raw[file.tell() :]


def legacy_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zip_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "zip": zip_bytes,
    "legacy": legacy_bytes,
    "Python 2": lambda content: python2(legacy_bytes(content)),
}
LAYOUTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
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
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_file_layout_is_loaded_completely(writer: str, layout: str, wrapped: bool, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    state = (torch.nn.DataParallel(theirs) if wrapped else theirs).state_dict()
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(WRITERS[writer](LAYOUTS[layout](state)))
    assert (b"module." in path.read_bytes()) is wrapped
    found = load_pretrained(mine, path)
    assert sorted(found.loaded) == sorted(theirs.state_dict()) and not found.unexpected_keys and not found.missing_keys
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    again = small(3)
    checkpoint.load_network(again, checkpoint.load(path), path)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())


def test_python_2_file_of_the_tests_has_byte_strings_only() -> None:
    """Otherwise the test above would read an ordinary file of Python 3."""
    raw = python2(legacy_bytes(small(1).state_dict()))
    names = {code.name for code, *_ in pickletools.genops(raw[raw.index(b"\x80\x02", 100) :])}
    assert "SHORT_BINSTRING" in names and "BINUNICODE" not in names


def test_python_2_pickle_opcodes_are_read(tmp_path: Path) -> None:
    """PyTorch 1.0's optimisers name parameters by addresses; longer strings have another opcode."""
    ids = [140_250_000_000_008, -140_250_000_000_016, 2**31, 7, 2**80]
    content = {
        "net": small(1).state_dict(),
        "optimizer": {"state": {i: {"momentum_buffer": torch.full((2,), 3.0)} for i in ids}, "ids": ids},
        "acc": 0.25,
        "session": "übung" + 300 * "x",
        "flags": (True, False, None),
    }
    raw = python2(legacy_bytes(content))
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


class PickledCall:
    """Pickled as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("writer", ["legacy", "Python 2"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_pickled_by_early_pytorch_are_read(writer: str, tmp_path: Path) -> None:
    one, two = torch.arange(4.0), torch.arange(5.0)
    content = {
        "0.1": PickledCall(torch._utils._rebuild_tensor, one.storage(), 0, (2, 2), (2, 1)),
        "early": PickledCall(torch.nn.parameter.Parameter, two, True),
    }
    (tmp_path / "a.pth").write_bytes(WRITERS[writer](content))
    found = read(tmp_path / "a.pth")["weights"]
    assert torch.equal(found["0.1"], one.reshape(2, 2)) and torch.equal(found["early"], two)


def test_gpu_tensors_are_loaded_to_the_cpu(tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    raw = python2(legacy_bytes(theirs.state_dict())).replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage")
    (tmp_path / "a.pth").write_bytes(raw.replace(b"U\x03cpu", b"U\x06cuda:0"))
    assert b"cuda:0" in (tmp_path / "a.pth").read_bytes()
    load_pretrained(mine, tmp_path / "a.pth")
    assert torch.equal(mine.conv.weight, theirs.conv.weight)


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.bin"])
def test_safetensors_are_recognised_by_content(name: str, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / name, {"format": "pt"})
    assert not load_pretrained(mine, tmp_path / name).missing_keys
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize("writer", WRITERS)
def test_pytorch_files_are_recognised_by_content(writer: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(WRITERS[writer](small(1).state_dict()))
    assert not load_pretrained(small(2), tmp_path / "a.safetensors").missing_keys


def test_other_keys_are_kept_for_checkpoints_only(tmp_path: Path) -> None:
    (tmp_path / "run.ckpt").write_bytes(zip_bytes(LAYOUTS["net"](small(1).state_dict())))
    (tmp_path / "other.pth").write_bytes(zip_bytes(LAYOUTS["state_dict"](small(1).state_dict())))
    assert {"net", "acc", "epoch"} == set(read(tmp_path / "run.ckpt"))
    assert {"weights"} == set(read(tmp_path / "other.pth"))


def test_torchvision_weights_load_without_head_with_a_warning(tmp_path: Path, logged: list[str]) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    (tmp_path / "resnet18-f37072fd.pth").write_bytes(legacy_bytes(theirs))
    network = models.build("imagenet-resnet18", low_dim=16)
    before = network.fc.weight.clone()
    found = load_pretrained(network, tmp_path / "resnet18-f37072fd.pth")
    assert set(found.unexpected_keys) == {"fc.weight", "fc.bias"} == set(found.missing_keys)
    own = network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in theirs.items() if not name.startswith("fc."))
    assert torch.equal(network.fc.weight, before)
    text = "\n".join(logged)
    assert "loaded 100 of 102 tensors" in text and "layer1 20" in text
    assert "unexpected keys, not loaded: fc.weight (of shape [1000, 512] where the network has [16, 512])" in text
    assert "missing keys, left as initialised: fc.weight, fc.bias" in text
    assert sum(line.startswith("WARNING") and "embedding layer" in line for line in logged) == 1


def test_no_warning_if_the_head_is_loaded(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "a.pth").write_bytes(zip_bytes(small(1).state_dict()))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert logged == [f"INFO {tmp_path / 'a.pth'}: loaded 8 of 8 tensors: conv 2, bn 4, linear 2"]


def test_no_warning_if_only_the_bias_of_the_head_is_missing(tmp_path: Path, logged: list[str]) -> None:
    state = small(1).state_dict()
    del state["linear.bias"]
    (tmp_path / "a.pth").write_bytes(zip_bytes(state))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert logged[1:] == ["INFO missing keys, left as initialised: linear.bias"]


def test_removed_prefix_is_logged(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "a.pth").write_bytes(zip_bytes({f"module.{name}": v for name, v in small(1).state_dict().items()}))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert len(logged) == 1 and "8 of 8 tensors (prefix 'module.' removed): conv 2" in logged[0]


def test_no_warning_if_layers_before_the_head_are_missing(tmp_path: Path, logged: list[str]) -> None:
    state = {name: value for name, value in small(1).state_dict().items() if not name.startswith("conv.")}
    (tmp_path / "a.pth").write_bytes(zip_bytes(state))
    assert load_pretrained(small(2), tmp_path / "a.pth").missing_keys == ["conv.weight", "conv.bias"]
    assert not any(line.startswith("WARNING") for line in logged)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_module_prefix_inside_alexnet_features_is_removed(prefix: str) -> None:
    with torch.device("meta"):
        network = models.build("alexnet-small", low_dim=8)
    own = network.state_dict()
    theirs = {prefix + name.replace("features.", "features.module."): value for name, value in own.items()}
    found = match(network, theirs)
    assert sorted(found.loaded) == sorted(own) and not found.unexpected_keys and found.prefix == prefix


@pytest.mark.parametrize("prefix", ["module.", "module.encoder_q.", "backbone.", "a.b.c.d."])
def test_common_prefix_of_all_names_is_removed(prefix: str) -> None:
    theirs = {prefix + name: value for name, value in small(1).state_dict().items()}
    found = match(small(2), {**theirs, "queue": torch.zeros(5)})
    assert (
        found.prefix == prefix and not found.missing_keys and found.unexpected_keys == {"queue": "not in this network"}
    )


def test_better_matching_network_of_two_in_a_file_is_loaded() -> None:
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


def test_prefix_is_chosen_by_shapes_as_well_as_names() -> None:
    state = small(1).state_dict()
    wider = {f"teacher.{name}": value[None] for name, value in state.items()}
    fitting = {f"student.{name}": value for name, value in state.items() if name != "conv.bias"}
    found = match(small(2), {**wider, **fitting})
    assert found.prefix == "student." and found.missing_keys == ["conv.bias"]


@pytest.mark.parametrize("there", range(9))
def test_file_matching_less_than_half_of_the_tensors_is_refused(there: int, tmp_path: Path) -> None:
    state = small(1).state_dict()
    kept = {name: state[name] for name in TENSORS[:there]}
    (tmp_path / "a.pth").write_bytes(
        zip_bytes({**kept, "other.weight": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(3)})
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


def test_error_gives_the_reason_each_tensor_does_not_match(tmp_path: Path) -> None:
    strange = {"conv.weight": torch.zeros(4, 3, 7, 7), "linear.bias": torch.zeros(3, dtype=torch.int8)}
    (tmp_path / "a.pth").write_bytes(zip_bytes({"state_dict": strange}))
    text = refusal(tmp_path / "a.pth")
    assert "conv.weight (of shape [4, 3, 7, 7] where the network has [4, 3, 3, 3])" in text
    assert "linear.bias (of type int8)" in text and "--network" in text and "conv.bias" in text and "and 5 more" in text


@pytest.mark.parametrize("layout", ["net", "state_dict", "model"])
def test_empty_state_dict_is_refused(layout: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(zip_bytes(LAYOUTS[layout]({})))
    assert "only 0 of the network's 8 tensors" in refusal(tmp_path / "a.pth")


def test_batch_counter_of_float_dtype_is_not_loaded() -> None:
    found = match(small(2), {**small(1).state_dict(), "bn.num_batches_tracked": torch.tensor(3.0)})
    assert found.unexpected_keys == {"bn.num_batches_tracked": "of type float32"} and not found.missing_keys


def test_missing_batch_counters_of_old_files_are_not_reported(tmp_path: Path, logged: list[str]) -> None:
    state = {name: value for name, value in small(1).state_dict().items() if name in TENSORS}
    (tmp_path / "a.pth").write_bytes(legacy_bytes(state))
    assert load_pretrained(small(2), tmp_path / "a.pth").missing_keys == []
    assert len(logged) == 1 and "8 of 8" in logged[0]


def test_long_lists_of_names_are_shortened(tmp_path: Path, logged: list[str]) -> None:
    more = {f"other{i}": torch.zeros(1) for i in range(30)}
    (tmp_path / "a.pth").write_bytes(zip_bytes({**small(1).state_dict(), **more}))
    load_pretrained(small(2), tmp_path / "a.pth")
    assert "other19 (not in this network) and 10 more" in logged[1] and "other20" not in logged[1]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_dtype_of_the_network(kind: torch.dtype, tmp_path: Path) -> None:
    theirs, mine = small(1), small(2)
    state = {n: v.to(kind) if v.is_floating_point() else v for n, v in theirs.state_dict().items()}
    (tmp_path / "a.pth").write_bytes(zip_bytes(state))
    load_pretrained(mine, tmp_path / "a.pth")
    assert mine.conv.weight.dtype == torch.float32
    assert torch.equal(mine.conv.weight, theirs.conv.weight.to(kind).float())


UNUSABLE: dict[str, Callable[[torch.Tensor], Any]] = {
    "int64": lambda value: value.long(),
    "bool": lambda value: value.bool(),
    "meta device": lambda value: value.to("meta"),
    "quantised": lambda value: torch.quantize_per_tensor(value.detach(), 0.1, 0, torch.qint8),
    "complex": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse(),
    "list": lambda value: value.tolist(),
    "string": str,
    "None": lambda value: None,
    "another shape": lambda value: value[None],
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.filterwarnings("ignore")
def test_unusable_values_are_skipped_with_the_reason(kind: str, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(small(1).state_dict())
    state["conv.weight"] = UNUSABLE[kind](state["conv.weight"])
    (tmp_path / "a.pth").write_bytes(zip_bytes({"state_dict": state}))
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
def test_nested_tensors_are_skipped() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])  # PyTorch 2.6 reads them from files
    assert match(small(2), {**small(1).state_dict(), "conv.weight": nested}).unexpected_keys == {
        "conv.weight": "not a plain tensor"
    }


def test_key_that_is_not_a_string_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(zip_bytes({"state_dict": {**small(1).state_dict(), 5: torch.zeros(1)}}))
    assert set(load_pretrained(small(2), tmp_path / "a.pth").unexpected_keys) == {"5"}


@pytest.mark.parametrize(
    "content",
    [{}, [], None, 5, torch.zeros(3), {"epoch": 3}, {"state_dict": 5}, {"a": torch.zeros(1), "b": 2}],
    ids=str,
)
def test_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(zip_bytes(content))
    assert "no weights" in refusal(tmp_path / "a.pth")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.proof)],)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_file_with_code_is_refused_and_not_run(writer: str, layout: str, ending: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    content = LAYOUTS[layout](small(1).state_dict()) if layout != "parameters" else dict(small(1).state_dict())
    content["evil"] = Evil(proof)
    path = tmp_path / f"a{ending}"
    path.write_bytes(WRITERS[writer](content))
    text = refusal(path)
    assert not proof.exists()
    assert "could run code" in text
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # the code does run if the file is trusted
    assert proof.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_pickled_module_is_refused(writer: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(WRITERS[writer](torch.nn.Linear(2, 2)))
    assert "other than tensors and plain containers" in refusal(tmp_path / "a.pth")


def test_torchscript_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(zip_bytes(small(1).state_dict()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].split("/")[0] + "/constants.pkl", pickle.dumps((), protocol=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "other than tensors and plain containers" in refusal(path)
    assert not caught


@pytest.mark.parametrize("writer", WRITERS)
def test_truncated_pytorch_file_is_refused(writer: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "a.pth", WRITERS[writer]({"a": torch.arange(3.0), "b": torch.zeros(2, 2)})
    for length in [*range(30), *range(30, len(whole), 11 if writer == "zip" else 1)]:
        path.write_bytes(whole[:length])
        assert "damaged" in refusal(path)


@pytest.mark.parametrize("writer", [*WRITERS, "safetensors"])
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_damaged_byte_is_refused_without_a_traceback(flip: int, writer: str, tmp_path: Path) -> None:
    state, path = {"a": torch.arange(3.0)}, tmp_path / "a.pth"
    whole = safetensors.torch.save(state) if writer == "safetensors" else WRITERS[writer](state)
    for place in range(0, len(whole), 9 if writer == "zip" else 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        refusal(path)


def test_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = safetensors.torch.save(small(1).state_dict())
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_safetensors_header_with_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"conv.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refusal(path)


def test_checkpoint_is_read_without_a_second_copy_in_memory(tmp_path: Path) -> None:
    """A memory bank can have many gigabytes. tracemalloc does not count what PyTorch allocates for tensors."""
    path = tmp_path / "large.ckpt"
    checkpoint.save({"net": {"a": torch.zeros(3)}, "npc": {"memory": torch.ones(2**16, 128)}}, path)
    tracemalloc.start()
    loaded = checkpoint.load(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded["npc"]["memory"].sum() == 2**23
    assert most < 4e6 < path.stat().st_size


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    refusal(tmp_path)


def test_pickle_not_written_by_pytorch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"net": {}}, protocol=2))
    refusal(tmp_path / "a.pkl")


def test_head_is_the_last_layer_of_any_name() -> None:
    with torch.device("meta"):
        heads = {
            name: pretrained.head(models.build(name, low_dim=4))
            for name in ("resnet10", "imagenet-resnet18", "alexnet")
        }
    assert heads == {"resnet10": "linear.weight", "imagenet-resnet18": "fc.weight", "alexnet": "classifier.6.weight"}
