"""The options: names and defaults of the reference, and accepted values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lib.config.options import Options

PUBLISHED: dict[str, Any] = {
    "cfgs": (),
    "dataset": "cifar10",
    "data_root": None,
    "resize": 256,
    "size": 224,
    "scale": None,
    "ratio": (3 / 4, 4 / 3),
    "colorjitter": None,
    "random_grayscale": 0.0,
    "random_horizontal_flip": False,
    "means": None,
    "stds": None,
    "batch_size": 128,
    "workers_num": 4,
    "network": "resnet18",
    "low_dim": 128,
    "npc_temperature": 0.1,
    "npc_momentum": 0.5,
    "ANs_select_rate": 0.25,
    "ANs_size": 1,
    "max_round": 5,
    "max_epoch": 200,
    "iter_size": 1,
    "display_freq": 1,
    "test_only": False,
    "optimizer": "sgd",
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "amsgrad": False,
    "alpha": 0.99,
    "centered": False,
    "eps": 1e-8,
    "base_lr": 0.1,
    "lr_policy": "step",
    "lr_decay_offset": 0,
    "lr_decay_step": 0,
    "lr_decay_rate": 0.1,
    "lr_schedule": None,
    "protocol": ("knn",),
    "session": None,
    "sess_dir": Path("sessions"),
    "print_args": False,
    "seed": None,
    "brief": False,
    "debug": False,
    "gpus": (),
    "resume": None,
    "restart": False,
}
"""The reference's options and the defaults in its code. It computes ``means``, ``stds``, ``session`` and ``seed``; here
they are not set."""

OTHER_DEFAULTS = ("log_file", "log_tfb")
"""Off in the reference's code and on in its ``base.yaml``; see docs/method.md."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_option_of_the_reference_keeps_its_name_and_default(name: str) -> None:
    value = getattr(Options(), name)
    assert value == PUBLISHED[name]
    assert type(value) is type(PUBLISHED[name]) or isinstance(value, Path)


@pytest.mark.parametrize("name", OTHER_DEFAULTS)
def test_logging_is_on_by_default(name: str) -> None:
    assert getattr(Options(), name) is True and getattr(Options(**{name: False}), name) is False


def test_options_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Options().batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("size", "(32, 32)", (32, 32)),
        ("size", "[32, 48]", (32, 48)),
        ("size", " 32 ", 32),
        ("size", (32,), 32),
        ("size", ["32", "48"], (32, 48)),
        ("resize", "(300, 400)", (300, 400)),
        ("scale", "(0.2, 1.0)", (0.2, 1.0)),
        ("scale", "None", None),
        ("scale", "", None),
        ("scale", None, None),
        ("ratio", "(0.75, 1.5)", (0.75, 1.5)),
        ("colorjitter", "(0.4, 0.4, 0.4, 0.4)", (0.4, 0.4, 0.4, 0.4)),
        ("colorjitter", "None", None),
        ("means", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("means", "null", None),
        ("stds", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("weight_decay", "5e-4", 0.0005),
        ("base_lr", "3e-2", 0.03),
        ("base_lr", "1", 1.0),
        ("batch_size", "64", 64),
        ("batch_size", 64.0, 64),
        ("seed", "None", None),
        ("seed", "7", 7),
        ("nesterov", "True", True),
        ("nesterov", "true", True),
        ("test_only", "False", False),
        ("dataset", "CIFAR100", "cifar100"),
        ("network", " ResNet50 ", "resnet50"),
        ("optimizer", "SGD", "sgd"),
        ("lr_policy", "Fixed", "fixed"),
        ("protocol", "NN", ("nn",)),
        ("protocol", ["knn", "Linear"], ("knn", "linear")),
        ("protocol", "nn, cluster", ("nn", "cluster")),
        ("session", 2019, "2019"),
    ],
)
def test_values_of_reference_option_files_are_accepted(name: str, given: Any, read: Any) -> None:
    value = getattr(Options(**{"momentum": 0.9, name: given}), name)
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize("name", ["data_root", "resume", "session", "lr_schedule"])
@pytest.mark.parametrize("given", ["None", ""])
def test_none_or_empty_path_or_name_is_not_set(name: str, given: str) -> None:
    """The reference evaluates strings, so 'None' and '' mean that a path is not set."""
    assert getattr(Options(**{name: given}), name) is None


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("", ()),
        (None, ()),
        ("0", (0,)),
        (0, (0,)),
        ("0,1", (0, 1)),
        (" 0 , 1 ", (0, 1)),
        ([0, 1], (0, 1)),
        ((1,), (1,)),
        ([], ()),
    ],
)
def test_gpus_are_read_in_every_format(given: Any, read: tuple[int, ...]) -> None:
    assert Options(gpus=given).gpus == read


@pytest.mark.parametrize("given", ["a", "0,", ",", "0 1", "0;1", -1, "-1", 1.5, True, {}, [[0]], "cuda:0"])
def test_invalid_gpus_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        Options(gpus=given)


NUMBERS = [name for name in PUBLISHED if type(PUBLISHED[name]) in (int, float) or name in ("seed", "gpus")]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("given", [True, False, "True", "False"])
def test_booleans_are_refused_as_numbers(name: str, given: Any) -> None:
    with pytest.raises(ValidationError):
        Options(**{name: given})


@pytest.mark.parametrize(
    ("name", "length"), [("scale", 2), ("ratio", 2), ("colorjitter", 4), ("means", 3), ("stds", 3), ("size", 2)]
)
@pytest.mark.parametrize("as_text", [False, True], ids=["values", "text"])
def test_boolean_in_a_list_of_numbers_is_refused(name: str, length: int, as_text: bool) -> None:
    values = (True,) * length if name != "colorjitter" else (True, True, True, False)
    with pytest.raises(ValidationError):
        Options(**{name: str(values) if as_text else list(values)})


@pytest.mark.parametrize("given", [float("nan"), float("inf"), float("-inf"), "nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "name", [n for n in NUMBERS if isinstance(PUBLISHED[n], float)] + ["batch_size", "size", "seed"]
)
def test_nonfinite_number_is_refused(name: str, given: Any) -> None:
    with pytest.raises(ValidationError):
        Options(**{name: given})


@pytest.mark.parametrize(("name", "length"), [("scale", 2), ("ratio", 2), ("colorjitter", 4), ("means", 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_number_in_a_list_is_refused(name: str, length: int, value: float) -> None:
    with pytest.raises(ValidationError):
        Options(**{name: [0.1] * (length - 1) + [value]})


RANGES = {
    "batch_size": (2, [1, 0, -3, 2.5]),
    "head": ("MLP", ["deep", None]),
    "embed": ("conv5", [None, [1]]),
    "ANs_size_first": (1, [0, 2]),
    "early_share": (1, [-0.1, 1.1]),
    "ANs_every": (0, [-1]),
    "entropy_loss": (0, [-1]),
    "views": (16, [0, 17, 3, 2.5]),
    "view_loss": (0, [-1, 1]),
    "view_temperature": (1e-9, [0, -1]),
    "workers_num": (1024, [-1, 1025]),
    "size": (1, [0, -1, 9000, (1, 2, 3), (), (0, 3), 2.5]),
    "scale": ((0.1, 1), [(0, 1), (-1, 1), (0.5, 0.2), (0.5, 1.5), (0.5,), 0.5, (0.1, 0.2, 0.3)]),
    "ratio": ((1, 1), [(0, 1), (2, 1), None, 1]),
    "colorjitter": ((0, 0, 0, 0.5), [(0, 0, 0, 0.6), (-1, 0, 0, 0), (0, 0, 0), 0.4]),
    "random_grayscale": (1, [1.1, -0.1]),
    "means": ((0, 0, 0), [(0, 0), 0.5]),
    "stds": ((1, 1, 1), [(0, 1, 1), (-1, 1, 1)]),
    "low_dim": (65536, [0, 65537]),
    "npc_temperature": (1e-9, [0, -1]),
    "npc_momentum": (1, [-0.1, 1.1]),
    "ANs_select_rate": (1, [-0.1, 1.1]),
    "ANs_size": (1, [0]),
    "max_round": (1, [0]),
    "max_epoch": (1, [0]),
    "iter_size": (1, [0]),
    "display_freq": (2**63 - 1, [0, 2**63]),
    "seed": (0, [-1, 2**63, 0.5]),
    "momentum": (0, [-1]),
    "dampening": (0, [-1]),
    "weight_decay": (3e38, [-1e-4, 1e39]),
    "base_lr": (1e-9, [0, -1]),
    "lr_decay_offset": (0, [-1]),
    "lr_decay_step": (0, [-1]),
    "lr_decay_rate": (1e-9, [0, -1]),
    "optimizer": ("rmsprop", ["sdg", None, 3]),
    "lr_policy": ("fixed", ["linear"]),
    "lr_span": ("Run", ["epoch", None]),
    "lr_warmup_epochs": (199, [-1, 200]),
    "protocol": ("nn", ["svm", [], 3, None]),
    "knn_k": (1, [0]),
    "knn_sigma": (0.01, [0, -1]),
    "val_fraction": (0, [-0.1, 1]),
    "nesterov": (True, ["maybe", 2, None]),
    "network": ("anything", [None, [1]]),
    "sess_dir": ("somewhere", [None, 3]),
}


@pytest.mark.parametrize("name", RANGES)
def test_range_limits_are_exact(name: str) -> None:
    inside, outside = RANGES[name]
    Options(**{"momentum": 0.9, name: inside})
    for value in outside:
        with pytest.raises(ValidationError) as refused:
            Options(**{"momentum": 0.9, name: value})
        error = refused.value.errors()[0]
        assert error["loc"][:1] == (name,) or name in error["msg"], value


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"resize": 32, "size": 33}, "resize"),
        ({"size": 257}, "resize"),
        ({"resize": (32, 20), "size": (32, 32)}, "resize"),
        ({"lr_policy": "multistep"}, "lr_schedule"),
        ({"nesterov": True, "momentum": 0}, "nesterov"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        ({"restart": True}, "resume"),
        ({"max_epoch": 5, "lr_warmup_epochs": 5}, "lr_warmup_epochs"),
        ({"early_size": 32}, "scale"),
        ({"early_size": (32, 300), "scale": (0.2, 1)}, "early_size: .* larger"),
        ({"max_epoch": 5, "max_round": 2, "lr_span": "run", "lr_warmup_epochs": 10}, "lr_warmup_epochs"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Options(**changes)


def test_first_epochs_of_the_run_have_the_early_size() -> None:
    options = Options(early_size=(12, 10), early_share=0.5, size=16, scale=(0.2, 1), max_round=3, max_epoch=3)
    sizes = [options.size_of_epoch(round, epoch) for round in range(3) for epoch in range(3)]
    assert sizes == [(12, 10)] * 4 + [(16, 16)] * 5
    assert Options(size=16).size_of_epoch(0, 0) == (16, 16)


def test_nesterov_needs_momentum_only_with_sgd() -> None:
    assert Options(nesterov=True, momentum=0, optimizer="adam").nesterov


@pytest.mark.parametrize(
    ("resize", "size"), [(32, 32), ((32, 64), (32, 64)), ((64, 32), (64, 32)), ((40, 70), (32, 64)), (64, (32, 64))]
)
def test_crop_as_large_as_the_image_is_accepted(resize: Any, size: Any) -> None:
    """Heights and widths are compared separately: (32, 64) fits into (32, 64)."""
    assert Options(resize=resize, size=size).size == size


@pytest.mark.parametrize("given", ["1if", "0x1for", "32and64"])
def test_invalid_literal_is_refused_without_a_warning(given: str) -> None:
    with warnings.catch_warnings(record=True) as shown_text:
        warnings.simplefilter("always")
        with pytest.raises(ValidationError):
            Options(base_lr=given)
    assert not [str(warning.message) for warning in shown_text]


def test_every_option_has_a_description_and_a_group() -> None:
    for name, field in Options.model_fields.items():
        assert field.description and len(field.description) > 5, name
        assert isinstance(field.json_schema_extra, dict) and field.json_schema_extra["group"], name


@pytest.mark.parametrize("text", ["(3./4., 4./3.)", "(3/4, 4/3)", "(3. / 4., 4. / 3.)", "(0.75, 1.3333333333333333)"])
def test_ratios_may_be_written_as_quotients(text: str) -> None:
    assert Options(ratio=text).ratio == (0.75, 4 / 3)


@pytest.mark.parametrize("text", ["(1/0, 4/3)", "(a/b, 4/3)", "1/2/", "(3//4, 4//3)"])
def test_invalid_quotient_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Options(ratio=text)
