"""The terminal of chat.py: its greeting, its commands, and what is typed."""

import contextlib
import importlib
import sys

from settings.errors import UserError, printable

HELP = "/reset: new conversation, /help: this line, /quit or Ctrl-D: exit, Ctrl-C: end the answer"


def greet(model):
    """Say what one talks to. With readline, input() edits lines: arrows, Backspace over wide characters."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    print(f"chat with {printable(model)}\n{HELP}")


def read_prompt(is_interactive):
    """A line of the terminal that is neither empty nor /help, or all of standard input, without outer spaces.

    At the end of the input, or after Ctrl-C, it is /quit. Raises UserError if standard input is empty or not
    UTF-8.
    """
    while True:
        try:
            text = checked(lambda: input("> ") if is_interactive else sys.stdin.read())
            if not text and not is_interactive:
                raise UserError("the prompt is empty; write it on standard input, or use --prompt")
        except (EOFError, KeyboardInterrupt):
            print()
            return "/quit"
        except UserError as error:
            if not is_interactive:
                raise
            print(error)
            continue
        if is_interactive and text == "/help":
            print(HELP)
        elif text:
            return text


def checked(read):
    """The prompt that read() returns, without outer spaces. Raises UserError if it is not UTF-8."""
    try:
        text = read()
        text.encode()
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error}") from error
    return text.strip()
