"""The nodes of a run meet at MASTER_ADDR:MASTER_PORT before torchrun starts.

torchrun itself would wait there without a word, for ever or for 15 minutes, and ignore signals meanwhile.
Here each node says for whom it waits, what may be wrong, and ends at a signal. Node 0 listens. Each node
sends it one line of JSON, its greeting, and keeps the connection; node 0 answers with lines of JSON:
{"joined": true}, {"wait": ...} while nodes are missing, at last {"go": true} or {"error": ...}.

This file imports only the standard library.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
import uuid

from settings.errors import printable

LONGEST = 4096  # bytes of a line: anything may connect to a port
REMINDERS = (1, 10, 30)  # seconds after which the wait is shown; then once a minute


class MeetingError(Exception):
    """The nodes do not belong together, or did not all come. The message says what to change."""


class Meeting:
    """One node's part. meet() returns when all nodes are there, or raises MeetingError."""

    def __init__(self, node_rank, n_nodes, address, port, timeout):
        """timeout: seconds until the wait ends"""
        self.node_rank, self.n_nodes, self.address, self.port = node_rank, n_nodes, address, port
        self.timeout, self.began, self.reminders = timeout, time.monotonic(), 0
        self.token = uuid.uuid4().hex  # tells this process from another that says it is the same node
        self.interface_address = None  # of this node, on the way to the others

    def meet(self):
        return self.receive_nodes() if self.node_rank == 0 else self.go_to_node_0()

    # ---- both sides ---------------------------------------------------------------------------------------

    def greeting(self):
        return {"project": "sft", "node_rank": self.node_rank, "n_nodes": self.n_nodes,
                "host": socket.gethostname(), "token": self.token}

    def show_wait(self, message):
        """Print the message if it is time to. Returns whether it was; raises MeetingError at the limit."""
        waited = time.monotonic() - self.began
        if waited > self.timeout:
            raise MeetingError(f"gave up after --timeout {self.timeout} s: {message}")
        due = REMINDERS[self.reminders] if self.reminders < 3 else 60 * (self.reminders - 2)
        if waited < due:
            return False
        self.reminders += 1
        show(message)
        return True

    def place(self):
        """10.0.0.1:29500"""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    # ---- node 0 -------------------------------------------------------------------------------------------

    def receive_nodes(self):
        """Listen until every other node has sent a fitting greeting; then let all go."""
        listener = self.listen()
        selector, nodes = selectors.DefaultSelector(), {}  # node rank -> its connection
        selector.register(listener, selectors.EVENT_READ)
        own = None  # a connection to MASTER_ADDR, which must end in this process
        try:
            while len(nodes) < self.n_nodes - 1:
                own = own or self.call_master()
                for key, _ in selector.select(0.2):
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ, bytearray())
                    else:
                        self.read_greeting(selector, key, nodes)
                self.check_own(own)
                missing = [rank for rank in range(1, self.n_nodes) if rank not in nodes]
                if missing and self.show_wait(self.waiting_for(missing, own)):
                    for connection in nodes.values():
                        reply(connection, wait=self.waiting_for(missing, own))
        except MeetingError as error:
            for connection in nodes.values():
                reply(connection, error=str(error))
            raise
        finally:
            listener.close()
        for connection in nodes.values():
            reply(connection, go=True)
        for connection in nodes.values():  # who closes first keeps the port busy: let it be the others
            connection.settimeout(2)
            with contextlib.suppress(OSError):
                connection.recv(1)
            connection.close()

    def listen(self):
        """A listening socket on MASTER_PORT of every interface."""
        has_both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if has_both else socket.AF_INET
        try:
            return socket.create_server(("", self.port), family=family, dualstack_ipv6=has_both, backlog=128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                self.find_other_node_0()
                raise MeetingError(f"MASTER_PORT {self.port} is in use on this node, by another run or "
                                   "program; set another port, the same on all nodes") from error
            raise MeetingError(f"MASTER_PORT {self.port}: {os.strerror(error.errno)}; set another port, the "
                               "same on all nodes") from error

    def waiting_for(self, missing, own):
        """The line that shows which nodes are missing. own: the connection to this node, None without."""
        ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        hint = "" if own else " Node 0 can't reach itself there: is MASTER_ADDR its address?"
        return (f"waiting for node{'s' * (len(missing) > 1)} {ranks} of {self.n_nodes} at {self.place()} "
                f"({self.n_nodes - len(missing)} of {self.n_nodes} joined): is train.sh running there, with "
                f"NODE_RANK {ranks}, NNODES {self.n_nodes} and the same MASTER_ADDR and MASTER_PORT, and is "
                f"the port open?{hint}")

    def read_greeting(self, selector, key, nodes):
        """Read from a connection. A node that fits is added to `nodes`; one that leaves is removed."""
        connection, received = key.fileobj, key.data
        try:
            chunk = connection.recv(LONGEST)
        except OSError:
            chunk = b""
        received += chunk
        if chunk and b"\n" not in received and len(received) < LONGEST:
            return
        if not chunk or len(received) >= LONGEST:  # it left, or it is no node
            selector.unregister(connection)
            connection.close()
            for rank in [rank for rank, other in nodes.items() if other is connection]:
                del nodes[rank]
            return
        greeting = parse(received)
        received.clear()
        if greeting.get("project") != "sft" or greeting.get("token") == self.token:
            return
        problem = self.problem_of(greeting, nodes)
        if problem:
            reply(connection, error=problem)
            raise MeetingError(problem)
        self.interface_address = self.interface_address or numeric_address(connection)
        nodes[greeting["node_rank"]] = connection
        reply(connection, joined=True)

    def problem_of(self, greeting, nodes):
        """What is wrong with a node that came, or None."""
        rank, host = greeting.get("node_rank"), greeting.get("host")
        if greeting.get("n_nodes") != self.n_nodes:
            return (f"node {rank} ({host}) has NNODES {greeting.get('n_nodes')}, and node 0 "
                    f"({socket.gethostname()}) has {self.n_nodes}; set the same on all nodes")
        if rank == 0 or rank in nodes:
            return (f"two nodes have NODE_RANK {rank} ({host} is one); give each node a "
                    f"number of its own, from 0 to {self.n_nodes - 1}")
        return None

    def call_master(self):
        """Greet whoever listens at MASTER_ADDR: this process, or another that has NODE_RANK 0 too."""
        with contextlib.suppress(OSError):
            connection = socket.create_connection((self.address, self.port), timeout=1)
            reply(connection, **self.greeting())
            connection.setblocking(False)
            return connection
        return None

    def check_own(self, connection):
        """Raise MeetingError if another node 0 has answered; this process does not answer itself."""
        if connection is not None:
            with contextlib.suppress(OSError):
                answer = parse(connection.recv(LONGEST))
                if "error" in answer:
                    raise MeetingError(str(answer["error"]))

    def find_other_node_0(self):
        """Raise MeetingError if the program that listens on MASTER_PORT is node 0 of this run."""
        connection = self.call_master()
        if connection is not None:
            connection.settimeout(2)
            self.check_own(connection)

    # ---- the other nodes ----------------------------------------------------------------------------------

    def go_to_node_0(self):
        """Connect to node 0 and wait for its word; connect again if it leaves."""
        waiting = f"waiting for node 0 of {self.n_nodes} at {self.place()}"
        foreign = "what listens there is not a train.sh that waits: another run or program?"
        while True:
            try:
                with socket.create_connection((self.address, self.port), timeout=1) as connection:
                    self.interface_address = numeric_address(connection)
                    reply(connection, **self.greeting())
                    if self.follow(connection, f"{waiting}: {foreign}"):
                        return
                why = foreign
            except socket.gaierror as error:
                why = f"the name does not resolve ({error.strerror}); is MASTER_ADDR right?"
            except OSError as error:
                why = (f"{error.strerror or error}; is train.sh running there, with NODE_RANK 0, and is the "
                       "port open?")
            self.show_wait(f"{waiting}: {why}")
            time.sleep(0.2)

    def follow(self, connection, unanswered):
        """Read what node 0 says. Returns whether the run starts; if not, the other side has left.

        unanswered  what to show while the other side says nothing
        """
        connection.settimeout(0.5)
        received, joined = b"", None
        while True:
            try:
                chunk = connection.recv(LONGEST)
                if not chunk:
                    return False
            except TimeoutError:
                chunk = b""
            *lines, received = (received + chunk).split(b"\n")
            for answer in map(parse, lines):
                if "error" in answer:
                    raise MeetingError(str(answer["error"]))
                if "go" in answer:
                    return True
                if "joined" in answer:
                    joined = time.monotonic()
                if "wait" in answer:
                    show(f"this node has joined; {answer['wait']}")
            if joined is None:
                self.show_wait(unanswered)
            elif time.monotonic() - joined > self.timeout + 5:  # node 0 gives up first, unless it is gone
                raise MeetingError(f"node 0 at {self.place()} is silent since --timeout {self.timeout} s")
            received = received[-LONGEST:]


def show(message):
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"train.sh: {printable(message)}", file=sys.stderr, flush=True)


def wait_for_nodes(meeting):
    """Call meeting.meet() in a thread, so that signals are handled at once: to look up a name may take long.

    Raises MeetingError.
    """
    outcome = []

    def run():
        try:
            outcome.append(meeting.meet())
        except MeetingError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if not outcome:  # a bug, whose traceback the thread has printed
        sys.exit(1)
    if isinstance(outcome[0], MeetingError):
        raise outcome[0]


def numeric_address(connection):
    """The address of this end of a connection; 10.0.0.1 is ::ffff:10.0.0.1 for a socket of both versions."""
    return connection.getsockname()[0].removeprefix("::ffff:")


def reply(connection, **message):
    """Send a message as a line of JSON; who has left needs none."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def parse(line):
    """The JSON object in a line, or {} if it holds none."""
    with contextlib.suppress(ValueError):
        message = json.loads(bytes(line))
        if isinstance(message, dict):
            return message
    return {}
