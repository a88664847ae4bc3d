"""Reads options from YAML files and flags, and writes them as YAML.

The files of ``--cfgs`` are read in order; flags override them.
"""

from __future__ import annotations

import argparse
import difflib
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from lib.config.options import Options
from lib.errors import UsageError

T = TypeVar("T")
NUMBERS_OF_VALUES = {"missing": "too few values", "too_long": "too many values"}
"""Type of pydantic's error -> what is wrong."""


def flag(name: str) -> str:
    """The flag of an option: ANs_select_rate -> --ANs-select-rate."""
    return "--" + name.replace("_", "-")


def is_path(name: str) -> bool:
    """Whether an option holds paths, which may differ between machines."""
    return Path in _kinds(Options.model_fields[name].annotation) or Path in _kinds(
        _item(Options.model_fields[name].annotation)
    )


def extra(name: str) -> dict[str, Any]:
    """An option's ``group``, and ``this_run``: whether it applies to one start only."""
    return typing.cast(dict[str, Any], Options.model_fields[name].json_schema_extra)


def _default(name: str) -> str:
    value = Options.model_fields[name].default
    if value is None or value == ():
        return "not set"
    if isinstance(value, tuple):
        return " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def options_table() -> str:
    """The table of options in docs/options.md."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    group = None
    for name in sorted(Options.model_fields, key=_group_order):
        if extra(name)["group"] != group:
            group = extra(name)["group"]
            rows.append(f"| **{group}** | | |")
        rows.append(f"| `{flag(name)}` | {_default(name)} | {Options.model_fields[name].description} |")
    return "\n".join(rows)


def _group_order(name: str) -> int:
    order = list(dict.fromkeys(extra(n)["group"] for n in Options.model_fields if n != "cfgs"))
    return order.index(extra(name)["group"])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"command line: {message}; --help lists the options")


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation: {bool}, {int, tuple}, ..."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        parts = typing.get_args(annotation)
        return set().union(*(_kinds(p) for p in (parts[:1] if typing.get_origin(annotation) is Annotated else parts)))
    return {typing.get_origin(annotation) or annotation}


def parser() -> argparse.ArgumentParser:
    """The command-line parser, with one flag for each option."""
    result = _Parser(
        prog="python main.py",
        description="Anchor Neighbourhood Discovery: unsupervised training of image embeddings (ICML 2019).",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for name in sorted(Options.model_fields, key=_group_order):
        field = Options.model_fields[name]
        title = extra(name)["group"]
        group = groups.setdefault(title, result.add_argument_group(title))
        kinds = _kinds(field.annotation)
        shape: dict[str, Any] = {}
        if kinds == {bool}:
            shape = {"nargs": "?", "const": "true", "metavar": "BOOL"}
        elif kinds == {bool, Path}:
            shape = {"nargs": "?", "const": "true", "metavar": "FOLDER"}
        elif tuple in kinds and name != "gpus":
            shape = {"nargs": "+", "metavar": _metavar(_item(field.annotation), _kinds(_item(field.annotation)))}
        else:
            shape = {"metavar": _metavar(field.annotation, kinds)}
        text = f"{field.description} (default: {_default(name)})".replace("%", "%%")
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **shape)
    return result


def _item(annotation: Any) -> Any:
    """The type of the items of a tuple in an annotation."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0]
    return next((found for part in typing.get_args(annotation) if (found := _item(part))), None)


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a ``Literal`` in an annotation."""
    if typing.get_origin(annotation) is Literal:
        return tuple(map(str, typing.get_args(annotation)))
    return next((found for part in typing.get_args(annotation) if (found := _choices(part))), ())


def _metavar(annotation: Any, kinds: set[Any]) -> str:
    if choices := _choices(annotation):
        return "{" + ",".join(choices) + "}"
    for kind, word in ((Path, "PATH"), (int, "INT"), (float, "NUMBER"), (tuple, "LIST")):
        if kind in kinds:
            return word
    return "NAME"


def read_yaml(path: Path, lines: str = "option: value") -> dict[Any, Any]:
    """Reads a YAML file that contains a mapping.

    ``lines`` is the expected form of its lines, for error messages.

    Raises:
        UsageError: the file is missing, unreadable, empty, not a mapping, or contains a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; choose an existing file with lines '{lines}'") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"{path}: cannot be read: {reason}; choose a readable text file") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not plain data"
        raise UsageError(f"{path}{where}: not valid YAML: {what}; write lines '{lines}'") from None
    if content is None:
        raise UsageError(f"{path}: the file is empty; it must contain lines '{lines}'")
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must be a mapping with lines '{lines}', not a {type(content).__name__}")
    assert isinstance(tree, yaml.MappingNode)
    _refuse_repeated_keys(path, tree)
    return content


def _refuse_repeated_keys(path: Path, tree: yaml.MappingNode) -> None:
    """Raises UsageError if a key occurs twice; PyYAML silently uses the last one."""
    lines: dict[str, int] = {}
    for key, _ in tree.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise UsageError(
                f"{path}: {_shown(key.value)} is set twice, in lines {lines[key.value]} and {line}; keep one of them"
            )
        lines[key.value] = line


def _shown(value: object) -> str:
    """A value for a message: on one line, and shortened. YAML aliases can make a value from a short file very large."""
    spelling = reprlib.Repr()
    spelling.maxlevel, spelling.maxlist, spelling.maxtuple, spelling.maxdict, spelling.maxset = 4, 8, 8, 8, 8
    spelling.maxstring = spelling.maxlong = spelling.maxother = 200
    try:
        text = " ".join(spelling.repr(value).split())
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else text[:80] + "..."


def _unknown(key: object, where: str, spell: Callable[[str], str] = str) -> UsageError:
    lowered = {name.lower(): name for name in Options.model_fields}
    word = _shown(key).strip("'\"")
    near = difflib.get_close_matches(word.lower().strip("-").replace("-", "_"), lowered, n=1, cutoff=0.5)
    hint = f"; did you mean {spell(lowered[near[0]])}?" if near else "; --help lists the options"
    return UsageError(f"{where}: unknown option {word}{hint}")


def choose(known: Mapping[str, T], name: str, option: str) -> T:
    """``known[name]``. If it is missing, raises UsageError with the most similar name."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"{option} {name}: unknown name{hint} (choose one of {', '.join(known)})")


def validated(values: Mapping[str, Any], origin: Mapping[str, str]) -> Options:
    """The options with these values; ``origin`` says for each where it comes from, for messages.

    Raises:
        UsageError: a value has the wrong type or range.
    """
    try:
        return Options.model_validate(dict(values))
    except ValidationError as failure:
        problems: dict[str, list[str]] = {}
        for error in failure.errors():
            name = str(error["loc"][0]) if error["loc"] else ""
            text = NUMBERS_OF_VALUES.get(error["type"], error["msg"]).removeprefix("Value error, ")
            text = text if name == "" else text[:1].lower() + text[1:]
            if text not in problems.setdefault(name, []):
                problems[name].append(text)
        name, texts = next(iter(problems.items()))
        if not name:  # from _fits_together: the message starts with the option's name
            name = texts[0].split(":")[0]
            raise UsageError(f"{origin.get(name, 'the default of')} {texts[0]}") from None
        meaning = Options.model_fields[name].description
        got = _shown(values[name])
        raise UsageError(f"{origin[name]} {name}: {' or '.join(texts)}, got {got} ({meaning})") from None


def read_options(argv: Sequence[str], base: Path | None = None) -> Options:
    """Parses a command line.

    Args:
        argv: flags, without the program name.
        base: an option file that is read before those of ``--cfgs``.

    Raises:
        UsageError: an option is unknown, or a value has the wrong type or range.
        SystemExit: ``--help`` was given.
    """
    arguments, rest = parser().parse_known_args(argv)
    for word in rest:
        if word.startswith("--"):
            raise _unknown(word.split("=")[0], "command line", flag)
        raise UsageError(f"command line: unexpected argument {_shown(word)}; --help lists the options")
    flags = vars(arguments)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in [*([base] if base else []), *map(Path, flags.get("cfgs", ()))]:
        for key, value in read_yaml(path).items():
            if key not in Options.model_fields:
                raise _unknown(key, str(path))
            if key == "cfgs":  # in the reference's sessions, whose files already contain the merged options
                continue
            values[key], origin[key] = value, f"{path}:"
    for key, value in flags.items():
        values[key], origin[key] = value, "command line:"
    return validated(values, origin)


def to_yaml(options: Options) -> str:
    """The options that repeat a run, as YAML for ``--cfgs``; options of one start only are omitted."""
    kept = {name for name in Options.model_fields if not extra(name)["this_run"]}
    return yaml.safe_dump(options.model_dump(mode="json", include=kept), sort_keys=False, default_flow_style=None)
