"""The terminal of chat.py: its greeting, its commands, and what is typed."""

import contextlib
import importlib
import re
import sys

from settings.errors import UserError, printable

HELP = "/reset: new conversation, /help: this line, /quit or Ctrl-D: exit, Ctrl-C: end the answer"
COMMANDS = ("/reset", "/quit")  # those of chat.py


def greet(model):
    """Say what one talks to. With readline, input() edits lines: arrows, Backspace over wide characters."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    print(f"chat with {printable(model)}\n{HELP}")


def read_prompt(is_interactive):
    """A line of the terminal that is a prompt, /reset or /quit; or all of standard input. No outer spaces.

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
        if is_interactive and is_command(text):
            if text in COMMANDS:
                return text
            print("" if text == "/help" else f"no command {printable(text)}; ", HELP, sep="")
        elif text:
            return text


def shown(text):
    """A text of the model; for a terminal, which control characters would change, these are escaped."""
    return printable(text) if sys.stdout.isatty() else text


def is_command(text):
    """Whether a line is /word, and not a path such as /etc/hosts or a text that begins with a slash."""
    return re.fullmatch(r"/[\w?]*", text) is not None


def checked(read):
    """The prompt that read() returns, without outer spaces. Raises UserError if it is not UTF-8."""
    try:
        text = read()
        text.encode()
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error}") from error
    return text.strip()
