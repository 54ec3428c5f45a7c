"""A real Kubernetes control plane on loopback: etcd, API server, controller manager and scheduler, each a process of ours."""

import base64
import contextlib
import datetime
import ipaddress
import json
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tests.conftest import PATIENCE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ControlPlane:
    """A context manager. `kubeconfig` is that of the administrator, `node_token` that of a kubelet."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.token = secrets.token_hex(16)
        self.ca = folder / "ca.crt"
        self.kubeconfig = folder / "kubeconfig"

    def __enter__(self) -> "ControlPlane":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self) -> None:
        _certificates(self._folder)
        (self._folder / "tokens.csv").write_text(f'{self.token},admin,admin,"system:masters"\n')
        self.kubeconfig.write_text(yaml.safe_dump(self.config(self.token)))
        client, peer = free_port(), free_port()
        etcd = shutil.which("etcd")
        assert etcd, "etcd-server is not installed"
        self._run(
            etcd,
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{client}",
            f"--advertise-client-urls=http://127.0.0.1:{client}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
            "--unsafe-no-fsync",
        )
        key = self._folder / "service-account.key"
        self._run(
            self._binaries / "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{client}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--tls-cert-file={self._folder / 'server.crt'}",
            f"--tls-private-key-file={self._folder / 'server.key'}",
            f"--cert-dir={self._folder}",
            f"--token-auth-file={self._folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--endpoint-reconciler-type=none",  # it would publish a loopback address as the API's endpoint, which is refused
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",  # for logs; the names of the machines resolve nowhere
        )
        self._wait()
        self._run(
            self._binaries / "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self.ca}",
            "--bind-address=127.0.0.1",
            f"--secure-port={free_port()}",
            "--port=0",
            f"--cert-dir={self._folder}",
            "--leader-elect=false",
            "--pod-eviction-timeout=10s",
            "--node-monitor-grace-period=20s",
        )
        self._run(
            self._binaries / "kube-scheduler",
            f"--kubeconfig={self.kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={free_port()}",
            "--port=0",
            f"--cert-dir={self._folder}",
            "--leader-elect=false",
        )

    def config(self, token: str) -> dict:
        """A kubeconfig with this token."""
        authority = base64.b64encode(self.ca.read_bytes()).decode()
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
            "current-context": "test",
        }

    def _run(self, *command: object) -> None:
        name = Path(str(command[0])).name
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen([str(word) for word in command], stdout=log, stderr=log))

    def _wait(self) -> None:
        context = ssl.create_default_context(cafile=str(self.ca))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if (code := self._processes[-1].poll()) is not None:
                log = (self._folder / "kube-apiserver.log").read_text()[-2000:]
                raise RuntimeError(f"kube-apiserver ended with {code}: {log}")
            request = urllib.request.Request(f"{self.url}/readyz", headers={"Authorization": f"Bearer {self.token}"})
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(request, context=context, timeout=2).read()
                # The namespace `default` comes a moment later, and what is posted before fails.
                self._get("/api/v1/namespaces/default", context)
                return
            time.sleep(0.2)
        raise RuntimeError(f"kube-apiserver is not ready after {PATIENCE:.0f} s")

    def _get(self, path: str, context: ssl.SSLContext) -> dict:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, context=context, timeout=5) as answer:
            return dict(json.load(answer))


def _certificates(folder: Path) -> None:
    """ca.crt, server.crt and server.key for 127.0.0.1, and service-account.key."""
    now = datetime.datetime.now(datetime.UTC)

    def key() -> rsa.RSAPrivateKey:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def write_key(path: Path, private: rsa.RSAPrivateKey) -> None:
        path.write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )

    def certificate(name: str, public: rsa.RSAPublicKey, *, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-ca")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(root, hashes.SHA256())

    root, server, accounts = key(), key(), key()
    authority = certificate("test-ca", root.public_key(), authority=True)
    (folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    leaf = certificate("kube-apiserver", server.public_key(), authority=False)
    (folder / "server.crt").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    write_key(folder / "server.key", server)
    write_key(folder / "service-account.key", accounts)
