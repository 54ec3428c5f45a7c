"""A standby process on each node, from which new workers are forked, so that no worker waits for `import torch`.

    agent ── starts ──► standby (this file, `serve`): has imported everything, but has no threads and has not used a GPU
      └─── starts ──► client (this file, as a script): asks the standby for a worker, passes on its arguments, environment,
                      standard streams and signals, and ends as the worker ends

For the agent the client is the worker: if one of the two is killed, the other dies too. The client
runs with `python -I -S` and imports only a few modules of the standard library, so it starts in 20
ms.
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
DEATHS, WITHIN = 3, 60.0  # after so many killed standbys in so many seconds the node gives up


def send(connection: socket.socket, message: object, descriptors: tuple[int, ...] = ()) -> None:
    """Send one JSON message, and open files with it."""
    content = json.dumps(message).encode()
    socket.send_fds(connection, [len(content).to_bytes(LENGTH, "little")], list(descriptors))
    connection.sendall(content)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """Receive the next message and the files that came with it.

    Raises:
        EOFError: if the other side has gone.
    """
    length, descriptors, _, _ = socket.recv_fds(connection, LENGTH, 3)
    content, left = b"", int.from_bytes(length, "little")
    while part := connection.recv(left):  # not more, since the next message may follow at once
        content, left = content + part, left - len(part)
    if left or not content:
        raise EOFError("the other side is gone")
    return json.loads(content), list(descriptors)


# --- the agent's side --------------------------------------------------------------------------------------------------


def keep(name: str, modules: list[str]) -> None:
    """Keep a standby running until this process ends. One that is killed is replaced.

    This process owns the socket, so clients that come meanwhile wait for the next standby instead
    of importing torch themselves. If standbys die again and again, the socket is closed: then
    workers import torch themselves, and report the error if that fails.

    Args:
        name: name of the socket, in Linux's abstract namespace, so that no file is left.
        modules: see `serve`.
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
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for this thread, and for a standby until it ignores them
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
        descriptor: the socket that clients connect to, inherited from the agent.
        modules: modules to import. The first one has the `main(argv, prog)` that workers run.
        agent: process id of the agent.
        nohup: whether workers ignore a terminal that closes (SIGHUP).
    """
    import gc
    import importlib
    import select

    listener = socket.socket(fileno=descriptor)
    # A terminal sends signals to all processes. Workers get them from their clients; the standby ignores them.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    handlers: dict[int, Any] = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    if nohup:
        handlers[signal.SIGHUP] = signal.SIG_IGN
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    from elastic_gpt.processes import die_with_parent

    die_with_parent(agent)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads, which do not survive a fork
    room, *_ = [importlib.import_module(module) for module in modules]
    gc.freeze()  # so that workers share the imported pages: the collector does not write to them

    # Three things can happen: a client connects; a client dies, and its worker is killed; a worker ends, and its client is
    # told. The forked worker reads what its client sends, so no client can block the standby or make it fail.
    events = select.poll()
    events.register(listener, select.POLLIN)
    workers: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor that shows the worker's end
    clients: dict[int, int] = {}  # its client's socket to the worker
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
                    events.register(connection, 0)  # the end of the connection is always reported
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
    """Whether the other side is our own user. Anybody on this machine can connect, but must not run code as us."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def _fork(connection: socket.socket, listener: socket.socket, room: Any, handlers: dict[int, Any]) -> int:
    """Fork a worker for the client at the other end of `connection`. In the standby, returns its process id."""
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
            send(connection, {"worker": os.getpid()})  # from now on the client passes on signals
        except (EOFError, ConnectionError):  # the client has gone
            os._exit(1)
        connection.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        # New stream objects: those of the standby fit its own files, which may be of another kind (a file, not a pipe).
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        if "OMP_NUM_THREADS" in os.environ:
            import torch  # it has read the variable already, in the standby

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
    os._exit(code)  # without the cleanup that is registered for the standby's end


# --- the client, which the agent takes for the worker ----------------------------------------------------------------


def work(name: str, command: list[str]) -> int:
    """Let the standby `name` fork a worker that runs `command`. Returns its exit code."""
    agent = os.getppid()
    connection = _connect(name)
    if connection is None:  # without a standby, start the slow way
        print("warning: there is no standby process; this worker imports torch itself", file=sys.stderr, flush=True)
        sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))  # noqa: PTH120 - see below
        from elastic_gpt.processes import die_with_parent

        die_with_parent(agent)  # stays in force after execv
        os.execv(sys.executable, [sys.executable, "-m", "elastic_gpt.cli", *command])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is a worker that can get them
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes as long to import as all the rest
    try:
        send(connection, {"command": command, "environment": dict(os.environ), "folder": folder}, (0, 1, 2))
        worker = receive(connection)[0]["worker"]

        def pass_on(number: int, _frame: Any) -> None:
            with contextlib.suppress(ProcessLookupError):  # the worker has just ended
                os.kill(worker, number)

        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = int(receive(connection)[0]["code"])
    except (EOFError, ConnectionError):
        return 128 + signal.SIGKILL  # the standby died, and its workers died with it
    if code < 0:  # a signal killed the worker, so it kills this process too
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
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
