"""screen/terminal.py: what a user types to chat.py."""

import io
import sys

import pytest
from helpers import TINY

import chat
from screen import terminal
from settings.errors import UserError
from text.template import ChatTokenizer


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


def test_an_answer_that_is_cut_says_so(monkeypatch, capsys):
    """An answer ends with a token that ends a turn, or --max_new_tokens cuts it."""
    tokenizer, cfg = ChatTokenizer(TINY), chat.Config(max_new_tokens=3)
    text = tokenizer.tokenizer.encode("one two three").ids[:2]
    for ids, line in ((text + text[:1], "\n(cut at 3 tokens by --max_new_tokens)"), (text + [0], ""), ([0], "")):
        monkeypatch.setattr(chat, "generate", lambda model, tokens, n, eos_ids, sample, ids=ids: iter(ids))
        said = "".join(chat.answer(None, tokenizer, {0}, [{"role": "user", "content": "count"}], cfg))
        assert said == tokenizer.tokenizer.decode(ids, skip_special_tokens=True)
        assert capsys.readouterr().err == line


def test_an_answer_changes_no_terminal(monkeypatch):
    """A model may say what a terminal obeys. A file or a pipe gets the text as it is."""
    text = "a\n\tb \x1b]0;title\x07 \u200d ä"
    assert terminal.shown(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.shown(text) == "a\n\tb \\x1b]0;title\\x07 \u200d ä"


def test_the_greeting_escapes_the_name_of_the_model(capsys):
    terminal.greet("a\x1b[2J")
    assert capsys.readouterr().out == "chat with a\\x1b[2J\n" + terminal.HELP + "\n"
