"""local.py: nodes on this machine, and what is seen of them."""

import socket

import pytest

from elastic_gpt.nodes.local import LocalJob


def test_nobody_gets_the_masters_port_while_there_is_no_master() -> None:
    with LocalJob(["train"], least=1, most=1) as job, socket.socket() as other:
        job.kill_master()
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", job.port))
        job.start_master()
