"""Errors that are the input's fault: reported in one line, with exit code 2. Bugs keep their tracebacks."""

import atexit
import codecs
import contextlib
import errno
import io
import os
import select
import signal
import sys
import time
import unicodedata

# What to do about an OSError, by its number.
ADVICE = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of the disk quota",
    errno.EFBIG: "raise ulimit -f",
    errno.EROFS: "make it writable, or set another directory",
    errno.EACCES: "change its permissions, or use another path",
    errno.EIO: "the disk or its connection is failing: see dmesg",
    errno.ESTALE: "the network file system is gone: mount it again",
    errno.ENOTCONN: "the network file system is gone: mount it again",
}


exits_at_once = False  # the ranks meet, with threads of gloo: end() ends them; ranks.processes.start sets it


class UserError(ValueError):
    """A setting, file or model is wrong. The message has the value, the rule, and what to type instead."""


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step is NaN or infinite. Weights and optimizer are unchanged."""


class OutOfMemory(Exception):
    """The memory of a device or of the host is too small. The message says where, and what would help."""


def printable(text):
    """A text with control characters escaped: in raw form they could change what the terminal shows.

    Characters that format text, such as those that reverse it, are escaped too, except the two that join
    letters and emoji.
    """
    hidden = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    return "".join(char.encode("unicode_escape").decode()
                   if unicodedata.category(char) in hidden and char not in "\n\t\u200c\u200d" else char
                   for char in text)


# What stands for a character that the encoding of the screen lacks (LANG=C); others are escaped.
PLAIN = {"×": "x", "…": "...", "–": "-", "«": "<<", "»": ">>", "⟪": "<<<", "⟫": ">>>"}


def plain(error):
    """An error handler of codecs: replace what the encoding of the screen lacks."""
    text = "".join(PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode()
                   for char in error.object[error.start : error.end])
    return text, error.end


codecs.register_error("plain", plain)


class Screen(io.FileIO):
    """Standard output or standard error of a training run: writing to it never raises.

    The screen may go away (ssh drops, `| head`, `| tee` after Ctrl-C, a full disk) and must not decide over a
    run. What can't be written is lost; metrics.jsonl has every number.
    """

    has_failed = False

    def write(self, data):
        written = None
        try:
            written = super().write(data)
        except OSError as error:
            if not self.has_failed and self.fileno() == 1:
                say(f"warning: standard output can't be written ({error.strerror}); its text is lost, and "
                    "the run continues")
            self.has_failed = True
        return len(data) if written is None else written  # None: a pipe that does not block is full


def prepare_streams(endures):
    """Make the standard streams safe to use. Called before anything is printed.

    A closed one is opened on /dev/null: otherwise a file that is opened later gets its number, and what is
    printed ends up in it.

    endures  put a Screen under standard output and standard error
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if number == 0 or not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="plain")
        if endures and stream is getattr(sys, f"__{name}__"):  # otherwise it is no screen, as in a test
            screen = Screen(number, "w", closefd=False)
            buffer = screen if stream.write_through else io.BufferedWriter(screen)  # True: python -u
            setattr(sys, name, io.TextIOWrapper(
                buffer, stream.encoding, "plain", line_buffering=stream.line_buffering,
                write_through=stream.write_through))


def say(message):
    """Print a line of this program on standard error, if that is still possible."""
    with contextlib.suppress(OSError):
        print(f"{os.path.basename(sys.argv[0])}: {printable(message)}", file=sys.stderr, flush=True)


def say_once(message):
    """say() for an error that all ranks of a node may find before they meet: the first rank prints it.

    The others wait until torchrun ends them, because the first one has ended. A rank that finds an error
    alone prints it after 5 seconds.
    """
    is_one_of_many = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0"
    deadline = time.monotonic() + 5
    with contextlib.suppress(KeyboardInterrupt):
        while is_one_of_many and not exits_at_once and time.monotonic() < deadline:
            if signal.SIGTERM in signal.sigpending():  # the ranks of train.sh start with it blocked
                return
            time.sleep(0.1)
    say(message)


def is_stdout_closed():
    """Whether the reader of standard output (`| head`) has closed it. If so, later output is discarded."""
    poll = select.poll()
    poll.register(1, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python prints an error when it exits
    return is_closed


def run(main):
    """Call main(). Turn errors that are not bugs into one line on standard error and an exit code.

    0    the reader of standard output closed it (`| head`), except during a training run, which continues
    1    a NonFiniteError, or an OutOfMemory
    2    a UserError, or an OSError that names its file
    130  Ctrl-C before the run handles signals

    Other exceptions, plain ValueErrors included, are bugs of this code or a fork and keep their tracebacks.
    """
    try:
        report(main)
    except SystemExit as stop:
        if not exits_at_once or not isinstance(stop.code, int):
            raise
        end(stop.code)
    if exits_at_once:
        end(0)


def end(code):
    """End a process of several ranks without the last part of Python's own end.

    A thread of gloo that has to free the tensor of the last collective then would abort the process
    ("terminate called without an active exception", github.com/pytorch/pytorch/issues/190489).
    """
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def report(main):
    """run() without the end of the process."""
    trains = os.path.basename(sys.argv[0]) == "sft.py"
    if os.environ.get("HOME") == "":  # ~/.cache would be /.cache
        del os.environ["HOME"]
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by venv.enter()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams(endures=trains and not {"--help", "-h", "--explain"} & set(sys.argv))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not is_stdout_closed():
            raise
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (NonFiniteError, OutOfMemory) as error:
        say(f"error: {error}")
        sys.exit(1)
    except UserError as error:
        say_once(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        message, advice = f"error: {error.filename}: {error.strerror}", ADVICE.get(error.errno)
        if advice:
            message += f"; {advice}"
            if trains:
                message += "; --resume_from auto then continues from the newest complete checkpoint, if any"
        say_once(message)
        sys.exit(2)
