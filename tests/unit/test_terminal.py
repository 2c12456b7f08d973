"""screen/terminal.py: what a user types to chat.py."""

import io
import sys

import pytest

from screen import terminal
from settings.errors import UserError


def test_commands_and_lines_that_are_not_prompts(monkeypatch, capsys):
    """/help, unknown commands and empty lines ask again; text that is not UTF-8 too; the end of the input is /quit."""
    typed = iter(["", " /help ", "/foo", "/?", "a\udcff", " hello "])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert terminal.read_prompt(is_interactive=True) == "hello"
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [terminal.HELP, f"no command /foo; {terminal.HELP}", f"no command /?; {terminal.HELP}"]
    assert "not UTF-8" in shown[3] and len(shown) == 4

    for line in ("/reset", "/quit", "/etc/hosts", "/foo is a path", "// a comment"):  # the last three are prompts
        monkeypatch.setattr("builtins.input", lambda prompt, line=line: line)
        assert terminal.read_prompt(is_interactive=True) == line

    for error in EOFError, KeyboardInterrupt:
        def end(prompt, error=error):
            raise error

        monkeypatch.setattr("builtins.input", end)
        assert terminal.read_prompt(is_interactive=True) == "/quit"


@pytest.mark.parametrize("text, error", [("", "is empty"), (" \n", "is empty"), ("\udcff", "not UTF-8")])
def test_standard_input_without_a_prompt(text, error, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(UserError, match=error):
        terminal.read_prompt(is_interactive=False)


def test_standard_input_is_one_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\nmore\n"))
    assert terminal.read_prompt(is_interactive=False) == "/help\nmore"


def test_the_greeting_escapes_the_name_of_the_model(capsys):
    terminal.greet("a\x1b[2J")
    assert capsys.readouterr().out == "chat with a\\x1b[2J\n" + terminal.HELP + "\n"
