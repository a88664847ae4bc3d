"""All options: name, type, default, limits and help text.

The command-line flags, ``--help``, the checks, docs/options.md and a session's ``config.yaml`` are all generated from
``Options`` (see ``lib/config/parser.py``). Option files of the reference write tuples and numbers as strings;
these are parsed as literals, never evaluated as code.
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
    """Parses strings that contain a Python literal: '(32, 32)', '5e-4' (a string in YAML 1.1), 'None'.

    Quotients of numbers are computed, as in '(3./4., 4./3.)', the usual way to write aspect ratios.
    """
    if isinstance(value, str):
        try:
            if "/" in value and len(value) < 200:  # the search is quadratic in the length
                value = QUOTIENT.sub(lambda found: repr(float(found[1]) / float(found[2])), value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SyntaxWarning for text such as "1or 2"
                return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
            return _unset(value)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):  # --size 32 32
        return tuple(_literal(v) for v in value) if len(value) > 1 else _literal(value[0]) if value else ()
    return value


def _unset(value: Any) -> Any:
    """Maps '', 'none' and 'null' to None."""
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value


def _number(value: Any) -> Any:
    """``_literal`` that refuses booleans, which Python accepts as 1 and 0."""
    value = _literal(value)
    if any(isinstance(part, bool) for part in (value if isinstance(value, (list, tuple)) else [value])):
        raise ValueError("must be a number, not true or false")
    return value


def _size(value: Any) -> Any:
    """(H, W), or one number."""
    value = _number(value)
    pair = value if isinstance(value, (list, tuple)) else (value,)
    if len(pair) > 2 or not all(type(v) is int and 0 < v <= 8192 for v in pair) or not pair:
        raise ValueError("must be one number of pixels from 1 to 8192, or two: height and width")
    return tuple(pair) if len(pair) == 2 else pair[0]


def _optional_size(value: Any) -> Any:
    """A size, or None."""
    value = _unset(value)
    return None if value is None else _size(value)


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
        raise ValueError("must be distinct GPU numbers separated by commas, such as 0 or 0,1")
    return numbers


def _amp(value: Any) -> Any:
    """Maps false to None: YAML reads ``off`` as false."""
    return None if value is False else _lower(_unset(value))


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _words(value: Any) -> Any:
    """Names in a list, or in a string separated by commas or spaces, without duplicates."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("must be one or more names")
    words = tuple(dict.fromkeys(word for part in parts for word in re.split(r"[\s,()\[\]'\"]+", part) if word))
    if not words:
        raise ValueError("must be one or more names")
    return words


def _report(value: Any) -> Any:
    """A boolean, or a folder."""
    known = {"true": True, "false": False}.get(value.lower(), _unset(value)) if isinstance(value, str) else value
    return False if known is None else Path(known) if isinstance(known, str) else known


def _paths(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _protocols(value: Any) -> Any:
    return tuple(word.lower() for word in _words(value))


Integer = Annotated[int, BeforeValidator(_number), Field(lt=2**63)]  # int64
Number = Annotated[float, BeforeValidator(_number), Field(lt=2.0**128)]  # the range of float32
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
Protocols = Annotated[tuple[Literal["knn", "nn", "linear", "cluster", "graph"], ...], BeforeValidator(_protocols)]
OptionalPath = Annotated[Path | None, BeforeValidator(_unset)]


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size; one number means a square."""
    return (size, size) if isinstance(size, int) else size


def _option(default: Any, group: str, meaning: str, *, this_run: bool = False, **limits: Any) -> Any:
    """Defines an option. ``this_run``: it applies to this start only and is not written to config.yaml."""
    return Field(default, description=meaning, json_schema_extra={"group": group, "this_run": this_run}, **limits)


class Options(BaseModel):
    """All options, typed and frozen.

    Names and defaults are the reference's; docs/method.md lists the exceptions. ``None`` means "not set", and the help
    text says what happens then.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    cfgs: tuple[Path, ...] = _option(
        (),
        "session",
        "YAML files with options; later files override earlier ones, and flags override files",
        this_run=True,
    )

    dataset: Name = _option("cifar10", "data", "name of the data set")
    data_root: OptionalPath = _option(
        None, "data", "folder that contains the data set; digits needs none, as the repository includes it"
    )
    download: Switch = _option(False, "data", "download the data set to data_root if it is missing", this_run=True)
    bounding_boxes: Switch = _option(False, "data", "crop images to their annotated bounding boxes (cub200, dogs)")
    label_column: Annotated[str | None, BeforeValidator(_unset)] = _option(
        None,
        "data",
        "parquet: column with the labels; not set: label, labels, fine_label or the only ClassLabel column",
    )
    strict_data: Switch = _option(False, "data", "stop if an image is unreadable, instead of skipping it")
    batch_size: Integer = _option(
        128, "data", "batch size, summed over all processes; each process needs at least two images", ge=2
    )
    views: Integer = _option(
        1,
        "data",
        "augmented views of each image in a batch, which then has batch_size / views distinct images; an epoch passes "
        "every image through the network so many times",
        ge=1,
        le=16,
    )
    workers_num: Integer = _option(
        4, "data", "worker processes that load images; 0: load them in the training process", ge=0, le=1024
    )

    resize: Size = _option(
        256, "transforms", "size in pixels before cropping: height and width, or one number for the shorter edge"
    )
    size: Size = _option(
        224, "transforms", "input size of the network in pixels: height and width, or one number for a square"
    )
    early_size: Annotated[int | tuple[int, int] | None, BeforeValidator(_optional_size)] = _option(
        None,
        "transforms",
        "input size of the training images in the first epochs of the run (early_share), at most size; needs scale; "
        "not set: size in all epochs",
    )
    early_share: Number = _option(
        0.5, "transforms", "fraction of the epochs of the run that use early_size, rounded down", ge=0, le=1
    )
    scale: Pair = _option(
        None,
        "transforms",
        "minimum and maximum area of random resized crops, as a fraction of the image; not set: resize, then a random "
        "crop of size",
    )
    ratio: Annotated[tuple[Positive, Positive], BeforeValidator(_number)] = _option(
        (3 / 4, 4 / 3), "transforms", "minimum and maximum aspect ratio of random resized crops"
    )
    colorjitter: Jitter = _option(
        None, "transforms", "strengths of random brightness, contrast, saturation and hue; not set: no colour jitter"
    )
    random_grayscale: Number = _option(
        0.0, "transforms", "probability of converting a training image to greyscale", ge=0, le=1
    )
    random_horizontal_flip: Switch = _option(
        False, "transforms", "flip training images horizontally with probability 0.5"
    )
    means: Means = _option(None, "transforms", "channel means of RGB in [0, 1]; not set: those of the data set")
    stds: Deviations = _option(
        None, "transforms", "channel standard deviations of RGB in [0, 1]; not set: those of the data set"
    )

    network: Name = _option(
        "resnet18", "network", "name of the backbone; timm/NAME or torchvision/NAME: a network of that package"
    )
    low_dim: Integer = _option(128, "network", "embedding size D", ge=1, le=65536)
    head: Annotated[Literal["linear", "mlp"], BeforeValidator(_lower)] = _option(
        "linear", "network", "last layers of the network: one linear layer, or two with a ReLU between them"
    )
    pretrained: OptionalPath = _option(
        None,
        "network",
        "initial weights: a file, matched by name and shape, or timm or torchvision to download those of a network of "
        "that package; ignored with --resume",
    )

    npc_temperature: Number = _option(
        0.1,
        "memory bank",
        "temperature of the non-parametric classifier; also sigma of the weighted kNN if knn_sigma is not set",
        gt=0,
    )
    npc_momentum: Number = _option(
        0.5, "memory bank", "weight of the old row when a row of the memory bank is updated", ge=0, le=1
    )

    ANs_select_rate: Number = _option(
        0.25, "discovery", "fraction of the samples that become anchors in round 1; multiplied by the round", ge=0, le=1
    )
    ANs_size: Integer = _option(1, "discovery", "number k of neighbours of an anchor, not counting itself", ge=1)
    ANs_size_first: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_number)] = _option(
        None,
        "discovery",
        "number of neighbours in round 1, which grows linearly to ANs_size in the last round; not set: ANs_size in all "
        "rounds",
    )
    ANs_reciprocal_first: Switch = _option(
        False,
        "discovery",
        "choose anchors among the samples that are neighbours of their nearest neighbour before all others",
    )
    ANs_every: Integer = _option(
        0, "discovery", "epochs between discoveries within a round; 0: at the start of a round only", ge=0
    )

    loss: Name = _option("neighbourhood", "training", "name of the loss")
    entropy_loss: Number = _option(
        0.0,
        "training",
        "weight, times the round, of the entropy of each image's similarities to the memory bank without its own row, "
        "added to the loss; 0: without",
        ge=0,
    )
    view_loss: Number = _option(
        0.0,
        "training",
        "weight of the instance loss between the views of a batch, added to the loss; needs views above 1; 0: without",
        ge=0,
    )
    view_temperature: Number = _option(0.1, "training", "temperature of the view loss", gt=0)
    max_round: Integer = _option(
        5, "training", "number of rounds, including round 0, which uses the instance loss only", ge=1
    )
    max_epoch: Integer = _option(200, "training", "epochs per round", ge=1)
    iter_size: Integer = _option(
        1, "training", "gradient accumulation: batches whose gradients are averaged for one optimiser step", ge=1
    )
    display_freq: Integer = _option(
        1,
        "training",
        "steps between updates of the loss next to the progress bar; each update waits for the device",
        ge=1,
    )
    ckpt_every: Integer = _option(
        0, "training", "optimiser steps between checkpoints within an epoch; 0: none within an epoch", ge=0
    )
    ckpt_interval: Number = _option(
        30.0,
        "training",
        "seconds after which the next epoch writes a checkpoint; always at the end of a round and on a stop signal; 0: "
        "after every epoch",
        ge=0,
    )
    on_nonfinite: Annotated[Literal["stop", "skip"], BeforeValidator(_lower)] = _option(
        "stop",
        "training",
        "what to do if the loss is NaN or infinite: stop the run, or skip the batch (waits for the GPU in every step)",
    )
    gpus: Gpus = _option((), "training", "GPUs to use, such as 0 or 0,1, with one process for each; not set: the CPU")
    sync_bn: Switch = _option(
        False, "training", "synchronise batch normalisation over all processes; off: each process uses its own images"
    )
    amp: Annotated[Literal["bf16", "fp16"] | None, BeforeValidator(_amp)] = _option(
        None,
        "training",
        "automatic mixed precision for training: bf16, or fp16 with loss scaling; not set: float32",
    )
    tf32: Switch = _option(False, "training", "allow TF32 in matrix products and convolutions on GPUs that support it")
    compile: Switch = _option(
        False,
        "training",
        "compile augmentation, network and loss with torch.compile: a slower start, and faster steps on most GPUs",
    )
    deterministic: Switch = _option(
        False,
        "training",
        "use deterministic algorithms: runs on one machine are identical, also on a GPU, where it is slower",
    )
    seed: Seed = _option(
        None, "training", "random seed; not set: the current time, which is logged and written to config.yaml"
    )

    optimizer: Annotated[Literal["sgd", "adam", "rmsprop"], BeforeValidator(_lower)] = _option(
        "sgd", "optimiser", "optimiser"
    )
    momentum: Number = _option(0.0, "optimiser", "sgd and rmsprop: momentum", ge=0)
    dampening: Number = _option(0.0, "optimiser", "sgd: dampening of the momentum", ge=0)
    nesterov: Switch = _option(False, "optimiser", "sgd: Nesterov momentum")
    weight_decay: Number = _option(0.0, "optimiser", "weight decay (L2 penalty) on all parameters", ge=0)
    beta1: Number = _option(0.9, "optimiser", "adam: decay rate of the mean of the gradients", ge=0, lt=1)
    beta2: Number = _option(0.999, "optimiser", "adam: decay rate of the mean of the squared gradients", ge=0, lt=1)
    amsgrad: Switch = _option(False, "optimiser", "adam: use the AMSGrad variant")
    alpha: Number = _option(0.99, "optimiser", "rmsprop: decay rate of the mean of the squared gradients", ge=0, lt=1)
    centered: Switch = _option(False, "optimiser", "rmsprop: normalise the gradient by an estimate of its variance")
    eps: Number = _option(1e-8, "optimiser", "adam and rmsprop: term added to the denominator", ge=0)

    base_lr: Number = _option(0.1, "schedule", "learning rate at the start of the schedule, after the warm-up", gt=0)
    lr_policy: Annotated[Literal["step", "fixed", "multistep", "cosine"], BeforeValidator(_lower)] = _option(
        "step", "schedule", "learning rate schedule; cosine falls from base_lr to almost 0 along half a cosine"
    )
    lr_span: Annotated[Literal["round", "run"], BeforeValidator(_lower)] = _option(
        "round",
        "schedule",
        "what the schedule covers: each round anew, or all max_round x max_epoch epochs of the run",
    )
    lr_warmup_epochs: Integer = _option(
        0, "schedule", "epochs at the start of the span in which the learning rate grows linearly", ge=0
    )
    lr_decay_offset: Integer = _option(0, "schedule", "step: epoch from which lr_decay_step is counted", ge=0)
    lr_decay_step: Integer = _option(0, "schedule", "step: epochs between decays; 0: no decay", ge=0)
    lr_decay_rate: Number = _option(0.1, "schedule", "step: factor of each decay", gt=0)
    lr_schedule: OptionalPath = _option(
        None, "schedule", "multistep: YAML file with a line 'epoch: learning rate' for each change; needs epoch 0"
    )

    protocol: Protocols = _option(
        ("knn",),
        "evaluation",
        "one or more of knn (weighted kNN), nn (nearest neighbour), linear (linear probe), cluster (k-means), graph "
        "(communities of the nearest-neighbour graph); training evaluates each epoch with the first of knn and nn; "
        "--test-only uses all",
    )
    knn_k: Integer = _option(
        200, "evaluation", "number K of neighbours that vote in the weighted kNN, at most all training samples", ge=1
    )
    knn_sigma: Annotated[Positive | None, BeforeValidator(_number)] = _option(
        None, "evaluation", "temperature sigma of the kNN vote weights; not set: npc_temperature, as in the reference"
    )
    embed: Name = _option(
        "fc",
        "evaluation",
        "features of an image for test runs, exports, reports and queries: the embeddings (fc), or a stage such as "
        "conv5, pooled globally and scaled to unit length; training then also evaluates the stage after each round",
    )
    linear_layers: Annotated[tuple[str, ...], BeforeValidator(_words)] = _option(
        ("conv5",), "evaluation", "stages on which linear probes are trained, such as conv1 to conv5 and fc"
    )
    clusters: Integer = _option(
        10, "evaluation", "number of k-means clusters without labels; with labels it is the number of classes", ge=2
    )
    graph_neighbours: Integer = _option(
        15,
        "evaluation",
        "protocol graph: number of nearest neighbours that each image is joined with, at most all other images",
        ge=1,
    )
    graph_resolution: Number = _option(
        1.0, "evaluation", "protocol graph: resolution of the modularity; more gives more and smaller groups", gt=0
    )
    published: Annotated[str | None, BeforeValidator(_unset)] = _option(
        None, "evaluation", "published result and its source, shown next to the result of the run"
    )
    val_fraction: Number = _option(
        0.0,
        "evaluation",
        "fraction of the training images of each class held out to select the best epoch; 0: the test images select "
        "it, as in the reference",
        ge=0,
        lt=1,
    )

    session: Annotated[str | None, BeforeValidator(_unset)] = _option(
        None, "session", "name of the session folder; not set: the UTC time", this_run=True
    )
    sess_dir: Path = _option(Path("sessions"), "session", "folder that contains the sessions")
    resume: OptionalPath = _option(
        None,
        "session",
        "resume from a checkpoint, or from the latest one of a session folder; without --cfgs, the session's options "
        "are the defaults",
        this_run=True,
    )
    keep: Annotated[Literal["all", "best", "last"], BeforeValidator(_lower)] = _option(
        "all",
        "session",
        "checkpoints to keep besides the latest and the previous one: the best of every round (all), the best of the "
        "current round (best), or none (last)",
    )
    restart: Switch = _option(False, "session", "with --resume: continue in a new session", this_run=True)
    test_only: Switch = _option(
        False,
        "session",
        "evaluate without training; writes evaluation.json to the session folder, or next to the checkpoint if it "
        "belongs to no session (not with --debug)",
        this_run=True,
    )
    export_features: OptionalPath = _option(
        None, "session", "at the end, write embeddings, labels and file names to this .npz file", this_run=True
    )
    export_model: OptionalPath = _option(
        None, "session", "at the end, write the backbone to this .safetensors or .onnx file", this_run=True
    )
    debug: Switch = _option(False, "session", "write no session folder", this_run=True)
    brief: Switch = _option(
        False, "session", "show only one line per round, the results and warnings on the screen", this_run=True
    )
    export_table: OptionalPath = _option(
        None,
        "session",
        "at the end, write a row for each image to this .parquet or .csv file: class, entropy, round of selection as "
        "an anchor, neighbours, group, outlier score, place on a map, embedding",
        this_run=True,
    )
    export_thumbnails: Switch = _option(
        False, "session", "add small pictures of the images to the .parquet file of export_table", this_run=True
    )
    query: Annotated[tuple[Path, ...], BeforeValidator(_paths)] = _option(
        (), "session", "image files: show the most similar training images of each, without training", this_run=True
    )
    report: Annotated[bool | Path, BeforeValidator(_report)] = _option(
        False,
        "session",
        "write report.html at the end of training; with a session folder: write its report now, without training",
        this_run=True,
    )
    compare: Annotated[tuple[Path, ...], BeforeValidator(_paths)] = _option(
        (),
        "session",
        "session folders: compare them in a table, and in comparison.csv and comparison.png in sess_dir, without "
        "training",
        this_run=True,
    )
    print_args: Switch = _option(False, "session", "print the resolved options as YAML and exit", this_run=True)
    log_file: Switch = _option(True, "session", "write log.txt")
    log_tfb: Switch = _option(True, "session", "write TensorBoard events to tfboard/")

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{name}: the smaller number must come first (got {pair})")
        if self.scale is not None and self.scale[1] > 1:
            raise ValueError(f"scale: a crop cannot be larger than the image (got {self.scale}); set it to 1 or less")
        if any(
            large < small
            for large, small in zip(height_and_width(self.resize), height_and_width(self.size), strict=True)
        ):
            raise ValueError(
                f"resize: {self.resize} is smaller than size: {self.size}, so a crop of that size does not fit; "
                "set both, for example --resize 32 --size 32"
            )
        if self.lr_policy == "multistep" and self.lr_schedule is None:
            raise ValueError("lr_policy: multistep needs lr_schedule, a file with lines 'epoch: learning rate'")
        if self.batch_size % self.views:
            raise ValueError(
                f"views: {self.views} views of each image do not fill a batch of {self.batch_size}; set batch_size to "
                f"a multiple of {self.views}"
            )
        if self.early_size is not None:
            early, size = height_and_width(self.early_size), height_and_width(self.size)
            if early[0] > size[0] or early[1] > size[1]:
                raise ValueError(f"early_size: {self.early_size} is larger than size: {self.size}; set it lower")
            if self.scale is None:
                raise ValueError("early_size: needs scale, because it changes the size of random resized crops")
        if self.ANs_size_first is not None and self.ANs_size_first > self.ANs_size:
            raise ValueError(
                f"ANs_size_first: {self.ANs_size_first} neighbours cannot grow to ANs_size {self.ANs_size}; set it to "
                f"{self.ANs_size} or less"
            )
        if self.view_loss and self.views == 1:
            raise ValueError("view_loss: compares views of the same image, and there is one view; set views to 2")
        if self.lr_warmup_epochs >= self.schedule_epochs:
            raise ValueError(
                f"lr_warmup_epochs: {self.lr_warmup_epochs} leave nothing of the schedule, which covers "
                f"{self.schedule_epochs} epochs; set it lower, or lr_span: run"
            )
        if self.nesterov and self.optimizer == "sgd" and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: needs dampening 0 and a momentum above 0, such as 0.9")
        if self.restart and self.resume is None:
            raise ValueError("restart: needs resume, the checkpoint or session folder to resume from")
        if self.resume is not None and self.session is not None and not self.restart:
            raise ValueError(
                "session: names a new session, but resume continues in the old one; add --restart, or drop --session"
            )
        return self

    @property
    def images_per_batch(self) -> int:
        """Distinct images of a training batch."""
        return self.batch_size // self.views

    def size_of_epoch(self, round: int, epoch: int) -> tuple[int, int]:
        """(height, width) of the training images in an epoch of a round."""
        early = int(self.early_share * self.max_round * self.max_epoch)
        is_early = round * self.max_epoch + epoch < early
        return height_and_width(self.early_size if is_early and self.early_size is not None else self.size)

    @property
    def schedule_epochs(self) -> int:
        """Epochs that the learning rate schedule covers."""
        return self.max_epoch * (self.max_round if self.lr_span == "run" else 1)

    @property
    def is_for_one(self) -> bool:
        """Whether the command is for a single process: --report of a session, --query or --compare."""
        return isinstance(self.report, Path) or bool(self.query or self.compare)

    @property
    def training_protocol(self) -> str:
        """The protocol that evaluates each epoch: the first of 'knn' and 'nn' in ``protocol``, 'knn' by default."""
        return next((name for name in self.protocol if name in ("knn", "nn")), "knn")
