"""JobSpec: all that a person decides about a job. The manifests are made from it."""

import importlib.metadata
import importlib.resources
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Literal

import yaml

from elastic_gpt.settings import SettingsError, find_preset

WORKSPACE = PurePosixPath("/workspace")  # where all pods mount the volume
UPLOADED = PurePosixPath("/text")  # where the prepare Job mounts text files that were sent with it
LONGEST_NAME = (
    37  # the longest derived name is the service elasticjob-NAME-dlrover-master, which may have 63 characters
)
LARGEST_UPLOAD = 1_000_000  # bytes; etcd takes little more in one object

SMALLEST = {"bpe": 257, "word": 4}  # smallest vocabularies, special tokens included

AccessMode = Literal["ReadWriteMany", "ReadWriteOnce"]
# The tokenizers of `prepare` that need neither a network nor another file.
Tokenizer = Literal["gpt2", "char", "word", "byte", "bpe"]


@dataclass(frozen=True)
class JobSpec:
    """A training job on Kubernetes. Raises SettingsError, one line with the cure, for values that cannot work.

    The docstring of each field is the help of its flag.
    """

    name: str = "elastic-gpt"
    """Name of the ElasticJob and of its folder on the volume. For DLRover's operator it must be unique in the cluster."""
    namespace: str = "training"
    """Namespace of all objects."""
    image: str = ""
    """Image of all pods. Empty: elastic-gpt:VERSION, or elastic-gpt:VERSION-cpu without GPUs."""
    pull_secret: str = ""
    """Name of a secret with the registry's password."""
    preset: str = ""
    """Preset of `elastic-gpt train`. Empty: gpt2_124m, or debug_cpu without GPUs."""
    arguments: tuple[str, ...] = ()
    """Flags of `elastic-gpt train` after the preset."""
    nodes: int = 2
    """Nodes to start with; `job scale` changes it."""
    min_nodes: int = 1
    """Fewest nodes; with fewer, training waits."""
    max_nodes: int = 0
    """Most nodes; fixed for the life of the job. 0: 4, or --nodes if that is more."""
    gpus: int = 1
    """GPUs per node, with one worker for each. 0: one worker on CPUs."""
    cpus: int = 0
    """CPUs per node. 0: 4 per GPU, or 2 without GPUs."""
    memory: int = 0
    """GiB per node, snapshots included. 0: what the model needs."""
    oom_restarts: int = 3
    """How often a node that ran out of memory is replaced; DLRover alone never does."""
    network_check: bool = False
    """Let DLRover test the nodes and the network between them at every membership change."""
    spot: bool = False
    """Tolerate spot (preemptible) machines, and prefer them."""
    node_selector: tuple[tuple[str, str], ...] = ()
    """Labels that a worker's machine must have."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables of the workers."""
    env_secret: str = ""
    """Name of a secret whose entries are environment variables of all pods but the master: keys of an object store, say."""
    volume: str = "elastic-gpt"
    """The PersistentVolumeClaim that all pods mount. None is where data and run directory are URLs."""
    volume_size: str = "20Gi"
    """Size of a new claim."""
    access_mode: AccessMode = "ReadWriteMany"
    """Access mode of a new claim. ReadWriteOnce: all pods on one machine."""
    storage_class: str = ""
    """Storage class of a new claim. Empty: the cluster's default."""
    data_of: str = ""
    """The job on this volume whose data is used. Empty: a prepare Job makes data for this job."""
    texts: tuple[str, ...] = ()
    """Text files on the volume, below /workspace, or URLs. None, and no upload: what lies at --data.dir, if the arguments
    give one, else Python's own documentation."""
    upload: tuple[tuple[str, str], ...] = ()
    """Names and contents of text files that are sent in a ConfigMap."""
    tokenizer: Tokenizer = "gpt2"
    """The tokenizer for the text."""
    vocab_size: int = 0
    """Vocabulary size: required for the tokenizer bpe; for word, 0 means all words."""

    def __post_init__(self) -> None:
        for what, name, longest in (
            ("job name", self.name, LONGEST_NAME),
            ("--namespace", self.namespace, 63),
            ("--volume", self.volume, 63),
            ("--data-of", self.data_of or self.name, LONGEST_NAME),
        ):
            if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
                raise SettingsError(
                    f"{what} '{name}': take small letters, digits and dashes, a letter first, at most {longest} of them"
                )
        if not 1 <= self.min_nodes <= self.used_max_nodes:
            raise SettingsError(
                f"--min-nodes {self.min_nodes} and --max-nodes {self.used_max_nodes} are not a range: the least is 1"
            )
        if not self.min_nodes <= self.nodes <= self.used_max_nodes:
            raise SettingsError(
                f"--nodes {self.nodes} is outside {self.min_nodes} to {self.used_max_nodes}: change it,"
                " --min-nodes or --max-nodes"
            )
        for flag, number in (
            ("--gpus", self.gpus),
            ("--cpus", self.cpus),
            ("--memory", self.memory),
            ("--oom-restarts", self.oom_restarts),
        ):
            if number < 0:
                raise SettingsError(f"{flag} {number}: it must not be negative")
        if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|Ti)", self.volume_size):
            raise SettingsError(f"--volume-size '{self.volume_size}': write a size such as 20Gi")
        for path in self.texts:
            if not _elsewhere(path):
                raise SettingsError(f"--text {path}: pods see what is on the volume, which is below {WORKSPACE}")
        if self.data_of and (self.texts or self.upload):
            raise SettingsError("--text and --data-of: the text is prepared, or the data of another job are taken")
        if self.data_of and self.given("data.dir"):
            raise SettingsError(f"--data-of {self.data_of} and --data.dir {self.given('data.dir')}: leave one out")
        if self.data_of and (self.tokenizer != JobSpec.tokenizer or self.vocab_size):
            raise SettingsError(
                f"--tokenizer and --data-of: the data of {self.data_of} have a tokenizer; leave one out"
            )
        if self.vocab_size and self.tokenizer not in SMALLEST:
            raise SettingsError(f"--vocab-size {self.vocab_size}: it is for --tokenizer bpe and word; leave it out")
        if (self.vocab_size or self.tokenizer == "bpe") and self.vocab_size < (least := SMALLEST[self.tokenizer]):
            raise SettingsError(
                f"--tokenizer {self.tokenizer} --vocab-size {self.vocab_size}: at least {least}; 4096, say"
            )
        if self.arguments and not self.arguments[0].startswith("--"):
            raise SettingsError(f"'{self.arguments[0]}' after --: flags of `elastic-gpt train` look like --steps 100")
        if self.network_check and not self.gpus:
            raise SettingsError("--network-check: DLRover checks GPUs and their network only; leave it out")
        if self.memory and self.memory <= self.shm_gib:
            raise SettingsError(
                f"--memory {self.memory}: the snapshots alone take {self.shm_gib} GiB; take {self.memory_gib_needed}"
            )

    def refuse(self, names: tuple[str, ...], where: str) -> None:
        """Raises SettingsError if one of these fields was given: it has no effect `where` the job goes."""
        defaults = {field.name: field.default for field in fields(self)}
        if given := [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name]]:
            raise SettingsError(f"{', '.join(given)}: no effect {where}; leave {'them' if given[1:] else 'it'} out")

    @property
    def used_max_nodes(self) -> int:
        return self.max_nodes or max(4, self.nodes)

    @property
    def used_preset(self) -> str:
        return self.preset or ("gpt2_124m" if self.gpus else "debug_cpu")

    @property
    def used_image(self) -> str:
        version = importlib.metadata.version("elastic-gpt")
        return self.image or f"elastic-gpt:{version}{'' if self.gpus else '-cpu'}"

    def given(self, setting: str) -> str:
        """The value of a setting of `elastic-gpt train` among the arguments, empty if it is not: `data.dir`."""
        return dict(_flags(self.arguments)).get(setting, "")

    @property
    def data_dir(self) -> str:
        """A folder below /workspace, or what the arguments say: a URL, perhaps."""
        return self.given("data.dir") or str(WORKSPACE / (self.data_of or self.name) / "data")

    @property
    def run_dir(self) -> str:
        """As `data_dir`."""
        return self.given("run_dir") or str(WORKSPACE / self.name / "run")

    @property
    def training(self) -> tuple[str, ...]:
        """What follows `elastic-gpt train`."""
        data = () if self.given("data.dir") else (f"--data.dir={self.data_dir}",)
        run = () if self.given("run_dir") else (f"--run-dir={self.run_dir}",)
        return (self.used_preset, *data, *run, *self.arguments)

    @property
    def prepares(self) -> bool:
        """Whether it makes its data. Those of another job, and those at a --data.dir for which no text is named, are there."""
        return not self.data_of and bool(self.texts or self.upload or not self.given("data.dir"))

    @property
    def needs_volume(self) -> bool:
        """Whether anything that it reads or writes lies on the volume."""
        places = (self.data_dir, self.run_dir, *self.texts, *self.arguments, *(value for _, value in self.env))
        return any(str(WORKSPACE) in place for place in places)

    @property
    def workers(self) -> int:
        """Workers on each node."""
        return self.gpus or 1

    @property
    def used_cpus(self) -> int:
        return self.cpus or 4 * self.gpus or 2

    @property
    def parameters(self) -> int:
        """About how many parameters the model has. Assumes GPT-2's vocabulary if the data decides its size."""
        shape = {"n_layer": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 0}
        shape |= {name: int(value) for name, value in preset_model(self.used_preset).items() if name in shape}
        shape |= _shape_in(self.arguments, shape)
        width = shape["n_embd"]
        vocabulary = shape["vocab_size"] or 50257
        return 12 * shape["n_layer"] * width * width + (vocabulary + shape["block_size"]) * width

    @property
    def shm_gib(self) -> int:
        """GiB of /dev/shm: two snapshots of 12 bytes per parameter (AdamW's state in float32), and NCCL's buffers."""
        return math.ceil(2 * 12 * self.parameters / 2**30) + bool(self.gpus)

    @property
    def memory_gib_needed(self) -> int:
        """/dev/shm, and for each worker its libraries and the state twice: for training on CPUs and for restoring."""
        each = (4 if self.gpus else 2) + math.ceil(2 * 12 * self.parameters / 2**30)
        return self.shm_gib + self.workers * each

    @property
    def memory_gib(self) -> int:
        return self.memory or self.memory_gib_needed


def presets() -> Path:
    """The folder of the presets of `elastic-gpt train`."""
    # Found by name: this package must not depend on model_zoo, whose import would import torch.
    return Path(str(importlib.resources.files("model_zoo.nanogpt"))) / "presets"


def preset_model(name: str) -> Mapping[str, int]:
    """The model section of a preset. Raises SettingsError, with the nearest name, if there is no such preset."""
    if Path(name).suffix in (".yaml", ".yml"):
        raise SettingsError(f"--preset {name}: the image has no file of yours; name a preset and add flags after --")
    tree = yaml.safe_load(find_preset(name, presets()).read_text(encoding="utf-8"))
    return dict(tree.get("model", {}))


def _shape_in(arguments: tuple[str, ...], shape: Mapping[str, int]) -> dict[str, int]:
    """The shape settings in `arguments`: `--model.n-layer=6`, in one word or two, gives {"n_layer": 6}."""
    found: dict[str, int] = {}
    for flag, value in _flags(arguments):
        name = flag.removeprefix("model.")
        if flag.startswith("model.") and name in shape:
            if not value.isdecimal():
                raise SettingsError(f"--{flag.replace('_', '-')} '{value}': give a number")
            found[name] = int(value)
    return found


def _flags(arguments: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`--model.n-layer=6`, or the same in two words, as ("model.n_layer", "6")."""
    for word, following in zip(arguments, (*arguments[1:], ""), strict=False):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            yield flag.removeprefix("--").replace("-", "_"), value if equals else following


def _elsewhere(path: str) -> bool:
    """Whether a text is on the volume or at a URL."""
    return "://" in path or PurePosixPath(path).is_relative_to(WORKSPACE)


def read_texts(paths: list[str]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Divide the values of --text into those that pods can read themselves, and local files to send (name, content).

    Raises:
        SettingsError: for a file that does not exist, is not UTF-8, or is too large to send.
    """
    there, here = [], {}
    for path in paths:
        if _elsewhere(path):
            there.append(path)
            continue
        if Path(path).name in here:
            raise SettingsError(f"--text {path}: another text is called {Path(path).name}, too; rename one of them")
        try:
            here[Path(path).name] = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(f"--text {path}: not UTF-8 at byte {error.start}; convert it with iconv") from error
        except OSError as error:
            raise SettingsError(
                f"--text {path}: {error.strerror}; name a file here, or one on the volume as {WORKSPACE}/..."
            ) from error
        if not re.fullmatch(r"[-._a-zA-Z0-9]+", Path(path).name):
            raise SettingsError(
                f"--text {path}: a ConfigMap takes letters, digits, '-', '_' and '.' in names; rename it"
            )
    if sum(len(text.encode()) for text in here.values()) > LARGEST_UPLOAD:
        raise SettingsError(
            "--text: up to 1 MB travels with the job; copy a larger text to the volume with `kubectl cp` and name it"
            f" {WORKSPACE}/... (examples/elasticjob/README.md shows how)"
        )
    return tuple(there), tuple(here.items())
