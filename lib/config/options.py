"""Every option of the program: name, type, default, meaning.

``Options`` is the one description: the flags, ``--help``, the checks, docs/options.md and a session's
``config.yaml`` are all made from it (``lib/config/parser.py``). Where the reference wrote tuples and numbers as
strings they are read as literals, never evaluated.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

QUOTIENT = re.compile(r"(\d+(?:\.\d*)?) ?/ ?(\d+(?:\.\d*)?)")


def _literal(value: Any) -> Any:
    """A string that spells a Python literal becomes it: '(32, 32)', '5e-4' (a string in YAML 1.1), 'None'.

    So do quotients of numbers, as in '(3./4., 4./3.)', the customary way to write ratios.
    """
    if isinstance(value, str):
        try:
            if "/" in value and len(value) < 200:  # searching a long string takes the square of its length
                value = QUOTIENT.sub(lambda found: repr(float(found[1]) / float(found[2])), value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's parser, on what only begins like a number
                return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
            return _unset(value)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):  # --size 32 32
        return tuple(_literal(v) for v in value) if len(value) > 1 else _literal(value[0]) if value else ()
    return value


def _unset(value: Any) -> Any:
    """'' and the words for nothing are None."""
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value


def _number(value: Any) -> Any:
    """A literal in which true and false, which Python takes for 1 and 0, are no numbers."""
    value = _literal(value)
    if any(isinstance(part, bool) for part in (value if isinstance(value, (list, tuple)) else [value])):
        raise ValueError("should be a number, not true or false")
    return value


def _size(value: Any) -> Any:
    """(H, W), or one number for the shorter edge."""
    value = _number(value)
    pair = value if isinstance(value, (list, tuple)) else (value,)
    if len(pair) > 2 or not all(type(v) is int and 0 < v <= 8192 for v in pair) or not pair:
        raise ValueError("should be a number of pixels from 1 to 8192, or two: height and width")
    return tuple(pair) if len(pair) == 2 else pair[0]


def _gpus(value: Any) -> Any:
    """'', '0', '0,1', '(0, 1)', 0 or [0, 1]."""
    value = _unset(value)
    if value is None:
        return ()
    parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
    try:
        numbers = tuple(int(str(part)) for part in (parts if isinstance(parts, (list, tuple)) else [parts]))
    except ValueError:
        numbers = (-1,)
    if any(not 0 <= number < 1024 for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError("should be different GPU numbers separated by commas, such as 0 or 0,1")
    return numbers


def _amp(value: Any) -> Any:
    """true and false are no precisions; YAML reads off as false."""
    return None if value is False else _lower(_unset(value))


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _words(value: Any) -> Any:
    """Names in a list, or in a string between commas or spaces; each once."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("should be one name or several")
    words = tuple(dict.fromkeys(word for part in parts for word in re.split(r"[\s,()\[\]'\"]+", part) if word))
    if not words:
        raise ValueError("should be one name or several")
    return words


def _report(value: Any) -> Any:
    """A switch, or a folder."""
    known = {"true": True, "false": False}.get(value.lower(), _unset(value)) if isinstance(value, str) else value
    return False if known is None else Path(known) if isinstance(known, str) else known


def _paths(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _protocols(value: Any) -> Any:
    return tuple(word.lower() for word in _words(value))


Integer = Annotated[int, BeforeValidator(_number), Field(lt=2**63)]  # Python spells no number of 4,301 digits
Number = Annotated[float, BeforeValidator(_number), Field(lt=2.0**128)]  # float32 ends there
Switch = Annotated[bool, BeforeValidator(_literal)]
Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Pair = Annotated[tuple[Positive, Positive] | None, BeforeValidator(_number)]
Jitter = Annotated[tuple[Strength, Strength, Strength, Hue] | None, BeforeValidator(_number)]
Means = Annotated[tuple[float, float, float] | None, BeforeValidator(_number)]
Deviations = Annotated[tuple[Positive, Positive, Positive] | None, BeforeValidator(_number)]
Seed = Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(_number)]
Gpus = Annotated[tuple[int, ...], BeforeValidator(_gpus)]
Name = Annotated[str, BeforeValidator(_lower)]
OptionalPath = Annotated[Path | None, BeforeValidator(_unset)]


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size; one number: a square."""
    return (size, size) if isinstance(size, int) else size


def _option(default: Any, group: str, meaning: str, *, this_run: bool = False, **limits: Any) -> Any:
    """One option. ``this_run``: it says what to do now and is not part of what a session repeats."""
    return Field(default, description=meaning, json_schema_extra={"group": group, "this_run": this_run}, **limits)


class Options(BaseModel):
    """All options, typed and frozen.

    Names and defaults are the reference's; the table of differences in docs/method.md lists the exceptions.
    ``None`` means "not set" and the meaning says what happens then.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    cfgs: tuple[Path, ...] = _option(
        (), "session", "YAML files with options; later files override earlier ones, flags override files", this_run=True
    )

    dataset: Name = _option("cifar10", "data", "data set by name")
    data_root: OptionalPath = _option(
        None, "data", "folder the data set lies in; the digits are embedded and need none"
    )
    download: Switch = _option(False, "data", "fetch the data set into data_root where it is not there", this_run=True)
    bounding_boxes: Switch = _option(False, "data", "cut images to their annotated boxes (cub200, dogs)")
    strict_data: Switch = _option(False, "data", "refuse a folder with unreadable images instead of skipping them")
    batch_size: Integer = _option(
        128, "data", "images in a batch, of all processes together; batch normalisation needs two of each", ge=2
    )
    workers_num: Integer = _option(
        4, "data", "processes that prepare images; 0: the training process itself", ge=0, le=1024
    )

    resize: Size = _option(256, "transforms", "pixels: resized to this before cropping; one number: the shorter edge")
    size: Size = _option(224, "transforms", "pixels the network sees; one number: a square")
    scale: Pair = _option(
        None, "transforms", "area share of random resized crops; not set: resize, then a random crop of the size"
    )
    ratio: Annotated[tuple[Positive, Positive], BeforeValidator(_number)] = _option(
        (3 / 4, 4 / 3), "transforms", "aspect ratios of random resized crops"
    )
    colorjitter: Jitter = _option(
        None, "transforms", "strength of random brightness, contrast, saturation and hue; not set: none"
    )
    random_grayscale: Number = _option(0.0, "transforms", "probability of turning a training image grey", ge=0, le=1)
    random_horizontal_flip: Switch = _option(False, "transforms", "flip half of the training images")
    means: Means = _option(None, "transforms", "channel means on RGB in [0, 1]; not set: the data set's own")
    stds: Deviations = _option(None, "transforms", "channel deviations on RGB in [0, 1]; not set: the data set's own")

    network: Name = _option("resnet18", "network", "backbone by name")
    low_dim: Integer = _option(128, "network", "size D of the embedding", ge=1, le=65536)
    pretrained: OptionalPath = _option(
        None, "network", "weights that training starts from, matched by name and shape; with --resume they are not read"
    )

    npc_temperature: Number = _option(
        0.1, "memory bank", "temperature of the non-parametric classifier, and sigma of the weighted kNN", gt=0
    )
    npc_momentum: Number = _option(
        0.5, "memory bank", "share of the old row kept when a row of the memory bank is updated", ge=0, le=1
    )

    ANs_select_rate: Number = _option(
        0.25, "discovery", "share of the samples that become anchors, times the round", ge=0, le=1
    )
    ANs_size: Integer = _option(1, "discovery", "neighbours k of an anchor, itself not counted", ge=1)

    loss: Name = _option("neighbourhood", "training", "loss by name")
    max_round: Integer = _option(5, "training", "rounds of the curriculum, counting round 0 (instance loss only)", ge=1)
    max_epoch: Integer = _option(200, "training", "epochs a round", ge=1)
    iter_size: Integer = _option(1, "training", "batches whose mean gradient makes one optimiser step", ge=1)
    display_freq: Integer = _option(
        1, "training", "steps between updates of the loss beside the bar; reading it waits for the device", ge=1
    )
    ckpt_every: Integer = _option(
        0, "training", "optimiser steps between checkpoints within an epoch; 0: one at the end of each epoch", ge=0
    )
    on_nonfinite: Annotated[Literal["stop", "skip"], BeforeValidator(_lower)] = _option(
        "stop",
        "training",
        "a loss that is not finite: stop the run, or skip its batch (which waits for the GPU)",
    )
    gpus: Gpus = _option((), "training", "GPUs to use, such as 0 or 0,1, a process each; empty: the CPU")
    sync_bn: Switch = _option(
        False, "training", "batch normalisation over the images of all processes; otherwise of each for itself"
    )
    amp: Annotated[Literal["bf16", "fp16"] | None, BeforeValidator(_amp)] = _option(
        None,
        "training",
        "mixed precision of the training steps: bf16, or fp16 with loss scaling; not set: float32",
    )
    tf32: Switch = _option(
        False, "training", "TF32 in place of float32 in products and convolutions, on GPUs that have it"
    )
    compile: Switch = _option(
        False, "training", "compile the network by torch.compile: slow to start, and then faster on most GPUs"
    )
    deterministic: Switch = _option(
        False, "training", "the same numbers in every run of a machine, on a GPU, too, where it costs speed"
    )
    seed: Seed = _option(
        None, "training", "seed of everything random; not set: the time, which is logged and kept in config.yaml"
    )

    optimizer: Annotated[Literal["sgd", "adam", "rmsprop"], BeforeValidator(_lower)] = _option(
        "sgd", "optimiser", "optimiser"
    )
    momentum: Number = _option(0.0, "optimiser", "momentum of sgd and rmsprop", ge=0)
    dampening: Number = _option(0.0, "optimiser", "dampening of sgd's momentum", ge=0)
    nesterov: Switch = _option(False, "optimiser", "Nesterov momentum for sgd")
    weight_decay: Number = _option(0.0, "optimiser", "L2 penalty on all parameters", ge=0)
    beta1: Number = _option(0.9, "optimiser", "adam: decay of the mean of the gradients", ge=0, lt=1)
    beta2: Number = _option(0.999, "optimiser", "adam: decay of the mean of their squares", ge=0, lt=1)
    amsgrad: Switch = _option(False, "optimiser", "adam: the AMSGrad variant")
    alpha: Number = _option(0.99, "optimiser", "rmsprop: decay of the mean of the squared gradients", ge=0, lt=1)
    centered: Switch = _option(False, "optimiser", "rmsprop: divide by the variance of the gradients, centred")
    eps: Number = _option(1e-8, "optimiser", "adam and rmsprop: added to the denominator", ge=0)

    base_lr: Number = _option(0.1, "schedule", "learning rate at the start of each round", gt=0)
    lr_policy: Annotated[Literal["step", "fixed", "multistep"], BeforeValidator(_lower)] = _option(
        "step", "schedule", "how the learning rate goes within a round"
    )
    lr_decay_offset: Integer = _option(0, "schedule", "step: epoch from which the drops are counted", ge=0)
    lr_decay_step: Integer = _option(0, "schedule", "step: epochs between drops; 0: no drops", ge=0)
    lr_decay_rate: Number = _option(0.1, "schedule", "step: factor of a drop", gt=0)
    lr_schedule: OptionalPath = _option(
        None, "schedule", "multistep: file with a line 'epoch: learning rate' for each change, epoch 0 first"
    )

    protocol: Annotated[tuple[Literal["knn", "nn", "linear", "cluster"], ...], BeforeValidator(_protocols)] = _option(
        ("knn",),
        "evaluation",
        "one or several of knn (weighted kNN), nn (nearest neighbour), linear (linear probe), cluster (k-means); each "
        "epoch is judged by the first, which is knn or nn; --test-only by all",
    )
    knn_k: Integer = _option(200, "evaluation", "voters K of the weighted kNN, cut to the training samples", ge=1)
    knn_sigma: Annotated[Positive | None, BeforeValidator(_number)] = _option(
        None, "evaluation", "width sigma of the votes' weights; not set: npc_temperature, as in the reference"
    )
    linear_layers: Annotated[tuple[str, ...], BeforeValidator(_words)] = _option(
        ("conv5",), "evaluation", "stages that the linear probe reads, of conv1 to conv5 and fc"
    )
    clusters: Integer = _option(
        10, "evaluation", "clusters of k-means where there are no labels; with labels: as many as classes", ge=2
    )
    published: Annotated[str | None, BeforeValidator(_unset)] = _option(
        None, "evaluation", "published figure and its source, shown beside the reached one"
    )
    val_fraction: Number = _option(
        0.0,
        "evaluation",
        "share of the training images, of each class alike, held out to choose the best epoch by; 0: the test images "
        "choose, as in the reference",
        ge=0,
        lt=1,
    )

    session: Annotated[str | None, BeforeValidator(_unset)] = _option(
        None, "session", "name of the session's folder; not set: the UTC time", this_run=True
    )
    sess_dir: Path = _option(Path("sessions"), "session", "folder that holds the sessions")
    resume: OptionalPath = _option(
        None,
        "session",
        "checkpoint, or a session's folder for its latest, to go on from; without --cfgs the session's options hold",
        this_run=True,
    )
    keep: Annotated[Literal["all", "best", "last"], BeforeValidator(_lower)] = _option(
        "all",
        "session",
        "checkpoints that stay beside the latest and the one before it: the best of every round (all), that of the "
        "current round (best), or none (last)",
    )
    restart: Switch = _option(False, "session", "with --resume: go on in a new session", this_run=True)
    test_only: Switch = _option(
        False,
        "session",
        "evaluate and train nothing; the figures are kept as evaluation.json beside the checkpoint, with debug nowhere",
        this_run=True,
    )
    export_features: OptionalPath = _option(
        None, "session", "at the end, write embeddings, labels and file names to this .npz", this_run=True
    )
    export_model: OptionalPath = _option(
        None, "session", "at the end, write the backbone to this .safetensors or .onnx", this_run=True
    )
    debug: Switch = _option(False, "session", "store nothing", this_run=True)
    brief: Switch = _option(False, "session", "only a line a round and warnings on the screen", this_run=True)
    export_neighbourhoods: OptionalPath = _option(
        None,
        "session",
        "at the end, write each training image's entropy, round as an anchor and neighbours to this .csv",
        this_run=True,
    )
    query: Annotated[tuple[Path, ...], BeforeValidator(_paths)] = _option(
        (), "session", "pictures to show the most similar training images of; nothing is trained", this_run=True
    )
    report: Annotated[bool | Path, BeforeValidator(_report)] = _option(
        False, "session", "write report.html at the end; with a session's folder: of that session, now", this_run=True
    )
    compare: Annotated[tuple[Path, ...], BeforeValidator(_paths)] = _option(
        (),
        "session",
        "sessions to print side by side, with comparison.csv and .png in sess_dir; nothing is trained",
        this_run=True,
    )
    print_args: Switch = _option(False, "session", "print the resolved options as YAML and stop", this_run=True)
    log_file: Switch = _option(True, "session", "write log.txt")
    log_tfb: Switch = _option(True, "session", "write TensorBoard events to tfboard/")

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{name}: the smaller number should come first (got {pair})")
        if self.scale is not None and self.scale[1] > 1:
            raise ValueError(f"scale: a crop cannot be larger than the image (got {self.scale})")
        if any(
            large < small
            for large, small in zip(height_and_width(self.resize), height_and_width(self.size), strict=True)
        ):
            raise ValueError(
                f"resize: {self.resize} is smaller than size: {self.size}, so no crop of that size fits; "
                "set both, for instance --resize 32 --size 32"
            )
        if self.lr_policy == "multistep" and self.lr_schedule is None:
            raise ValueError("lr_policy: multistep needs lr_schedule, a file of lines 'epoch: learning rate'")
        if self.nesterov and self.optimizer == "sgd" and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: needs a dampening of 0 and a momentum above 0, such as 0.9")
        if self.restart and self.resume is None:
            raise ValueError("restart: goes with resume, which names the checkpoint to go on from")
        if self.resume is not None and self.session is not None and not self.restart:
            raise ValueError("session: names a new session, and resume goes on in the old one; add --restart")
        return self

    @property
    def is_for_one(self) -> bool:
        """Whether one process shows something, and nothing is trained."""
        return isinstance(self.report, Path) or bool(self.query or self.compare)

    @property
    def training_protocol(self) -> str:
        """Which of 'knn' and 'nn' judges each epoch: the one named first, kNN where neither is."""
        return next((name for name in self.protocol if name in ("knn", "nn")), "knn")
