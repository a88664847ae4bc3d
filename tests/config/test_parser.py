"""Reading options from files and flags, writing them, and error messages."""

from __future__ import annotations

import contextlib
import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.options import Options
from lib.config.parser import choose, flag, options_table, parser, read_options, read_yaml, to_yaml
from lib.errors import UsageError

THIS_RUN = set(
    "cfgs session resume restart test_only debug brief print_args download export_features export_model compare "
    "report export_table export_thumbnails query".split()
)
"""Options of a single run, which are not written to the config."""

OLD_STYLE = """\
# as the reference's own files are written
dataset: CIFAR100
data_root: data
resize: (32, 32)
size: (32, 32)
scale: (0.2, 1.0)
ratio: (0.75, 1.3333)
colorjitter: (0.4, 0.4, 0.4, 0.4)
random_grayscale: 0.2
means: (0.4914, 0.4822, 0.4465)
stds: None
network: ResNet18
gpus: '0,1'
batch_size: 128
optimizer: SGD
momentum: 0.9
nesterov: True
weight_decay: 5e-4
base_lr: 3e-2
seed: None
"""


def written(folder: Path, content: str | bytes, name: str = "options.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(words: list[str]) -> str:
    """The error message; checks that it is one sentence without a traceback."""
    with pytest.raises(UsageError) as refused:
        read_options(words)
    text = str(refused.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def refused_file(folder: Path, content: str | bytes) -> str:
    """The error message for a file; checks that it names the file."""
    path = written(folder, content)
    text = refusal(["--cfgs", str(path)])
    assert str(path) in text
    return text.replace(str(path), "FILE")


def test_later_files_override_earlier_ones_and_flags_override_files(tmp_path: Path) -> None:
    one = written(tmp_path, "batch_size: 10\nlow_dim: 11\nmax_round: 12\nbase_lr: 0.5\n", "one.yaml")
    two = written(tmp_path, "low_dim: 21\nmax_round: 22\n", "two.yaml")
    options = read_options(["--max-round", "32", "--cfgs", str(one), str(two)])
    assert (options.batch_size, options.low_dim, options.max_round, options.base_lr) == (10, 21, 32, 0.5)
    assert options.max_epoch == 200
    assert options.cfgs == (one, two)
    other_way = read_options(["--cfgs", str(two), str(one)])
    assert (other_way.low_dim, other_way.max_round) == (11, 12)


def test_base_file_is_read_before_files_of_the_command_line(tmp_path: Path) -> None:
    base = written(tmp_path, "batch_size: 10\nlow_dim: 11\n", "base.yaml")
    more = written(tmp_path, "low_dim: 21\n", "more.yaml")
    options = read_options(["--cfgs", str(more)], base=base)
    assert (options.batch_size, options.low_dim) == (10, 21)


def test_flag_set_to_false_overrides_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "nesterov: true\ndebug: true\n")
    options = read_options(["--cfgs", str(path), "--nesterov", "false", "--debug=False"])
    assert not options.nesterov and not options.debug


def test_option_file_of_the_reference_is_accepted(tmp_path: Path) -> None:
    options = read_options(["--cfgs", str(written(tmp_path, OLD_STYLE))])
    assert (options.dataset, options.data_root, options.network) == ("cifar100", Path("data"), "resnet18")
    assert (options.resize, options.size) == ((32, 32), (32, 32))
    assert (options.scale, options.ratio) == ((0.2, 1.0), (0.75, 1.3333))
    assert (options.colorjitter, options.random_grayscale) == ((0.4, 0.4, 0.4, 0.4), 0.2)
    assert (options.means, options.stds) == ((0.4914, 0.4822, 0.4465), None)
    assert (options.weight_decay, options.base_lr, options.optimizer) == (0.0005, 0.03, "sgd")
    assert (options.gpus, options.seed, options.nesterov) == ((0, 1), None, True)


def test_flags_accept_several_numbers_and_switches_no_value() -> None:
    words = "--size 16 32 --resize 64 --scale 0.2 1 --colorjitter 0.1 0.2 0.3 0.4 --nesterov --gpus 0,1 --means 0 0 0"
    options = read_options([*words.split(), "--momentum", "0.9"])
    assert (options.size, options.resize, options.scale) == ((16, 32), 64, (0.2, 1.0))
    assert options.colorjitter == (0.1, 0.2, 0.3, 0.4)
    assert options.nesterov and options.gpus == (0, 1) and options.means == (0, 0, 0)


def test_quoted_tuple_is_accepted_on_the_command_line() -> None:
    options = read_options(["--size", "(16, 32)", "--resize=(64, 64)"])
    assert (options.size, options.resize) == ((16, 32), (64, 64))


@pytest.mark.parametrize(("words", "read"), [(["--gpus", ""], ()), (["--gpus", "0"], (0,)), ([], ())])
def test_gpus_flag_sets_the_gpus_and_empty_means_cpu(words: list[str], read: tuple[int, ...]) -> None:
    assert read_options(words).gpus == read


def test_gpus_are_read_from_a_file_in_every_format(tmp_path: Path) -> None:
    for text, read in {"''": (), "'0'": (0,), "'0,1'": (0, 1), "0": (0,), "[0, 1]": (0, 1), "": ()}.items():
        assert read_options(["--cfgs", str(written(tmp_path, f"gpus: {text}\n"))]).gpus == read


@pytest.mark.parametrize("name", sorted(set(Options.model_fields) - {"cfgs"}))
def test_string_is_never_evaluated(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    attacks = [
        f"__import__('os').mkdir({str(proof)!r})",
        f"[__import__('os').mkdir({str(proof)!r}) for _ in (1,)]",
        f"(__import__('pathlib').Path({str(proof)!r}).touch(), 1)",
    ]
    eval(attacks[0])  # the code does run if the string is evaluated
    proof.rmdir()
    for attack in attacks:
        path = written(tmp_path, yaml.safe_dump({name: attack}))
        for words in (["--cfgs", str(path)], [f"{flag(name)}={attack}"]):
            with contextlib.suppress(UsageError):
                read_options(words)
            assert not proof.exists()


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir"])
def test_file_with_python_tags_is_refused_and_not_run(tag: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    text = f"seed: !!python/{tag} ['{proof}']\n"
    yaml.unsafe_load(text)
    proof.rmdir()  # the code does run with an unsafe loader
    message = refused_file(tmp_path, text)
    assert not proof.exists()
    assert "line 1" in message and "not valid YAML" in message


@pytest.mark.parametrize("key", ["size", "seed", "query", "scale", "dataset", "unheard_of"])
def test_nested_yaml_aliases_do_not_fill_memory(key: str, tmp_path: Path) -> None:
    """Each alias repeats the previous one ten times; expanded, the last would have a billion words."""
    lists = "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'ha, ha'}]\n" for i in range(10))
    text = refused_file(tmp_path, "".join(f"{key}:\n{lists}"))
    assert len(text) < 1000


UNKNOWN = {
    "batchsize": "batch_size",
    "batch-size": "batch_size",
    "Low_Dim": "low_dim",
    "ans_size": "ANs_size",
    "npc_temprature": "npc_temperature",
    "datset": "dataset",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_key_is_named_with_the_nearest_known_one(key: str, tmp_path: Path) -> None:
    message = refused_file(tmp_path, f"{key}: 3\n")
    assert re.search(rf"\b{key}\b.*\b{UNKNOWN[key]}\b", message)


@pytest.mark.parametrize("key", ["1", "true", "1.5", "zzzzqqqq"])
def test_unknown_key_without_a_near_match_is_named(key: str, tmp_path: Path) -> None:
    message = refused_file(tmp_path, f"{key}: 3\n")
    assert str(yaml.safe_load(key)) in message and "--help" in message


def test_key_with_a_line_break_is_shown_on_one_line(tmp_path: Path) -> None:
    refused_file(tmp_path, '"low\\ndim": 3\n')


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--batchsize", "--batch-size"),
        ("--szie", "--size"),
        ("--ans-size", "--ANs-size"),
        ("--batch-siz=3", "--batch-size"),
        ("--test", "--test-only"),
        ("--nestrov", "--nesterov"),
    ],
)
def test_unknown_flag_is_named_with_the_nearest_known_one(word: str, near: str) -> None:
    message = refusal([word, "3"] if "=" not in word else [word])
    assert word.split("=")[0] in message and message.endswith(f"did you mean {near}?")


def test_error_for_a_flag_with_underscores_shows_dashes() -> None:
    assert "--batch-size" in refusal(["--batch_size", "3"]).replace("--batch_size", "")


@pytest.mark.parametrize("words", [["stray"], ["-x"], ["--max-epoch", "3", "4"]])
def test_extra_argument_is_named(words: list[str]) -> None:
    assert repr(words[-1]) in refusal(words)


def test_flag_without_its_value_is_named() -> None:
    assert "--batch-size" in refusal(["--batch-size"])


WRONG = {
    "batch_size: ten": ["batch_size", "got 'ten'", "integer"],
    "batch_size: 4.5": ["batch_size", "4.5", "integer"],
    "batch_size: [1, 2]": ["batch_size", "[1, 2]"],
    "batch_size: 1": ["batch_size", "1", "greater than or equal to 2"],
    "batch_size: true": ["batch_size", "True", "number"],
    "batch_size:": ["batch_size", "None"],
    "base_lr: fast": ["base_lr", "got 'fast'", "number"],
    "base_lr: 0": ["base_lr", "0", "greater than 0"],
    "base_lr: .nan": ["base_lr", "nan", "finite"],
    "base_lr: .inf": ["base_lr", "inf", "finite"],
    "npc_momentum: 2": ["npc_momentum", "2", "less than or equal to 1"],
    "npc_momentum: yes": ["npc_momentum", "True", "number"],
    "size: big": ["size", "got 'big'", "pixels"],
    "size: (1, 2, 3)": ["size", "(1, 2, 3)", "pixels"],
    "size: true": ["size", "true"],
    "nesterov: maybe": ["nesterov", "got 'maybe'", "boolean"],
    "optimizer: lars": ["optimizer", "got 'lars'", "'sgd'"],
    "gpus: first": ["gpus", "got 'first'", "0,1"],
    "scale: (0.5, 0.2)": ["scale", "0.5", "smaller"],
    "network:": ["network", "None"],
    "seed: -1": ["seed", "-1"],
    "lr_policy: multistep": ["lr_policy", "lr_schedule"],
    "resize: 20": ["resize", "20", "224"],
    "restart: true": ["restart", "resume"],
    "session: [1]": ["session", "[1]"],
    "dataset: {a: 1}": ["dataset", "{'a': 1}"],
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_value_is_named_with_file_and_option(line: str, tmp_path: Path) -> None:
    message = refused_file(tmp_path, line + "\n")
    assert message.startswith("FILE")
    for word in WRONG[line]:
        assert word in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--batch-size ten", ["command line", "batch_size", "got 'ten'"]),
        ("--base-lr nan", ["command line", "base_lr", "finite"]),
        ("--scale 0.5", ["command line", "scale"]),
        ("--means 1 2", ["command line", "means"]),
        ("--test-only maybe", ["command line", "test_only", "got 'maybe'"]),
        ("--gpus x", ["command line", "gpus", "got 'x'"]),
        ("--resize 32", ["command line", "resize", "224"]),
    ],
)
def test_wrong_value_of_a_flag_is_named(words: str, expected: list[str]) -> None:
    message = refusal(words.split())
    assert all(word in message for word in expected), message


def test_error_names_the_file_that_set_the_value(tmp_path: Path) -> None:
    good, bad = written(tmp_path, "batch_size: 4\n", "good.yaml"), written(tmp_path, "batch_size: 1\n", "bad.yaml")
    assert str(bad) in refusal(["--cfgs", str(good), str(bad)])
    assert read_options(["--cfgs", str(bad), str(good)]).batch_size == 4
    assert refusal(["--cfgs", str(good), "--batch-size", "0"]).startswith("command line")


@pytest.mark.parametrize("name", ["seed", "base_lr", "size", "gpus", "scale"])
def test_number_of_thousands_of_digits_is_refused(name: str, tmp_path: Path) -> None:
    assert name in refused_file(tmp_path, f"{name}: 0x{'f' * 6000}\n")


@pytest.mark.parametrize("value", ["-" * 50_000 + "1", "(" * 50_000, "1" * 50_000, "[" * 300 + "]" * 300])
@pytest.mark.parametrize("name", ["seed", "base_lr", "size", "scale", "nesterov", "gpus"])
def test_long_or_deeply_nested_string_is_refused(name: str, value: str, tmp_path: Path) -> None:
    assert name in refused_file(tmp_path, f"{name}: '{value}'\n")
    assert name in refusal([f"{flag(name)}={value}"])


@pytest.mark.parametrize("text", ["size: &a [*a]", "scale: &a [*a, *a]", "dataset: &a {x: *a}", "gpus: &a [*a]"])
def test_recursive_value_is_refused(text: str, tmp_path: Path) -> None:
    assert text.split(":")[0] in refused_file(tmp_path, text + "\n")


def test_missing_file_is_named(tmp_path: Path) -> None:
    message = refusal(["--cfgs", str(tmp_path / "none.yaml")])
    assert str(tmp_path / "none.yaml") in message and "no such file" in message


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    message = refusal(["--cfgs", str(tmp_path)])
    assert str(tmp_path) in message and "irectory" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ("# only a remark\n", ["empty"]),
        ("---\n", ["empty"]),
        ("- batch_size\n- 3\n", ["mapping", "list"]),
        ("42\n", ["mapping", "int"]),
        ("just words\n", ["mapping", "str"]),
        ("batch_size: 3\nsize: [3\n", ["not valid YAML", "line 3"]),
        ("batch_size: 3\n\tsize: 3\n", ["not valid YAML", "line 2"]),
        ("batch_size: 3\nsize: 3: 4\n", ["not valid YAML", "line 2"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
        ("seed: 2020-13-45\n", ["not valid YAML"]),
        ("? [1, 2]\n: 3\n", ["not valid YAML", "line 1"]),
        ("a\x00b: 1\n", ["not valid YAML"]),
        ("seed: " + "[" * 5000, ["not valid YAML"]),
        (b"network: caf\xe9\n", ["UTF-8"]),
        (b"\xff\xfes\x00i\x00z\x00e\x00", ["UTF-8"]),
    ],
)
def test_invalid_option_file_is_refused_with_the_reason(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    message = refused_file(tmp_path, content)
    assert all(word in message for word in words), message


def test_file_with_bom_and_crlf_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbfbatch_size: 7\r\nnetwork: \xc3\xa4\r\n")
    assert read_yaml(path) == {"batch_size": 7, "network": "ä"}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 9000)
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.datetimes(timezones=st.just(datetime.timezone.utc))
    | st.binary(max_size=5)
    | st.sampled_from(
        ["(32, 32)", "5e-4", "None", "", "sgd", "ADAM", "multistep", "1e999", "0x10", "(1,", "{}", "1_0", "0,1", "~"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(sorted(Options.model_fields)) | st.text(max_size=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=250, deadline=None, derandomize=True)
@given(content=st.dictionaries(keys, values, min_size=1, max_size=3))
def test_any_value_of_any_key_gives_options_or_a_usage_error(place: Path, content: dict[str, Any]) -> None:
    path = place / "options.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        options = read_options(["--cfgs", str(path)])
    except UsageError as refused:
        assert str(path) in str(refused)
        return
    path.write_text(to_yaml(options), encoding="utf-8")
    again = read_options(["--cfgs", str(path)])
    kept = set(Options.model_fields) - THIS_RUN
    assert again.model_dump(include=kept) == options.model_dump(include=kept)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(Options.model_fields)), words=st.lists(st.text(max_size=8), max_size=3))
def test_any_flag_with_any_values_gives_options_or_a_usage_error(name: str, words: list[str]) -> None:
    if any("--help".startswith(word.split("=")[0]) or word.startswith("-h") for word in words if word):
        return
    try:
        read_options([flag(name), *words])
    except UsageError as refused:
        assert str(refused)


SETS: list[dict[str, Any]] = [
    {},
    {
        "size": 32,
        "resize": (32, 40),
        "scale": (0.2, 1.0),
        "colorjitter": (0.4, 0.4, 0.0, 0.5),
        "means": (0.1, 0.2, 0.3),
    },
    {"base_lr": 1e-05, "weight_decay": 1e-12, "npc_temperature": 1 / 3, "ratio": (2 / 3, 1e10), "lr_decay_rate": 1e38},
    {"dataset": "true", "network": "1e3", "session": "5", "data_root": Path("None such"), "gpus": (0, 3)},
    {"dataset": "null", "network": "2020-01-01", "data_root": Path("ein ordner: #1"), "sess_dir": Path("öäü/日本")},
    {"optimizer": "adam", "lr_policy": "multistep", "lr_schedule": Path("a.yaml"), "protocol": "nn", "seed": 2**63 - 1},
    {
        "seed": 0,
        "momentum": 0.9,
        "nesterov": True,
        "random_horizontal_flip": True,
        "strict_data": True,
        "log_file": False,
    },
    {"resume": Path("x"), "restart": True, "test_only": True, "debug": True, "brief": True, "print_args": True},
]


@pytest.mark.parametrize("changes", SETS, ids=range(len(SETS)))
def test_written_options_are_read_back_unchanged(changes: dict[str, Any], tmp_path: Path) -> None:
    options = Options(**changes)
    text = to_yaml(options)
    again = read_options(["--cfgs", str(written(tmp_path, text))])
    for name in set(Options.model_fields) - THIS_RUN:
        assert getattr(again, name) == getattr(options, name), name
    assert {name for name in changes if name not in THIS_RUN} <= set(yaml.safe_load(text))


def test_written_options_omit_those_of_a_single_run() -> None:
    content = yaml.safe_load(to_yaml(Options(**SETS[-1], session="mine")))
    assert set(content) == set(Options.model_fields) - THIS_RUN


def help_entries(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Flag -> its entry in the help, on one line."""
    with pytest.raises(SystemExit) as left:
        read_options(["--help"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    found = re.findall(r"^  (--[\w-]+)([^\n]*(?:\n {10,}[^\n]*)*)", text, re.MULTILINE)
    return {word: re.sub(r"\s+", " ", entry) for word, entry in found}


SHOWN = {
    "--dataset": "cifar10",
    "--resize": "256",
    "--size": "224",
    "--scale": "not set",
    "--ratio": "0.75 1.333",
    "--random-grayscale": "0.0",
    "--batch-size": "128",
    "--workers-num": "4",
    "--network": "resnet18",
    "--low-dim": "128",
    "--npc-temperature": "0.1",
    "--npc-momentum": "0.5",
    "--ANs-select-rate": "0.25",
    "--ANs-size": "1",
    "--max-round": "5",
    "--max-epoch": "200",
    "--iter-size": "1",
    "--display-freq": "1",
    "--gpus": "not set",
    "--seed": "not set",
    "--test-only": "off",
    "--optimizer": "sgd",
    "--momentum": "0.0",
    "--nesterov": "off",
    "--weight-decay": "0.0",
    "--base-lr": "0.1",
    "--lr-policy": "step",
    "--lr-decay-offset": "0",
    "--lr-decay-step": "0",
    "--lr-decay-rate": "0.1",
    "--protocol": "knn",
    "--session": "not set",
    "--sess-dir": "sessions",
    "--log-file": "on",
}


@pytest.mark.parametrize("columns", ["60", "100", "300"])
def test_help_shows_every_flag_with_its_default(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    entries = help_entries(capsys)
    assert set(entries) == set(map(flag, Options.model_fields))
    assert all(re.search(r"\(default: [^)]+\)$", entry) for entry in entries.values())
    for word, default in SHOWN.items():
        assert entries[word].endswith(f"(default: {default})"), word


def test_table_of_options_has_a_row_for_each() -> None:
    rows = [line for line in options_table().splitlines() if line.startswith("| `--")]
    assert sorted(re.findall(r"`(--[\w-]+)`", "\n".join(rows))) == sorted(map(flag, Options.model_fields))
    for row in rows:
        assert row.count("|") == 4, row


def test_unknown_name_is_reported_with_the_nearest_one() -> None:
    known = {"resnet18": 1, "resnet50": 2}
    assert choose(known, "resnet50", "--network") == 2
    with pytest.raises(UsageError, match=r"--network resnet51.*did you mean resnet50"):
        choose(known, "resnet51", "--network")
    with pytest.raises(UsageError, match=r"--network vgg.*resnet18, resnet50"):
        choose(known, "vgg", "--network")


def test_reading_options_keeps_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read_options(["--session", "mine", "--sess-dir", "there"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nbatch_size: 3\n\nseed: 2\n", "'seed' is set twice, in lines 1 and 4; keep one of them"),
        ("seed: 1\n'seed': 1\n", "'seed' is set twice, in lines 1 and 2; keep one of them"),
    ],
)
def test_duplicate_key_is_refused_with_both_lines(content: str, message: str, tmp_path: Path) -> None:
    assert message in refused_file(tmp_path, content)


def test_session_config_of_the_reference_is_accepted(tmp_path: Path) -> None:
    """It records the files it was made of, and every option of every optimiser."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "cfgs: [configs/base.yaml, configs/cifar10.yaml]\noptimizer: adam\nbeta1: 0.8\nbeta2: 0.99\neps: 1e-7\n"
        "amsgrad: True\nalpha: 0.98\ncentered: False\nsize: (32, 32)\nresize: (32, 32)\nweight_decay: 5e-4\n"
    )
    options = read_options(["--cfgs", str(path)])
    assert (options.beta1, options.beta2, options.eps, options.amsgrad) == (0.8, 0.99, 1e-7, True)
    assert (options.alpha, options.centered, options.size, options.weight_decay) == (0.98, False, (32, 32), 5e-4)
    assert options.cfgs == (path,)


def test_help_shows_choices_without_python_types() -> None:
    text = parser().format_help()
    assert "--amp {bf16,fp16}" in text and "--lr-policy {step,fixed,multistep,cosine}" in text
    assert "typing." not in text and "<class" not in text


@pytest.mark.parametrize(("words", "wrong"), [(".4 .4 .4", "too few values"), (".4 .4 .4 .4 .4", "too many values")])
def test_wrong_number_of_strengths_is_named_with_what_they_are(words: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=f"colorjitter: {wrong}, got .* brightness, contrast, saturation and hue"):
        read_options(["--colorjitter", *words.split()])
