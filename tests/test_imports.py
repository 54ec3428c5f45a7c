"""Importing the whole core, in a new process, imports no cloud SDK."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, environment

REPO = Path(__file__).parents[1]
SDKS = {
    *("ads", "oci", "ocifs", "google.cloud", "google.api_core", "vertexai", "kfp", "kubeflow", "kubeflow_trainer_api"),
    *("boto3", "botocore", "s3fs", "gcsfs", "azure", "adlfs", "sagemaker"),
}
IMPORT_ALL = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def modules() -> list[str]:
    roots = ["elastic_gpt", "prepare", "model_zoo"]
    found = [found.name for root in roots for found in pkgutil.walk_packages([str(REPO / root)], f"{root}.")]
    return roots + found


def imported(names: list[str], source: str = IMPORT_ALL) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", source, *names],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_nothing_imports_a_cloud_sdk() -> None:
    pytest.importorskip("torch")
    names = modules()
    assert {"elastic_gpt.jobs.ads", "prepare.corpus", "model_zoo.nanogpt.train"} <= set(names)
    there = imported([])  # google-cloud-aiplatform's .pth file makes `google.cloud` in every process
    assert (imported(names) - there) & SDKS == set()


def test_an_sdk_that_is_imported_would_be_seen() -> None:
    pytest.importorskip("botocore")
    assert "botocore" in imported(["botocore"]) & SDKS
