"""A standby process per node, from which each new worker is forked: no worker waits for `import torch`.

    agent ── starts ──► standby (this file, `serve`): has everything imported, no thread running, no GPU touched
      └─── starts ──► client (this file, as a script): asks the standby for a worker, hands it its arguments, environment
                      and standard streams, passes signals on, and ends as the worker ends

To the agent the client is the worker: a killed client takes its worker along, and a killed worker
its client. The client runs with `python -I -S`, so its start costs 20 ms; it must import nothing
but a few modules of the standard library.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any

LENGTH = 8  # bytes in front of each message
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # passed on to workers
DEATHS, WITHIN = 3, 60.0  # so many of a node's standbys killed in so many seconds: it cannot have one


def send(connection: socket.socket, message: object, descriptors: tuple[int, ...] = ()) -> None:
    """One JSON message, and open files with it."""
    content = json.dumps(message).encode()
    socket.send_fds(connection, [len(content).to_bytes(LENGTH, "little")], list(descriptors))
    connection.sendall(content)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """The next message and the files that came with it.

    Raises:
        EOFError: if the other side is gone.
    """
    length, descriptors, _, _ = socket.recv_fds(connection, LENGTH, 3)
    content, left = b"", int.from_bytes(length, "little")
    while part := connection.recv(left):  # no more: the next message may follow at once
        content, left = content + part, left - len(part)
    if left or not content:
        raise EOFError("the other side is gone")
    return json.loads(content), list(descriptors)


# --- the agent's side --------------------------------------------------------------------------------------------------


def keep(name: str, modules: list[str]) -> None:
    """Keep a standby running until this process ends; one that is killed has a successor.

    This process holds the socket, so clients that come meanwhile wait for the successor's imports
    instead of doing them themselves. Where none can live, the socket is closed: workers find
    nobody, import torch themselves, and say why they cannot.

    Args:
        name: of the socket, in Linux's abstract namespace, so that nothing is left behind.
        modules: as `serve` has them.
    """
    import subprocess
    import threading

    from elastic_gpt.huge_pages import with_huge_pages

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen()
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    code = (
        f"from elastic_gpt.nodes.standby import serve; serve({listener.fileno()}, {modules!r}, {os.getpid()}, {nohup})"
    )

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # this thread's, and a standby's until it ignores them
        deaths: list[float] = []
        environment = with_huge_pages(os.environ)
        command = [sys.executable, "-c", code]
        while subprocess.run(command, pass_fds=[listener.fileno()], env=environment, check=False).returncode < 0:
            deaths = [*deaths[1 - DEATHS :], time.monotonic()]
            if len(deaths) == DEATHS and deaths[-1] - deaths[0] < WITHIN:
                print(
                    f"warning: {DEATHS} standby processes were killed; there is no other", file=sys.stderr, flush=True
                )
                break
            print("warning: the standby process was killed; another one starts", file=sys.stderr, flush=True)
        listener.close()

    threading.Thread(target=run, name="standby", daemon=True).start()


# --- the standby -------------------------------------------------------------------------------------------------------


def serve(descriptor: int, modules: list[str], agent: int, nohup: bool) -> None:
    """Import `modules`, then fork a worker for each client until the agent that started this process dies.

    Args:
        descriptor: of the socket that clients connect to, inherited from the agent.
        modules: the first holds the `main(argv, prog)` that workers run.
        agent: process id of who started this.
        nohup: workers do not mind a terminal that closes.
    """
    import gc
    import importlib
    import select

    listener = socket.socket(fileno=descriptor)
    # They are meant for the workers, who get them from their clients; a terminal sends them to all of us.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    handlers: dict[int, Any] = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    if nohup:
        handlers[signal.SIGHUP] = signal.SIG_IGN
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    from elastic_gpt.processes import die_with_parent

    die_with_parent(agent)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's pool would be threads, and a fork wants none
    room, *_ = [importlib.import_module(module) for module in modules]
    gc.freeze()  # the collector touches no imported page, so the workers share them

    # Three things can happen: a client comes; a client dies, and its worker is killed; a worker ends, and its client is told.
    # What a client has to say is read by its worker: no client can make the standby wait, or fail.
    events = select.poll()
    events.register(listener, select.POLLIN)
    workers: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor that tells of the worker's end
    clients: dict[int, int] = {}  # worker by its client's socket
    while True:
        for ready, _ in events.poll():
            if ready == listener.fileno():
                connection, _ = listener.accept()
                if not same_user(connection):
                    connection.close()
                else:
                    worker = _fork(connection, listener, room, handlers)
                    ended = os.pidfd_open(worker)
                    workers[ended], clients[connection.fileno()] = (worker, connection), worker
                    events.register(connection, 0)  # its end is told in any case
                    events.register(ended, select.POLLIN)
            elif ready in workers:
                worker, connection = workers.pop(ready)
                events.unregister(ready)
                os.close(ready)
                if clients.pop(connection.fileno(), None):
                    events.unregister(connection)
                code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
                with connection, contextlib.suppress(OSError):
                    send(connection, {"code": code})
            elif ready in clients:
                events.unregister(ready)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(clients.pop(ready), signal.SIGKILL)


def same_user(connection: socket.socket) -> bool:
    """Anybody on this machine can reach the socket; only our own user may have code run."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def _fork(connection: socket.socket, listener: socket.socket, room: Any, handlers: dict[int, Any]) -> int:
    """Fork a worker for the client at the other end of `connection`; returns its process id in the standby."""
    from elastic_gpt.processes import die_with_parent

    standby = os.getpid()
    worker = os.fork()
    if worker:
        return worker
    try:
        die_with_parent(standby)
        listener.close()
        try:
            request, streams = receive(connection)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            send(connection, {"worker": os.getpid()})  # from here on the client passes signals on
        except (EOFError, ConnectionError):  # it is gone
            os._exit(1)
        connection.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        # New ones: those of the standby were made for its own files, which may be of another sort (a file, not a pipe).
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        if "OMP_NUM_THREADS" in os.environ:
            import torch  # which has read it already, in the standby's environment

            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        command, *arguments = request["command"]
        code = room.main(arguments, prog=f"elastic-gpt {command}")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what the standby would do at its own end is not the worker's


# --- the client, which the agent takes for the worker ----------------------------------------------------------------


def work(name: str, command: list[str]) -> int:
    """Have the standby `name` fork a worker that runs `command`; returns its exit code."""
    agent = os.getppid()
    connection = _connect(name)
    if connection is None:  # no standby: start the slow way, which is better than not at all
        print("warning: there is no standby process; this worker imports torch itself", file=sys.stderr, flush=True)
        sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))  # noqa: PTH120 - see below
        from elastic_gpt.processes import die_with_parent

        die_with_parent(agent)  # which holds after execv, too
        os.execv(sys.executable, [sys.executable, "-m", "elastic_gpt.cli", *command])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a worker to pass them on to
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes as long to import as all the rest
    try:
        send(connection, {"command": command, "environment": dict(os.environ), "folder": folder}, (0, 1, 2))
        worker = receive(connection)[0]["worker"]

        def pass_on(number: int, _frame: Any) -> None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(worker, number)

        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = int(receive(connection)[0]["code"])
    except (EOFError, ConnectionError):
        return 128 + signal.SIGKILL  # the standby died, and its workers with it
    if code < 0:  # killed by a signal: so is this process
        with contextlib.suppress(OSError):  # SIGKILL cannot be caught, so there is nothing to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _connect(name: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"\0{name}")
    except ConnectionRefusedError:
        connection.close()
        return None
    return connection


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2:]))
