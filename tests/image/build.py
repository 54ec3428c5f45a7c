"""Builds the image's CPU variant and tests it in containers: make test-image.

No registry of images is asked. The base is a stand-in for python:3.11-slim-bookworm, Debian's own Python, which debootstrap
makes from this machine's mirror; pip is configured in the build as it is here. Both the base and the image's layers stay in
~/.cache/elastic-gpt/images (2 GB), so that a second run builds only what has changed. `rm -rf` that to begin anew.

What cannot be done here (not root, no Debian) is said in one line, and is not a failure.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic-gpt"
LOG = CACHE / "image.log"
PACKAGES = {"buildah": "buildah", "podman": "podman", "runc": "runc", "debootstrap": "debootstrap"}  # command: package
RELEASE, BASE_PACKAGES = "bookworm", "python3.11,python3.11-venv,python3-pip,ca-certificates"
BASE, IMAGE = f"localhost/elastic-gpt-base:{RELEASE}", "localhost/elastic-gpt:test"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS = {"cert", "client-cert", "extra-index-url", "find-links", "index-url", "proxy", "timeout", "trusted-host"}
KEEP_LAYERS = "336h"


class CannotHere(Exception):
    """This machine cannot build images; says why."""


class Failed(Exception):
    """A step of the build failed; says which, and where to read on."""


def main() -> int:
    """Exit codes: pytest's; 0 as well when nothing could be done here; 1 when the build failed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    os.environ["CONTAINERS_STORAGE_CONF"] = str(own_store())
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # debootstrap's place, which not every root's path has
    try:
        mirror = prepare_machine()
        make_base(mirror)
        build()
    except CannotHere as reason:
        print(f"make test-image: skipped: {reason}")
        return 0
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    tests = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("test_image.py"))]
    return subprocess.run(tests, cwd=REPO, env=os.environ | {"ELASTIC_GPT_IMAGE": IMAGE}, check=False).returncode


def own_store() -> Path:
    """A store apart, so that no image of the machine's owner is touched; returns the file that tells podman of it."""
    configuration = CACHE / "storage.conf"
    configuration.write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "/run/elastic-gpt"\ngraphroot = "{CACHE / "images"}"\n'
    )
    return configuration


def prepare_machine() -> str:
    """Install what is missing; returns apt's mirror of the release."""
    if not sys.platform.startswith("linux") or os.getuid() != 0 or not shutil.which("apt-get"):
        raise CannotHere("it needs root on Debian (apt-get, debootstrap); build and try the image as README.md says")
    missing = [package for command, package in PACKAGES.items() if not shutil.which(command)]
    if missing:
        if subprocess.run(["apt-get", "update"], capture_output=True, check=False).returncode:
            raise CannotHere(f"{' '.join(missing)} are not installed, and apt reaches no mirror")
        if subprocess.run(["apt-get", "install", "--simulate", *missing], capture_output=True, check=False).returncode:
            raise CannotHere(f"apt has no {' '.join(missing)}")
        step(f"installing {' '.join(missing)}")
        run("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    targets = run("apt-get", "indextargets", "--format", "$(CREATED_BY) $(RELEASE) $(REPO_URI)").splitlines()
    mirrors = [line.split()[2] for line in targets if line.startswith(f"Packages {RELEASE} ")]
    if not mirrors:
        raise CannotHere(f"its apt has no Debian {RELEASE}")
    return mirrors[0]


def make_base(mirror: str) -> None:
    if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode == 0:
        return
    step("making the base with debootstrap")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="base-") as folder:
        root = f"{folder}/root"
        run("debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", RELEASE, root, mirror)
        shutil.rmtree(f"{root}/var/cache/apt/archives")
        run("tar", "-C", root, "-cf", f"{folder}/base.tar", ".")
        run("podman", "import", f"{folder}/base.tar", BASE)


def build() -> None:
    """The Dockerfile in its CPU variant, as IMAGE."""
    settings = pip_settings()
    arguments = {"PYTHON_IMAGE": BASE, "VARIANT": "cpu"}
    if "+cpu" in torch_here():  # then PyTorch's own index, which may be out of reach, is not needed
        arguments["PIP_EXTRA_INDEX_URL"] = settings.get("extra-index-url", "file:///nowhere")
    step("building the image")
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "pip.conf"
        lines = [f"{name} = {value}" for name, value in settings.items() if name != "extra-index-url"]
        configuration.write_text("\n".join(["[global]", *lines, ""]))
        mounts = {str(path): str(path) for path in [*local_paths(settings), CA_BUNDLE] if path.exists()}
        mounts[str(configuration)] = "/etc/pip.conf"
        # Isolation other than chroot needs rights that root in a container or a small VM does not have.
        run(
            *("buildah", "bud", "--isolation=chroot", "--pull-never", "--layers", f"--tag={IMAGE}"),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(f"--volume={here}:{there}:ro" for here, there in mounts.items()),
            str(REPO),
        )
    run("podman", "image", "prune", "--force", f"--filter=until={KEEP_LAYERS}")
    size = int(run("podman", "image", "inspect", "--format={{.Size}}", IMAGE))
    base = int(run("podman", "image", "inspect", "--format={{.Size}}", BASE))
    step(f"the image has {size / 1e9:.2f} GB, of which the base {base / 1e9:.2f} GB")


def pip_settings() -> dict[str, str]:
    """Where pip takes packages from on this machine: its files' settings, then the environment's, which win."""
    found: dict[str, str] = {}
    listed = run(sys.executable, "-m", "pip", "config", "list")
    for from_environment in (False, True):
        for section, name, value in re.findall(r"^(:env:|\w+)\.([\w-]+)=(.*)$", listed, re.M):
            if (section == ":env:") == from_environment and name in PIP_SETTINGS:
                found[name] = " ".join(ast.literal_eval(value).split())
    return found


def local_paths(settings: Mapping[str, str]) -> list[Path]:
    """The files and folders of this machine that pip's settings name. An index may keep its files beside itself."""
    paths = []
    for word in " ".join(settings.values()).split():
        if word.startswith("file://"):
            paths.append(Path(word.removeprefix("file://")).parent)
        elif word.startswith("/"):
            paths.append(Path(word))
    return paths


def torch_here() -> str:
    """The version of torch that pip would install on this machine."""
    pin = re.search(r"^torch==.*$", (REPO / "constraints.txt").read_text(), re.M)
    assert pin
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    report = run(*pip, "--report=-", pin[0])
    return str(json.loads(report[report.index("{") :])["install"][0]["metadata"]["version"])


def run(*command: str) -> str:
    """Run a command to its end, all it says in the log; returns its standard output."""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, stdin=subprocess.DEVNULL, check=False
        )
        log.write(done.stdout)
    if done.returncode:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-15:])
        raise Failed(f"{' '.join(command[:2])} ended with {done.returncode}; the whole of it is in {LOG}\n{tail}")
    return done.stdout


def step(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
