"""operator.py: what the doctor says about DLRover's operator."""

from collections.abc import Callable

import pytest

from elastic_gpt.jobs.client import INSTALL_OPERATOR
from tests.jobs.cluster import StubCluster
from tests.jobs.test_causes import crashing
from tests.jobs.test_doctor import found, healthy

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]
USAGE = ("Usage of /manager:", "  -leader-elect", "    \tEnable leader election for controller manager.")


@pytest.mark.parametrize(
    ("lines", "last", "cure"),
    [
        (("flag provided but not defined: -leader-elect-lease-duration", *USAGE),
         "flag provided but not defined: -leader-elect-lease-duration", INSTALL_OPERATOR),
        (("starting", "panic: runtime error: index out of range", "", "goroutine 1 [running]:"),
         "panic: runtime error: index out of range", "kubectl -n dlrover describe pods"),
        (("starting", "unable to get kubeconfig"), "unable to get kubeconfig", "kubectl -n dlrover describe pods"),
    ],
)  # fmt: skip
def test_an_operator_that_crashes_says_its_last_words(
    stub: StubCluster, job: Job, capsys: Output, lines: tuple[str, ...], last: str, cure: str
) -> None:
    healthy(stub)
    stub.objects["Deployment", "dlrover", "dlrover-controller-manager"]["status"] = {}
    crashing(stub, *lines)
    assert job("doctor") == 1
    said = found(capsys.readouterr().out, "operator")
    assert f"its last words: {last}" in said
    assert "CrashLoopBackOff" in said
    assert cure in said


def test_two_operators_are_one_too_many(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    stub.add({"kind": "Deployment", "metadata": {"name": "dlrover-controller-manager", "namespace": "old"},
              "status": {"availableReplicas": 1}})  # fmt: skip
    assert job("doctor") == 1
    assert "there are several" in capsys.readouterr().out


def test_the_doctor_names_a_job_that_has_no_master(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    assert job("submit") == 0
    tree = stub.get("ElasticJob", "elastic-gpt")
    assert tree
    tree["status"] = {"phase": "Running"}
    assert job("doctor") == 1
    assert "Running: no master for" in found(capsys.readouterr().out, "job elastic-gpt")
    stub.master("elastic-gpt")
    job("doctor")
    assert "no master" not in capsys.readouterr().out
