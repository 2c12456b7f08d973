"""Errors that are the input's fault: reported in one line, with exit code 2. Bugs keep their tracebacks."""

import errno
import os
import select
import signal
import sys
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

    0    the reader of standard output closed it (`| head`), except during a training run
    1    a NonFiniteError, an OutOfMemory, or a training run whose standard output was closed
    2    a UserError, or an OSError that names its file
    130  Ctrl-C before the run handles signals

    Other exceptions, plain ValueErrors included, are bugs of this code or a fork and keep their tracebacks.
    """
    program = os.path.basename(sys.argv[0])
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by venv.enter()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except BrokenPipeError:
        if not is_stdout_closed():
            raise
        if program != "sft.py" or {"--help", "-h", "--explain"} & set(sys.argv):
            sys.exit(0)
        print("sft.py: error: its output was closed (by | head?), which ended the run; write it to a file",
              file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (NonFiniteError, OutOfMemory) as error:
        print(f"{program}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        print(f"{program}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        message, advice = f"{program}: error: {error.filename}: {error.strerror}", ADVICE.get(error.errno)
        if advice:
            message += f"; {advice}"
            if program == "sft.py":
                message += "; --resume_from auto then continues from the newest complete checkpoint, if any"
        print(printable(message), file=sys.stderr)
        sys.exit(2)
