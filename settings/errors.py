"""Errors that are the input's fault: reported in one line, with exit code 2. Bugs keep their tracebacks."""

import errno
import os
import select
import sys

# What helps against an error of the disk, by its number.
ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise ulimit -f",
    errno.EROFS: "make it writable, or give a directory that is",
    errno.EACCES: "ask for the right to it, or give a directory that is yours",
    errno.EIO: "the disk or its connection is failing: see dmesg",
    errno.ESTALE: "the network file system has gone: mount it again",
    errno.ENOTCONN: "the network file system has gone: mount it again",
}


class UserError(ValueError):
    """A setting, a file or a model is at fault. Says the value given, the rule, and what to type instead."""


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step is NaN or infinite; the weights were not touched."""


def is_stdout_closed():
    """Whether what reads standard output has closed it. Then nothing more is written there."""
    poll = select.poll()
    poll.register(1, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at its end
    return is_closed


def run(main):
    """Call main() and turn what is not a bug into one line on standard error and an exit code.

    2    a UserError, or an OSError that names its file
    1    a NonFiniteError
    130  Ctrl-C before the run listens for signals

    Other exceptions, plain ValueErrors included, are bugs of this code or a fork and keep their tracebacks.
    """
    program = os.path.basename(sys.argv[0])
    try:
        main()
    except BrokenPipeError:
        if not is_stdout_closed():
            raise
        if program != "sft.py" or {"--help", "-h", "--explain"} & set(sys.argv):
            sys.exit(0)  # `| head` has read enough
        print("sft.py: error: its output was closed (by | head?), which ended the run; write it to a file",
              file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except NonFiniteError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        advice = ADVICE.get(error.errno, "")
        if advice and program == "sft.py":
            advice += "; then --resume_from auto goes on from the newest whole checkpoint"
        print(f"{program}: error: {error}" + (f"; {advice}" if advice else ""), file=sys.stderr)
        sys.exit(2)
