"""`elastic-gpt job ACTION`: a training job on Kubernetes, from a laptop without torch."""

import argparse
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Sequence

from elastic_gpt.jobs import manifest
from elastic_gpt.jobs.render import to_yaml
from elastic_gpt.jobs.spec import ACCESS_MODES, JobSpec, read_texts
from elastic_gpt.settings import fail
from prepare.frontdoor import Parser

EXAMPLES = """\
a first job, on GPUs:
  elastic-gpt job doctor                                       what the cluster lacks
  elastic-gpt job submit mygpt --image REGISTRY/elastic-gpt:0.1.0 -- --steps 1000
  elastic-gpt job watch mygpt
  elastic-gpt job scale mygpt --nodes 3
  elastic-gpt job prompt mygpt
  elastic-gpt job delete mygpt

`elastic-gpt job ACTION --help` tells more.
"""
SPEC_EXAMPLES = """\
what follows -- are flags of `elastic-gpt train`:
  elastic-gpt job %(action)s big --preset gpt2_124m --nodes 4 --max-nodes 8 -- --model.n-layer 24 --model.n-embd 1024
on CPUs, with a text of one's own:
  elastic-gpt job %(action)s small --gpus 0 --text data.txt --tokenizer char
"""


def _spec_flags(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, JobSpec()
    add("name", nargs="?", default=default.name, metavar="NAME", help=f"of the job (default: {default.name})")
    add("--image", default="", help="of all pods (default: elastic-gpt:VERSION, -cpu without GPUs)")
    add("--pull-secret", default="", metavar="NAME", help="the secret with the registry's password")
    add(
        "--preset",
        default="",
        metavar="NAME",
        help="of `elastic-gpt train` (default: gpt2_124m; debug_cpu without GPUs)",
    )
    add("--nodes", type=int, default=default.nodes, metavar="N", help="to start with (default: %(default)s)")
    add(
        "--min-nodes",
        type=int,
        default=default.min_nodes,
        metavar="N",
        help="below, training waits (default: %(default)s)",
    )
    add("--max-nodes", type=int, default=default.max_nodes, metavar="N", help="the most ever (default: %(default)s)")
    add("--gpus", type=int, default=default.gpus, metavar="N", help="a node; 0: CPUs (default: %(default)s)")
    add("--cpus", type=int, default=0, metavar="N", help="a node (default: 4 a GPU, or 2)")
    add("--memory", type=int, default=0, metavar="GIB", help="a node (default: what the model needs)")
    add("--network-check", action="store_true", help="try out GPUs and network at each change of members")
    add("--spot", action="store_true", help="tolerate and prefer spot machines")
    add("--node-selector", action="append", default=[], metavar="LABEL=VALUE", help="workers on such machines only")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the workers")
    add("--volume", default=default.volume, metavar="NAME", help="the volume claim (default: %(default)s)")
    add("--volume-size", default=default.volume_size, metavar="SIZE", help="default: %(default)s")
    add("--access-mode", choices=ACCESS_MODES, default=default.access_mode, help="default: %(default)s")
    add("--storage-class", default="", metavar="NAME", help="default: the cluster's")
    add(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="a text here (up to 1 MB), or on the volume: /workspace/...",
    )
    add("--tokenizer", choices=["gpt2", "char", "byte", "bpe"], default=default.tokenizer, help="default: %(default)s")
    add("--data-of", default="", metavar="JOB", help="train on what this job prepared, instead of preparing a text")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog, description=__doc__.partition(": ")[2], epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    def action(name: str, needs_job: bool = False, cluster: bool = True, spec: bool = False) -> argparse.ArgumentParser:
        made = actions.add_parser(
            name, help=COMMANDS[name], description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.", allow_abbrev=False,
            epilog=SPEC_EXAMPLES % {"action": name} if spec else None, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if needs_job:
            made.add_argument("name", metavar="NAME", help="of the job")
        if spec:
            _spec_flags(made)
        made.add_argument("-n", "--namespace", metavar="NAME", help="default: the context's, else training")
        if cluster:
            made.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: its current one)")
            made.add_argument(
                "--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, ~/.kube/config, this pod's account"
            )
        return made

    def waiting(parser: argparse.ArgumentParser, seconds: int) -> None:
        parser.add_argument("--no-wait", action="store_true", help="return as soon as the server knows")
        parser.add_argument(
            "--timeout", type=float, default=seconds, metavar="S", help="exit code 124 then (default: %(default)s)"
        )

    render = action("render", cluster=False, spec=True)
    render.add_argument(
        "--only",
        default="",
        metavar="PART,...",
        help=f"of: {', '.join(manifest.PARTS)} (default: all but the last two)",
    )
    submit = action("submit", spec=True)
    submit.add_argument(
        "--dry-run", choices=["client", "server"], help="client: only show; server: let it check, keep nothing"
    )
    action("list").add_argument("-A", "--all-namespaces", action="store_true", help="in all namespaces")
    action("status", needs_job=True)
    action("watch", needs_job=True)
    logs = action("logs", needs_job=True)
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on until the job has ended, with new pods as they come"
    )
    logs.add_argument(
        "--of", choices=["workers", "master", "prepare", "all"], default="workers", help="default: %(default)s"
    )
    logs.add_argument("--tail", type=int, metavar="N", help="the last N lines of each pod")
    scale = action("scale", needs_job=True)
    scale.add_argument("--nodes", type=int, required=True, metavar="N", help="between the job's least and most")
    waiting(scale, 600)
    waiting(action("suspend", needs_job=True), 120)
    waiting(action("resume", needs_job=True), 600)
    wait = action("wait", needs_job=True)
    wait.add_argument("--timeout", type=float, metavar="S", help="give up, with exit code 124 (default: never)")
    prompt = action("prompt", needs_job=True)
    prompt.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="for the pod to start (default: %(default)s)"
    )
    delete = action("delete", needs_job=True)
    delete.add_argument("--volume", action="store_true", help="the volume too, and with it data and checkpoints")
    doctor = action("doctor")
    doctor.add_argument(
        "--volume", default=JobSpec().volume, metavar="NAME", help="the claim to look for (default: %(default)s)"
    )
    return parser


COMMANDS = {
    "render": "write the manifests to standard output; needs no cluster",
    "submit": "make the volume, prepare the text and start the job",
    "list": "all jobs of a namespace",
    "status": "a job at this moment: pods, step, loss, events",
    "watch": "the same, live, until the job ends; the exit code is the job's",
    "logs": "what the workers write",
    "scale": "change the number of nodes of a running job",
    "suspend": "let all nodes save their state and go",
    "resume": "go on with a suspended job",
    "wait": "until the job ends: exit code 0 Succeeded, 1 Failed",
    "prompt": "talk to the model, in a pod with the job's volume",
    "delete": "delete a job; its volume stays",
    "doctor": "what the cluster lacks, and the command that mends it",
}


def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt job") -> int:
    """Exit codes: 0, 1 for a job that failed, 2 a user's mistake or a cluster's refusal, 124 when the time is over."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args = _parser(prog).parse_args(words[:split])
    trailing = tuple(words[split + 1 :])
    try:
        if trailing and args.action not in ("render", "submit"):
            raise ValueError(f"nothing follows -- in `{prog} {args.action}`")
        if args.action == "render":
            return _render(args, trailing, heading=f"{prog} {shlex.join(words)}")
        if args.action == "submit" and args.dry_run == "client":
            return _show(_spec(args, trailing, args.namespace or JobSpec().namespace))
        return _with_cluster(args, trailing)
    except ValueError as error:  # SettingsError and ClusterError are
        return fail(error)


def _spec(args: argparse.Namespace, trailing: tuple[str, ...], namespace: str) -> JobSpec:
    texts, upload = read_texts(args.text)
    other = ("namespace", "arguments", "texts", "upload", "node_selector", "env")
    same = [field.name for field in dataclasses.fields(JobSpec) if field.name not in other]
    return JobSpec(
        namespace=namespace,
        arguments=trailing,
        texts=texts,
        upload=upload,
        node_selector=_pairs("--node-selector", args.node_selector),
        env=_pairs("--env", args.env),
        **{field: getattr(args, field) for field in same},
    )


def _pairs(flag: str, words: list[str]) -> tuple[tuple[str, str], ...]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"{flag} {word}: write NAME=VALUE")
    return tuple((word.partition("=")[0], word.partition("=")[2]) for word in words)


def _render(args: argparse.Namespace, trailing: tuple[str, ...], heading: str) -> int:
    parts = tuple(args.only.split(",")) if args.only else manifest.JOB_PARTS
    for part in parts:
        if part not in manifest.PARTS:
            near = difflib.get_close_matches(part, manifest.PARTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(manifest.PARTS)}"
            raise ValueError(f"--only {part}: {hint}")
    spec = _spec(args, trailing, args.namespace or JobSpec().namespace)
    sys.stdout.write(to_yaml(manifest.manifests(spec, parts), heading))
    return 0


def _show(spec: JobSpec) -> int:
    for tree in manifest.manifests(spec):
        print(f"{tree['kind'].lower()}/{tree['metadata']['name']} created (dry run, no server asked)")
    print("`elastic-gpt job render` with the same words writes them out")
    return 0


def _with_cluster(args: argparse.Namespace, trailing: tuple[str, ...]) -> int:
    # The kubernetes package takes half a second to import; --help and render do without it.
    try:
        from elastic_gpt.jobs import actions, doctor, logs, prompt, watch
        from elastic_gpt.jobs.client import Cluster
    except ModuleNotFoundError as error:
        raise ValueError(f"no package {error.name}: pip install 'elastic-gpt[kubernetes]'") from error

    cluster = Cluster.connect(
        kubeconfig=args.kubeconfig, context=args.context, namespace=args.namespace, default=JobSpec().namespace
    )
    match args.action:
        case "submit":
            return actions.submit(cluster, _spec(args, trailing, cluster.namespace), dry_run=args.dry_run == "server")
        case "list":
            return watch.jobs(cluster, everywhere=args.all_namespaces)
        case "status":
            return watch.status(cluster, args.name)
        case "watch":
            return watch.watch(cluster, args.name)
        case "logs":
            return logs.logs(cluster, args.name, of=args.of, tail=args.tail, follow=args.follow)
        case "scale":
            return actions.scale(cluster, args.name, args.nodes, timeout=args.timeout, wait=not args.no_wait)
        case "suspend":
            return actions.suspend(cluster, args.name, timeout=args.timeout, wait=not args.no_wait)
        case "resume":
            return actions.resume(cluster, args.name, timeout=args.timeout, wait=not args.no_wait)
        case "wait":
            return actions.wait(cluster, args.name, timeout=args.timeout)
        case "prompt":
            return prompt.prompt(cluster, args.name, timeout=args.timeout, terminal=prompt.attach)
        case "delete":
            return actions.delete(cluster, args.name, volume=args.volume)
        case _:
            return doctor.doctor(cluster, volume=args.volume)
