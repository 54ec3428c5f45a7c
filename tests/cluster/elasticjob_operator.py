"""A stand-in for DLRover's Go operator 0.6.1, which no package contains; or the real one, if somebody has built it.

The stand-in watches jobs and masters as the real one does, and hands what it sees to operator_state.py, which decides. Of the
race that follows each new master (its pod is placed before the job is read again, or after) it always takes the bad side, as
the real one did in 30 of 30.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch

from tests.cluster.control_plane import free_port
from tests.cluster.operator_state import Manifest, Panic, StateMachine, master_pod, master_service

GROUP, VERSION, PLURAL = "elastic.iml.github.io", "v1alpha1", "elasticjobs"
MASTERS = "app.kubernetes.io/name=elasticjob"  # no other pod has this label
PLACED_SECONDS = 0.6  # in which the pod of a new master is placed, and nothing is reconciled
CRASHED_SECONDS = 17.0  # until a crashed one is back
RETRY_SECONDS = 5.0
RETRIES = 10  # of a request that the server asks to be made again, as client-go has it


class Operator:
    """Reconciles the ElasticJobs of all namespaces from `start` to `stop`. It never hears of what happens while stopped."""

    def __init__(self, kubeconfig: Path) -> None:
        api = config.new_client_from_config(str(kubeconfig))
        self._core, self._custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    def start(self) -> None:
        self._stopped, self._machine, self._lock = threading.Event(), StateMachine(), threading.Lock()
        self._due: dict[tuple[str, str], float] = {}  # namespace and name of jobs to reconcile, and when
        jobs = lambda **more: self._custom.list_cluster_custom_object(GROUP, VERSION, PLURAL, **more)  # noqa: E731
        pods = self._core.list_pod_for_all_namespaces
        self._threads = [
            threading.Thread(target=self._follow, args=(jobs, {}, self._job_event), daemon=True),
            threading.Thread(
                target=self._follow, args=(pods, {"label_selector": MASTERS}, self._pod_event), daemon=True
            ),
            threading.Thread(target=self._work, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10)

    def _crash(self, panic: Panic) -> None:
        print(f"operator: {panic}", file=sys.stderr)
        self._stopped.set()
        threading.Timer(CRASHED_SECONDS, self.start).start()

    # -- what happens

    def _follow(self, listing: Callable[..., Any], selector: dict[str, str], handle: Callable[..., None]) -> None:
        """Call `handle(old, new)` for each change of an object, None for one that is not there, as an informer does."""
        stopped, known = self._stopped, {}

        def see(key: tuple[str, str], new: Manifest | None) -> None:
            old = known.pop(key, None)
            if new is not None:
                known[key] = new
            with self._lock:
                if not stopped.is_set():
                    handle(old, new)

        while not stopped.is_set():
            with contextlib.suppress(client.ApiException):  # the version that it has seen is too old: list again
                listed = listing(**selector)
                listed = (
                    listed if isinstance(listed, dict) else self._core.api_client.sanitize_for_serialization(listed)
                )
                present = {_key(item): item for item in listed["items"]}
                for key in known.keys() - present.keys():
                    see(key, None)
                for key, item in present.items():
                    if key not in known or _version(known[key]) != _version(item):
                        see(key, item)
                watcher, version = watch.Watch(), _version(listed)
                while not stopped.is_set():
                    for event in watcher.stream(listing, resource_version=version, timeout_seconds=1, **selector):
                        found = event["raw_object"]
                        version = _version(found)
                        see(_key(found), None if event["type"] == "DELETED" else found)
                        if stopped.is_set():
                            break

    def _job_event(self, old: Manifest | None, new: Manifest | None) -> None:
        if new is not None:
            self._due.setdefault(_key(new), 0.0)
        elif old is not None:
            self._machine.job_deleted(old)

    def _pod_event(self, old: Manifest | None, new: Manifest | None) -> None:
        try:
            if old is None and new is not None:
                self._machine.pod_created(new)
            elif old is not None and new is not None:
                self._machine.pod_updated(old, new)
            elif old is not None:
                self._machine.pod_deleted(old)
        except Panic as panic:
            self._crash(panic)
            return
        meta = (new or old or {})["metadata"]
        self._due.setdefault((meta["namespace"], meta["ownerReferences"][0]["name"]), 0.0)

    # -- what is done about it

    def _work(self) -> None:
        stopped = self._stopped
        while not stopped.wait(0.05):
            with self._lock:
                key = next((key for key, due in self._due.items() if due <= time.monotonic()), None)
                if key:
                    del self._due[key]
            if key:
                try:
                    self._reconcile(*key)
                except Panic as panic:
                    self._crash(panic)
                except client.ApiException as error:
                    if error.status != 404:  # the job is gone
                        print(f"operator: {error.status} {error.body}", file=sys.stderr)
                        with self._lock:
                            self._due.setdefault(key, time.monotonic() + RETRY_SECONDS)

    def _reconcile(self, namespace: str, name: str) -> None:
        read = self._custom.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
        with self._lock:
            job, master = self._machine.reconcile(read)
        try:
            if master is not None:
                self._make_master(job, master)
        finally:
            with self._lock:
                status = job["status"]
                self._custom.patch_namespaced_custom_object_status(
                    GROUP, VERSION, namespace, PLURAL, name, {"status": status}
                )

    def _make_master(self, job: Manifest, index: int) -> None:
        namespace = job["metadata"]["namespace"]
        for tried in itertools.count(1):
            try:
                self._core.create_namespaced_pod(namespace, master_pod(job, index))
                break
            except client.ApiException as error:
                if error.status == 409:  # one of this name will do, whosever it is
                    break
                wait = (error.headers or {}).get("Retry-After")
                if not wait or tried > RETRIES:
                    raise
                self._stopped.wait(float(wait))
        with contextlib.suppress(client.ApiException):  # it takes no notice
            self._core.create_namespaced_service(namespace, master_service(job))
        self._stopped.wait(PLACED_SECONDS)


class Binary:
    """The real one, in place of the stand-in: ELASTICJOB_OPERATOR names it."""

    def __init__(self, kubeconfig: Path, program: str) -> None:
        self._kubeconfig, self._program = kubeconfig, program
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        addresses = [f"--{what}-bind-address=127.0.0.1:{free_port()}" for what in ("metrics", "health-probe")]
        with self._kubeconfig.with_name("operator.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, *addresses],
                env={**os.environ, "KUBECONFIG": str(self._kubeconfig)},
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(60)


def operator(kubeconfig: Path) -> Operator | Binary:
    program = os.environ.get("ELASTICJOB_OPERATOR")
    return Binary(kubeconfig, program) if program else Operator(kubeconfig)


def _key(item: Manifest) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]


def _version(item: Manifest) -> str:
    return str(item["metadata"]["resourceVersion"])
