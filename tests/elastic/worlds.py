"""Real worlds for tests: processes that join a gloo group, forked from a server that has torch imported."""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Collection
from typing import Any

from tests.conftest import PATIENCE

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "torch.distributed", "elastic_gpt.gradients", "model_zoo.nanogpt.model", "tests.conftest"]
CONTEXT.set_forkserver_preload(PRELOADED)


def run_world(size: int, function: Callable[..., Any], *args: Any, dies: Collection[int] = ()) -> list[Any]:
    """Call `function(world, *args)` on each rank of a new world; returns the results in order of rank.

    Args:
        dies: ranks whose process ends within the function: they have no result.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue = CONTEXT.SimpleQueue()
    processes = [CONTEXT.Process(target=_work, args=(rank, size, port, queue, function, args)) for rank in range(size)]
    for process in processes:
        process.start()
    results = dict(pickle.loads(queue.get()) for rank in range(size) if rank not in dies)
    for process in processes:
        process.join()
    failed = [result for result in results.values() if isinstance(result, Exception)]
    if failed:
        raise failed[0]
    return [results[rank] for rank in sorted(results)]


def _work(rank: int, size: int, port: int, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    from elastic_gpt.world import join, leave

    torch.set_num_threads(1)
    try:
        result = function(join("cpu", PATIENCE), *args)
    except Exception as error:
        result = error
    except BaseException as error:  # pytest.fail, which nobody would hear of
        result = RuntimeError(repr(error))
    queue.put(
        pickle.dumps((rank, result))
    )  # as bytes: torch would pass tensors by a handle that dies with this process
    leave()
