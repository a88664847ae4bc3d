"""Tables, progress bars and the log."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.session.console import LOGGER, SUMMARY, log_to_file, logger, progress, start_logging, table


@pytest.fixture(autouse=True)
def restore_log() -> Iterator[None]:
    log = logging.getLogger(LOGGER)
    before = list(log.handlers), log.level, log.propagate
    yield
    for handler in log.handlers:
        if handler not in before[0]:
            handler.close()
    log.handlers[:], log.level, log.propagate = before


def test_table_aligns_the_first_column_left_and_others_right() -> None:
    text = table(["name", "n"], [["a", 1], ["longer", 1234], ["", 5]])
    assert text.split("\n") == [
        "name       n",
        "------  ----",
        "a          1",
        "longer  1234",
        "           5",
    ]


def test_table_without_rows_is_its_header() -> None:
    assert table(["one", "two"], []).split("\n") == ["one  two", "---  ---"]


def test_table_has_no_trailing_spaces() -> None:
    assert table(["a"], [["b"], ["ccc"]]).split("\n") == ["a", "---", "b", "ccc"]


def test_progress_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress(iter("ab"), "work", "letter", 2)) == ["a", "b"]
    bar = progress(range(5), "work")
    bar.start_t = bar.last_print_t = 0.0  # as if it had started long ago
    assert list(bar) == [0, 1, 2, 3, 4]
    message = capsys.readouterr()
    assert message.out == message.err == ""


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_bar_appears_after_a_second_and_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(range(3), "quick")) == [0, 1, 2]
    assert "quick" not in terminal.getvalue()
    bar = progress(range(3), "slow", "stone")
    bar.start_t -= 10
    bar.last_print_t -= 10
    assert list(bar) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "slow" in shown and "stone" in shown and shown.endswith("\r")


def test_log_lines_are_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging()
    logger().info("one %d", 1)
    logger().warning("two")
    logger().debug("never")
    message = capsys.readouterr()
    assert (message.out, message.err) == ("one 1\ntwo\n", "")


def test_brief_shows_only_marked_lines_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(brief=True)
    logger().info("an epoch")
    logger().info("a round", extra=SUMMARY)
    logger().warning("a warning")
    logger().error("an error")
    assert capsys.readouterr().out == "a round\na warning\nan error\n"


def test_every_line_is_shown_once_after_two_starts(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(brief=True)
    start_logging()
    logger().info("once")
    assert capsys.readouterr().out == "once\n"


def test_log_file_has_earlier_lines_with_their_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(brief=True)
    logger().info("early")
    handler = log_to_file(tmp_path / "log.txt")
    logger().info("late é")
    logger().warning("careful")
    handler.close()
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["INFO early", "INFO late é", "WARNING careful"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)
    assert capsys.readouterr().out == "careful\n"


def test_existing_log_file_is_appended_to(tmp_path: Path) -> None:
    for text in ("first", "second"):
        start_logging()
        logger().info(text)
        log_to_file(tmp_path / "log.txt").close()
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_file_name_that_is_not_utf_8_can_be_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python reads such names with lone surrogates in place of the bytes."""
    start_logging(brief=True)
    handler = log_to_file(tmp_path / "log.txt")
    logger().info("unreadable: %s", "caf\udce9.jpg")
    handler.close()
    assert "unreadable: caf" in (tmp_path / "log.txt").read_text(encoding="utf-8", errors="surrogateescape")
    assert capsys.readouterr().err == ""


def test_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging()
    handler = log_to_file(tmp_path / "log.txt")
    logger().info("unreadable: %s\tand\nanother line", "\x1b[2J\u202egpj.\x9b\r")
    handler.close()
    expected = "unreadable: \\x1b[2J\\u202egpj.\\x9b\\r\tand\nanother line\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith(f" INFO {expected}")
