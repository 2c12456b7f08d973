"""One run writes to an output directory, and it overwrites nothing that no run wrote.

While a run writes, OUTPUT_DIR/run.lock says which: a JSON object with its process, host and run id. The
holder touches the file every HEARTBEAT seconds. Programs that only read (chat.py, tools) ignore it.

This needs no file locks, which some network drives lack. A holder whose lock was taken over, because it had
been frozen, notices it before its next save (check), also if the other run has ended since.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time

from disk import files
from settings.errors import UserError

LOCK = "run.lock"
HEARTBEAT = 2  # seconds between two touches of the lock
PATIENCE = 10  # seconds after which another node shows a new file; network drives take some
# what a run writes to its output directory, beside the directories of checkpoints and loggers
OF_A_RUN = ("config.yaml", "ledger.json", "metrics.jsonl", "report.html", "samples.jsonl")
NOT_SHARED = "--output_dir: rank 0's run.lock is not in it, so the nodes do not share it"
IDENTITY = ("machine", "pid", "start")  # of a process, see this_process


def this_process():
    """What the lock says about this process.

    machine   the same for two processes that can see whether the other is alive: the kernel since its start,
              and the namespace of process ids (containers of one host do not see each other)
    start     when the process started: another one may get the same pid later
    run_id    of torchrun or of Slurm, None without; restarts of this run so far
    """
    run_id, restarts = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if run_id in (None, "none"):  # torchrun's default, the same for all runs
        run_id, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            machine = f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except FileNotFoundError:  # not Linux
        machine = socket.gethostname()
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine,
            "start": start_of(os.getpid()), "run_id": run_id, "restarts": int(restarts or 0),
            "since": time.strftime("%F %T")}


def start_of(pid):
    """When a process started, as its kernel counts; "" if it has ended, or without /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            values = f.read().rpartition(")")[2].split()  # the name before it may contain spaces
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if values[0] == "Z" else values[19]  # a zombie has ended


def is_alive(holder):
    """Whether the holder of a lock, a process of this machine, has not ended."""
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return start_of(holder["pid"]) == holder["start"]


def is_same(holder, other):
    return all(holder[key] == other[key] for key in IDENTITY)


def identity(holder):
    """A text that only this process has."""
    return " ".join(str(holder[key]) for key in IDENTITY)


def read_lock(directory):
    """The content of an output directory's lock; None if there is none; {} while it is being written."""
    path = os.path.join(directory, LOCK)
    try:
        content = json.loads(files.read_file(path) or b"{}")
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict) or (content and not this_process().keys() <= content.keys()):
        raise UserError(f"{path} is not a run's lock; if nothing writes to {directory}, remove it")
    return content


class Lock(threading.Thread):
    """The lock of an output directory, held by this process between take() and release()."""

    def __init__(self, directory):
        super().__init__(name="lock of the output directory", daemon=True)
        self.directory, self.path = directory, os.path.join(directory, LOCK)
        self.me, self.ends = this_process(), threading.Event()

    def take(self, timeout, progress):
        """Take the lock, if need be from a holder that has ended.

        timeout   seconds without a touch of the lock after which its holder counts as ended
        progress  called again and again while this waits

        Raises UserError that names the holder if it is alive.
        """
        touched, since, has_said = None, time.monotonic(), False
        while not self.create():
            progress()
            holder, (touch, age) = read_lock(self.directory), self.last_touch()
            if not holder:  # it was removed, or is being written, unless a full disk or a kill prevented that
                if age > PATIENCE:
                    self.remove({})
                time.sleep(0.05)
                continue
            name = f"process {holder['pid']} on {holder['host']}"
            reason = self.reason_to_take(holder)
            has_waited = time.monotonic() - since > 3 * HEARTBEAT  # the age alone may be a jump of the clock
            if not reason and has_waited and touch == touched and age > timeout:
                reason = f"without a sign of life for {age:.0f} s"
            if reason:
                if self.remove(holder):
                    print(f"lock     {self.path} of {name}, {reason}, was taken over", file=sys.stderr)
                continue
            touched = touched or touch
            if touch != touched:
                raise UserError(f"{name} writes to {self.directory}, since {holder['since']}; stop it, or "
                                "use another --output_dir")
            if has_waited and not has_said:
                has_said = True
                print(f"lock     {self.path}: {name} gives no sign of life; it is taken over after --timeout "
                      f"{timeout} s, or now if you remove that file", file=sys.stderr)
            time.sleep(0.2)
        self.start()

    def create(self):
        """Create the lock; return whether this process holds it now."""
        try:
            with open(self.path, "x", encoding="utf-8") as f:
                json.dump(self.me, f)
        except FileExistsError:
            holder = read_lock(self.directory)
            return bool(holder) and is_same(holder, self.me)
        return True

    def last_touch(self):
        """When the lock was touched, and how many seconds ago, both by the clock of the file system; 0, 0 if
        there is none.
        """
        with tempfile.TemporaryFile(dir=self.directory) as now:
            try:
                touch = os.stat(self.path).st_mtime
            except FileNotFoundError:
                return 0, 0
            return touch, os.fstat(now.fileno()).st_mtime - touch

    def reason_to_take(self, holder):
        """Why a lock may be taken from its holder at once; None if the holder may be alive."""
        if holder["machine"] == self.me["machine"]:
            if not is_alive(holder):
                return "which has ended"
        elif holder["run_id"] and holder["run_id"] == self.me["run_id"]:
            return f"the same run {holder['run_id']}"
        if holder["run_id"] == self.me["run_id"] and holder["restarts"] < self.me["restarts"]:
            return f"an earlier start of the run {holder['run_id']}"
        return None

    def remove(self, holder):
        """Remove the lock of this holder; False if another process was faster."""
        moved = f"{self.path}.{self.me['pid']}"
        try:
            os.rename(self.path, moved)
        except FileNotFoundError:
            return False
        with open(moved, encoding="utf-8") as f:
            is_of_holder = json.loads(f.read() or "{}") == holder
        if is_of_holder or os.path.exists(self.path):
            os.unlink(moved)
        else:
            os.rename(moved, self.path)
        return is_of_holder

    def run(self):
        """Touch the lock until release()."""
        while not self.ends.wait(HEARTBEAT):
            with contextlib.suppress(OSError, UserError):  # the next save reports what is wrong
                if is_held(self.directory):
                    os.utime(self.path)

    def release(self):
        self.ends.set()
        self.join()
        if read_lock(self.directory) == self.me:
            os.unlink(self.path)


@contextlib.contextmanager
def alone(cfg, ranks):
    """While the block runs, this run alone writes to --output_dir. Every rank enters it.

    Raises UserError on rank 0 if another run writes there.
    """
    if cfg.selfcheck:  # writes nothing
        yield
        return
    ranks.set_phase("lock of the output directory")
    held = Lock(cfg.output_dir)
    if ranks.rank == 0:
        held.take(cfg.timeout, ranks.show_progress)
    try:
        ranks.wait_for_slower()
        ranks.agree("directory", {NOT_SHARED: ":" + seen(cfg.output_dir, ranks)})
        ranks.set_phase("start")
        yield
    finally:
        if ranks.rank == 0:
            held.release()


def seen(directory, ranks):
    """The text of the lock that this rank sees: not rank 0's if the nodes do not share the directory."""
    if ranks.rank == 0:
        ranks.store.set("lock", identity(this_process()))
    wanted, until = ranks.store.get("lock").decode(), time.monotonic() + PATIENCE
    while True:
        holder = read_lock(directory)
        text = identity(holder) if holder else ""
        if text == wanted or time.monotonic() > until:
            return text
        time.sleep(0.2)


def is_held(directory):
    """Whether this process holds the lock of an output directory."""
    holder = read_lock(directory)
    return bool(holder) and is_same(holder, this_process())


def check(directory):
    """Raise UserError unless this process still holds the lock of an output directory, before it writes."""
    if is_held(directory):
        return
    ends = "this process has stopped and saves nothing"
    holder = read_lock(directory)
    if not holder:  # without it, what another run has written meanwhile would be overwritten
        raise UserError(f"{os.path.join(directory, LOCK)} is gone: another run took it over and has ended, "
                        f"or somebody removed it; {ends}; --resume_from auto continues from the newest "
                        "checkpoint")
    raise UserError(f"process {holder['pid']} on {holder['host']} writes to {directory} since "
                    f"{holder['since']}: it took the lock over while this process gave no sign of life; "
                    f"{ends}")


def check_is_free(directory):
    """Raise UserError if a new run would overwrite a file of an output directory that no run wrote."""
    config = os.path.join(directory, "config.yaml")
    if os.path.exists(config) and is_of_a_run(config):
        return  # a run that saved no checkpoint
    for name in OF_A_RUN:
        path = os.path.join(directory, name)
        if os.path.lexists(path) and not (os.path.isfile(path) and os.path.getsize(path) == 0):
            raise UserError(f"--output_dir {directory}: no run wrote its {name}, and this run would "
                            "overwrite it; move that file, or use another --output_dir")


def is_of_a_run(path):
    """Whether a config.yaml was written by a run (settings.parser.write_yaml), and not by a person."""
    text = files.read_file(path).decode(errors="replace")
    # those of older versions have no comment, and all settings
    begins = text.startswith(("# Settings of a run", "model: "))
    return begins and "\noutput_dir: " in text and "\n# " not in text
