"""mend.py: each mend of DLRover 0.6.1 is still needed, since its fault is still there; and what the mends do."""

import importlib.metadata
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_gpt.nodes import mend
from elastic_gpt.settings import SettingsError
from tests.conftest import environment

pytest.importorskip("dlrover")


def fresh(code: str) -> str:
    """What `code` prints in a new process without mends."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_another_dlrover_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    mend.check_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.7.0.dev0")
    with pytest.raises(SettingsError, match=r"DLRover 0\.7\.0\.dev0 is installed.*pip install dlrover==0\.6\.1"):
        mend.check_version()


def test_dlrover_as_it_comes_needs_each_mend_of_an_agent() -> None:
    code = """
import inspect
from dlrover.python.common.constants import JobConstant
from dlrover.python.elastic_agent.diagnosis.diagnosis_agent import DiagnosisAgent
from dlrover.python.elastic_agent.master_client import GrpcMasterClient, MasterClient
from dlrover.python.elastic_agent.torch import master_kv_store, training
from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api
handler, agent = training.MasterRendezvousHandler, training.ElasticTrainingAgent
needed = {
    "poll_the_rendezvous": JobConstant.RENDEZVOUS_DEFAULT_INTERVAL >= 5,
    "poll_the_store": "time.sleep(2)" in inspect.getsource(master_kv_store),
    "find_a_new_master_soon": "reconnect_backoff" not in inspect.getsource(MasterClient),
    "tell_every_master_the_range": "report_rdzv_params" not in inspect.getsource(handler._join_rendezvous),
    "hold_a_lease": hasattr(handler, "next_rendezvous") and hasattr(GrpcMasterClient._report, "__wrapped__"),
    "ask_for_a_world_without_end": "range(5)" in inspect.getsource(agent._safe_get_master_addr_port)
    and "_stop_workers" in inspect.getsource(agent._initialize_workers),
    "leave_other_jobs_alone": "kill" in inspect.getsource(agent._stop_orphan_workers),
    "have_no_flash_checkpoint": hasattr(AsyncCheckpointSaver, "start_async_saving_ckpt"),
    "leave_when_asked": "raise SignalException" in inspect.getsource(api._terminate_process_handler),
    "save_before_an_error_ends_it": "SIGUSR1" not in inspect.getsource(LocalElasticAgent._shutdown),
    "say_the_last_word_once": hasattr(MasterClient, "report_succeeded_exited")
    and hasattr(MasterClient, "report_failed_exited"),
    "finish_without_a_master": "_get(" in inspect.getsource(MasterClient.num_nodes_waiting)
    and hasattr(GrpcMasterClient._get, "__wrapped__") and hasattr(agent, "_exit_barrier"),
    "keep_the_living": "_stop_workers" in inspect.getsource(LocalElasticAgent._restart_workers)
    and "_restart_workers" in inspect.getsource(agent._invoke_run),
    "look_when_a_worker_waits": "time.sleep(monitor_interval)" in inspect.getsource(agent._invoke_run),
    "end_what_would_fail_again": "exitcode" not in inspect.getsource(DiagnosisAgent.diagnose_training_failure),
}
print([name for name, still in needed.items() if not still])
print(sorted(needed))
"""
    named = "\n".join(code.splitlines()[:-2])
    assert fresh(f"{named}\nprint([name for name, still in needed.items() if not still])") == "[]"
    called = {line.split("(")[0].split()[-1] for line in inspect.getsource(mend.agent).splitlines() if "(" in line}
    assert fresh(code) == str(sorted(called - {"agent"}))


def test_a_rank_0_that_dies_before_its_address_is_known_costs_seconds_and_a_world_that_another_followed_is_not_begun() -> (
    None
):
    code = """
import types
from elastic_gpt.nodes import mend
from dlrover.python.elastic_agent.master_client import MasterClient
from dlrover.python.elastic_agent.torch import training
from dlrover.python.elastic_agent.torch.master_kv_store import MasterKVStore
worlds, found = [], []
class Client:  # of a master whose store has the address of the second world's rank 0
    def kv_store_multi_get(self, keys):
        return dict.fromkeys(keys, b"7") if len(worlds) > 1 else {}
    def get_comm_world(self, name, rank):  # after the second one there was another at once; of the third one asked for the next
        return {2: 3}.get(len(worlds), len(worlds)), 0, {} if len(worlds) == 3 else {rank: 1}
def rendezvous(agent, group):
    worlds.append(group.spec.rdzv_handler._get_store(len(worlds) + 1, 0))
    found.append(agent._safe_get_master_addr_port(worlds[-1]))
MasterClient.singleton_instance = classmethod(lambda *_: Client())
training.ElasticTrainingAgent._rendezvous = rendezvous
mend.ADDRESS_SECONDS = 0.3
mend.poll_the_store()
mend.ask_for_a_world_without_end()
handler = object.__new__(training.MasterRendezvousHandler)
handler._name, handler._node_rank, handler._store, handler._client = "training", 0, MasterKVStore("store"), Client()
group = types.SimpleNamespace(spec=types.SimpleNamespace(rdzv_handler=handler))
agent = object.__new__(training.ElasticTrainingAgent)
agent._rendezvous(group)
print(found, len(worlds))
"""
    assert fresh(code) == "[('7', 7), ('7', 7), ('7', 7)] 4"


def test_a_node_asks_for_a_world_without_end_where_none_forms_or_no_master_answers() -> None:
    code = """
import types
import grpc
from elastic_gpt.nodes import mend
from dlrover.python.elastic_agent.master_client import MasterClient
from dlrover.python.elastic_agent.torch import training
from torch.distributed.elastic.rendezvous import RendezvousParameters
joins, hour = [], 3600.0
class Client:
    def num_nodes_waiting(self, name):
        return 0
    def report_failures(self, *_):
        pass
    def report_rdzv_params(self, *_):
        pass
    def join_rendezvous(self, *_, rdzv_name):
        joins.append(rdzv_name)
        if len(joins) == 3:
            raise grpc.RpcError
    def get_comm_world(self, name, rank):
        if len(joins) == 2:  # somebody sets the clock forward
            training.time.time = lambda: len(joins) * hour + clock()
        if len(joins) == 5:
            raise mend.Leaving
        return 1, 0, {rank: 1} if len(joins) == 4 else {}
clock = training.time.time
training.time = types.SimpleNamespace(time=clock, sleep=training.time.sleep)
MasterClient.singleton_instance = classmethod(lambda *_: Client())
training.ElasticTrainingAgent._rendezvous = lambda agent, group: group.spec.rdzv_handler.next_rendezvous()
mend.poll_the_rendezvous()
mend.ask_for_a_world_without_end()
nodes = RendezvousParameters("dlrover-master", "", "run", 1, 4, lastcall_timeout=1, join_timeout=1)
handler = training.MasterRendezvousHandler("elastic-training", 3, nodes, 1)
group = types.SimpleNamespace(spec=types.SimpleNamespace(rdzv_handler=handler))
agent = object.__new__(training.ElasticTrainingAgent)
agent._rendezvous(group)
formed = len(joins)
try:
    agent._rendezvous(group)
except mend.Leaving:
    print(formed, len(joins))
"""
    assert fresh(code) == "4 5"  # the first ends for want of time, the second by the clock, the third without a master


def test_an_error_of_the_agent_lets_its_workers_save_before_they_end() -> None:
    code = """
import sys, time
from elastic_gpt.nodes import mend
from dlrover.python.elastic_agent.torch import training
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
worker = '''
import signal, sys
got = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while signal.SIGTERM not in got:
    signal.pause()
print([signal.Signals(number).name for number in got], flush=True)
'''
def invoke_run(self, role):
    logs = DefaultLogsSpecs(redirects=Std.OUT)
    self._pcontext = start_processes("worker", sys.executable, {0: ("-c", worker)}, {0: {}}, logs)
    told = self._pcontext.stdouts[0]
    while "ready" not in open(told).read():
        time.sleep(0.01)
    self.told = told
    raise RuntimeError("something that nobody knows yet")
training.ElasticTrainingAgent._invoke_run = invoke_run
released = []
mend.save_before_an_error_ends_it([type("", (), {"release": lambda self: released.append(1)})()])
agent = object.__new__(training.ElasticTrainingAgent)
agent._worker_watchdog = agent._health_check_server = None
agent._shutdown_timeout = 30
try:
    agent.run()
except RuntimeError:
    print(open(agent.told).read().splitlines()[-1], released)
"""
    assert fresh(code) == "['SIGUSR1', 'SIGTERM'] [1]"


def test_where_a_worker_dies_before_there_is_a_world_the_living_beside_it_ends_and_the_next_ones_get_that_world() -> (
    None
):
    code = """
import os, signal, types
from elastic_gpt.nodes import mend
from dlrover.python.elastic_agent.torch import training
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
class Workers:
    def waiting(self):
        return {0, 1}
    def hung(self):
        return {}
    def forget(self):
        pass
    def give(self, worlds):
        self.given = sorted((rank, world["MASTER_ADDR"], world["MASTER_PORT"]) for rank, world in worlds.items())
contexts = []
def start(group):
    agent._pcontext = start_processes("worker", "sleep", dict.fromkeys((0, 1), ("60",)), {0: {}, 1: {}}, DefaultLogsSpecs())
    contexts.append(agent._pcontext)
def rendezvous(group):
    one = agent._pcontext.subprocess_handlers[1].proc
    one.kill()
    one.wait()
    group.store, group.master_addr, group.master_port = "store", "host", 7
def alive():
    return [sum(one.proc.poll() is None for one in made.subprocess_handlers.values()) for made in contexts]
workers = Workers()
mend.keep_the_living(workers, [])
agent = object.__new__(training.ElasticTrainingAgent)
agent._pcontext, agent._start_workers, agent._rendezvous = None, start, rendezvous
places = {"global_rank": 0, "world_size": 2, "role_rank": 0, "role_world_size": 2}
group = agent._worker_group = types.SimpleNamespace(
    store=None, group_rank=0, group_world_size=1, spec=types.SimpleNamespace(local_world_size=2),
    workers=[types.SimpleNamespace(local_rank=rank, **places) for rank in (0, 1)])
SimpleElasticAgent._initialize_workers(agent, group)
print(alive(), workers.given)
for made in contexts:
    made.close(signal.SIGKILL)
"""
    assert fresh(code) == "[0, 2] [(0, 'host', '7'), (1, 'host', '7')]"


def test_an_agent_says_what_the_simulated_one_says() -> None:
    code = """
import types
from elastic_gpt.nodes import mend
from dlrover.python.elastic_agent.master_client import MasterClient
from dlrover.python.elastic_agent.torch import training
from torch.distributed.elastic.rendezvous import RendezvousParameters
said = []
class Client:
    def report(self, message):
        said.append(message.value.decode())
    def num_nodes_waiting(self, name):
        return 0
    def report_failures(self, *_):
        pass
    def report_rdzv_params(self, *words):
        said.append("range")
    def join_rendezvous(self, *_, rdzv_name):
        said.append("join")
    def get_comm_world(self, name, rank):
        said.append("world")
        return 1, 0, {3: 1} if said.count("world") > 1 else {}
def report(client, message):
    client.report(message)
Client._report = report
Client._report.__wrapped__ = report
MasterClient.singleton_instance = classmethod(lambda *_: Client())
mend.poll_the_rendezvous()
mend.tell_every_master_the_range()
lease = mend.hold_a_lease()
nodes = RendezvousParameters("dlrover-master", "", "run", 2, 4, lastcall_timeout=1)
handler = training.MasterRendezvousHandler("elastic-training", 3, nodes, 1)
said.clear()
handler.next_rendezvous()
print([word for word in said if word[0] not in "0123456789" or int(word.split()[0]) < 3])
"""
    words = [
        "1 waits elastic-training 3 1 2 4 1",
        "range",
        "join",
        "world",
        "world",
        "2 held",
    ]  # tests/simulation/job.py
    assert fresh(code) == str(words)


def test_dlrover_as_it_comes_needs_each_mend_of_a_master() -> None:
    code = """
import inspect
from dlrover.python.master import dist_master
from dlrover.python.master.node import dist_job_manager
from dlrover.python.master.watcher import k8s_watcher
rule = inspect.getsource(dist_job_manager.DistributedJobManager._should_relaunch)
print([
    dist_job_manager._MAX_POD_RELAUNCH_COUNT <= 5,
    "time.sleep(30)" in inspect.getsource(dist_master.DistributedJobMaster.run),
    "_get_pod_exit_reason(pod)" in inspect.getsource(k8s_watcher._convert_pod_yaml_to_node),
    "The all-reduce type job will not try to recover node" in rule,
])
"""
    assert fresh(code) == "[True, True, True, True]"


def pod(code: int, message: str | None = None, reason: str = "Error") -> Any:
    ended = SimpleNamespace(exit_code=code, message=message, reason=reason)
    container = SimpleNamespace(state=SimpleNamespace(terminated=ended))
    return SimpleNamespace(status=SimpleNamespace(container_statuses=[container]), metadata=SimpleNamespace())


def test_a_pod_that_ended_with_a_users_mistake_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlrover.python.master.watcher import k8s_watcher

    monkeypatch.setattr(k8s_watcher, "_get_pod_exit_reason", k8s_watcher._get_pod_exit_reason)
    mend.tell_users_mistakes_apart()
    reason = k8s_watcher._get_pod_exit_reason
    assert reason(pod(2, "error: no setting 'x'\n")) == f"{mend.MISTAKE}error: no setting 'x'"
    assert reason(pod(2)) == mend.MISTAKE
    assert reason(pod(137, reason="OOMKilled")) == "OOMKilled"
    assert not reason(pod(1)).startswith(mend.MISTAKE)


class Manager:
    """As much of DLRover's job manager as its rule for replacements is judged by."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.seen: list[str] = []

    def get_job_nodes(self) -> dict[str, dict[int, Any]]:
        return {"worker": dict(enumerate(self.nodes))}

    def _should_relaunch(self, node: Any, _change: object) -> bool:
        self.seen.append(node.exit_reason)
        return True

    def end(self, reason: str, rank: int = 0) -> bool:
        self.nodes.append(SimpleNamespace(name=f"node-{len(self.nodes)}", rank_index=rank, exit_reason=reason))
        return self._should_relaunch(self.nodes[-1], None)


def test_a_users_mistake_ends_the_job_and_makes_no_pod() -> None:
    manager = Manager()
    ends: list[str] = []
    mend.judge_ended_nodes(manager, oom_restarts=3, end=ends.append)
    assert not manager.end(f"{mend.MISTAKE}error: no setting 'x'")
    assert not manager.end(mend.MISTAKE)
    assert ends == ["error: no setting 'x'", "node-1: exit code 2: see its log"]
    assert manager.end("UnknownError")
    assert manager.seen == ["UnknownError"]


def test_each_rank_is_replaced_as_often_out_of_memory_as_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from dlrover.python.common.constants import NodeExitReason

    manager = Manager()
    mend.judge_ended_nodes(manager, oom_restarts=2, end=lambda _: None)
    assert [manager.end("OOMKilled") for _ in range(3)] == [True, True, False]
    assert manager.end("OOMKilled", rank=1)
    assert manager.seen == [NodeExitReason.KILLED] * 3
    assert {node.exit_reason for node in manager.nodes} == {"OOMKilled"}  # what is counted
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("memory: node-2 ran out of memory and is not replaced")
    assert "more --memory" in said[2]
