"""`elastic-gpt job ACTION`: a training job on Kubernetes, from a laptop without torch."""

import dataclasses
import importlib
import shlex
import sys
import typing
from collections.abc import Sequence

from elastic_gpt import settings
from elastic_gpt.jobs import ads, jobset, manifest, trainjob, vertex
from elastic_gpt.jobs.render import to_yaml
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec, presets, read_texts
from elastic_gpt.settings import field_help
from prepare.frontdoor import BooleanOptionalAction, Namespace, Parser, command, fail, hint

EXAMPLES = """\
a first job, on GPUs:
  elastic-gpt job doctor                                       what the cluster lacks
  elastic-gpt job submit mygpt --image REGISTRY/elastic-gpt:0.1.0 -- --steps 1000 --optimizer.warmup-steps 100
  elastic-gpt job watch mygpt
  elastic-gpt job scale mygpt --nodes 3
  elastic-gpt job prompt mygpt
  elastic-gpt job serve mygpt
  elastic-gpt job delete mygpt

`elastic-gpt job ACTION --help` tells more.
"""
SPEC_EXAMPLES = """\
what follows -- are flags of `elastic-gpt train`:
  elastic-gpt job %(action)s big --preset gpt2_124m --nodes 4 --max-nodes 8 -- --model.n-layer 24 --model.n-embd 1024
on CPUs, with a text of one's own:
  elastic-gpt job %(action)s small --gpus 0 --text data.txt --tokenizer char
  elastic-gpt job %(action)s small --gpus 0 --text data.txt --tokenizer bpe --vocab-size 4096
"""
TEXT_HELP = f"a text here (up to 1 MB), or where pods find it: {WORKSPACE}/... on the volume, a URL; may be repeated"
NO_FLAGS = ("name", "namespace", "arguments", "texts", "upload")


def _spec_flags(parser: Parser) -> None:
    """Add a flag for each field of JobSpec that has a docstring. `name` is a positional; `--text` stands for two fields."""
    explained, hints = field_help(JobSpec), typing.get_type_hints(JobSpec)
    parser.add_argument("name", nargs="?", default=JobSpec.name, metavar="NAME", help=explained["name"])
    for field in dataclasses.fields(JobSpec):
        if field.name not in explained or field.name in NO_FLAGS:
            continue
        flag, kind, default = f"--{field.name.replace('_', '-')}", hints[field.name], field.default
        text = explained[field.name].replace("%", "%%") + (" (default: %(default)s)" if default else "")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=explained[field.name])
        elif choices := typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ():
            parser.add_argument(flag, choices=choices, default=default, help=text)
        elif kind in (int, str):
            metavar = "N" if kind is int else "NAME"
            parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)
        else:  # pairs
            parser.add_argument(flag, action="append", default=[], metavar="NAME=VALUE", help=text)
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help=TEXT_HELP)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__.partition(": ")[2], epilog=EXAMPLES, allow_abbrev=False,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)

    def action(name: str, needs_job: bool = False, cluster: bool = True, spec: bool = False) -> Parser:
        made = actions.add_parser(
            name, help=COMMANDS[name], description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.", allow_abbrev=False,
            epilog=SPEC_EXAMPLES % {"action": name} if spec else None,
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

    def waiting(parser: Parser, seconds: int) -> None:
        parser.add_argument(
            "--wait", action=BooleanOptionalAction, default=True, help="until it is done; --no-wait: not"
        )
        parser.add_argument(
            "--timeout", type=float, default=seconds, metavar="S", help="exit code 124 then (default: %(default)s)"
        )

    def only(parser: Parser, forms: Sequence[str]) -> None:
        parts = "; ".join(f"{form}: {', '.join(FORMS[form][0])}" for form in forms)
        parser.add_argument(
            "--only", default="", metavar="PART,...", help=f"{parts} (default: those that make up a job)"
        )

    def run_as(parser: Parser) -> None:
        parser.add_argument(
            "--as", dest="form", choices=LIVING, default="elasticjob", help="which kind of job (default: %(default)s)"
        )

    # --- making a job
    render = action("render", cluster=False, spec=True)
    only(render, tuple(FORMS))
    render.add_argument(
        "--as", dest="form", choices=FORMS, default="elasticjob", help="which kind of manifest (default: %(default)s)"
    )
    submit = action("submit", spec=True)
    run_as(submit)
    only(submit, LIVING)
    submit.add_argument(
        "--dry-run", choices=["client", "server"], help="client: only show; server: let it check, keep nothing"
    )
    # --- looking at it
    action("list").add_argument("-A", "--all-namespaces", action="store_true", help="in all namespaces")
    run_as(action("status", needs_job=True))
    action("watch", needs_job=True)
    logs = action("logs", needs_job=True)
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on until the job has ended, with new pods as they come"
    )
    logs.add_argument(
        "--of", choices=["workers", "master", "prepare", "all"], default="workers", help="default: %(default)s"
    )
    logs.add_argument("--tail", type=int, metavar="N", help="the last N lines of each pod")
    # --- changing it
    scale = action("scale", needs_job=True)
    scale.add_argument("--nodes", type=int, required=True, metavar="N", help="between the job's least and most")
    waiting(scale, 600)
    waiting(action("suspend", needs_job=True), 120)
    waiting(action("resume", needs_job=True), 600)
    wait = action("wait", needs_job=True)
    run_as(wait)
    wait.add_argument("--timeout", type=float, metavar="S", help="give up, with exit code 124 (default: never)")
    prompt = action("prompt", needs_job=True)
    prompt.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="for the pod to start (default: %(default)s)"
    )
    waiting(action("serve", needs_job=True), 600)
    delete = action("delete", needs_job=True)
    waiting(delete, 120)
    run_as(delete)
    delete.add_argument("--volume", action="store_true", help="the volume too, and with it data and checkpoints")
    # --- the cluster
    doctor = action("doctor")
    doctor.add_argument(
        "--volume",
        default=JobSpec().volume,
        metavar="NAME",
        help="the claim to look for; '' for a job whose data and run directory are URLs (default: %(default)s)",
    )
    return parser


FORMS = {
    "elasticjob": (manifest.PARTS, manifest.JOB_PARTS),
    "trainjob": (trainjob.PARTS, trainjob.JOB_PARTS),
    "jobset": (jobset.PARTS, jobset.JOB_PARTS),
    "oci-ads": (ads.PARTS, tuple(ads.PARTS)),
    "vertex": (vertex.PARTS, vertex.JOB_PARTS),
}
"""The forms in which `render` writes a job: for each, all its parts, and those that make up a job."""

LIVING = ("elasticjob", "trainjob")
"""The forms for which there are other actions than `render`. For the others there are kubectl and their own tools."""

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
    "serve": "the model over HTTP, following the run: a Deployment and a Service",
    "delete": "delete a job; its volume stays",
    "doctor": "what the cluster lacks, and the command that mends it",
}


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt job") -> int:
    """Returns 0, 1 for a job that failed, 2 for a user's mistake or a refusal of the cluster, 124 if the time is over."""
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
            return _show(args, _spec(args, trailing, args.namespace or JobSpec().namespace))
        return _with_cluster(args, trailing)
    except ValueError as error:  # SettingsError or ClusterError
        return fail(error)


def _spec(args: Namespace, trailing: tuple[str, ...], namespace: str) -> JobSpec:
    texts, upload = read_texts(args.text)
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(JobSpec) if hasattr(args, field.name)
    }
    given |= {"node_selector": _pairs("--node-selector", args.node_selector), "env": _pairs("--env", args.env)}
    spec = JobSpec(**given | {"namespace": namespace, "arguments": trailing, "texts": texts, "upload": upload})
    _check_training(spec)
    return spec


def _check_training(spec: JobSpec) -> None:
    """Check the settings of the workers as they do, so that a mistake is told here and not by a pod.

    Only the pods can check what depends on the data: whether it is long enough, and how large its
    vocabulary is.
    """
    config = importlib.import_module(
        "model_zoo.nanogpt.config"
    )  # imported by name, as in cli.py: this package must not depend on model_zoo
    words = [spec.used_preset, *spec.arguments]
    checked = settings.parse(
        config.TrainConfig, words, presets=presets(), prog="elastic-gpt train", environment=dict(spec.env)
    )
    for note in checked.notes():
        print(f"note: {note}", file=sys.stderr)


def _pairs(flag: str, words: list[str]) -> tuple[tuple[str, str], ...]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"{flag} {word}: write NAME=VALUE")
    return tuple((word.partition("=")[0], word.partition("=")[2]) for word in words)


def _parts(args: Namespace) -> tuple[str, ...]:
    known, usual = FORMS[args.form]
    parts = tuple(args.only.split(",")) if args.only else usual
    for part in parts:
        if part not in known:
            cure = hint(part, tuple(known)) or f": choose from {', '.join(known)}"
            raise ValueError(f"--only {part}{cure}")
    return parts


def _render(args: Namespace, trailing: tuple[str, ...], heading: str) -> int:
    known, parts = FORMS[args.form][0], _parts(args)
    spec = _spec(args, trailing, args.namespace or JobSpec().namespace)
    sys.stdout.write(to_yaml([tree for part in known if part in parts for tree in known[part](spec)], heading))
    return 0


def _show(args: Namespace, spec: JobSpec) -> int:
    known = FORMS[args.form][0]
    for tree in (tree for part in known if part in _parts(args) for tree in known[part](spec)):
        print(f"{tree['kind'].lower()}/{tree['metadata']['name']} created (dry run, no server asked)")
    print("`elastic-gpt job render` with the same words writes them out")
    return 0


def _with_cluster(args: Namespace, trailing: tuple[str, ...]) -> int:
    # The kubernetes package takes half a second to import, and --help and render do not need it.
    from elastic_gpt.jobs import actions, doctor, logs, prompt, serve, trainjob_actions, watch
    from elastic_gpt.jobs.client import Cluster

    cluster = Cluster.connect(
        kubeconfig=args.kubeconfig, context=args.context, namespace=args.namespace, default=JobSpec().namespace
    )
    if getattr(args, "form", "elasticjob") == "trainjob":
        match args.action:
            case "submit":
                spec = _spec(args, trailing, cluster.namespace)
                return trainjob_actions.submit(cluster, spec, _parts(args), dry_run=args.dry_run == "server")
            case "status":
                return trainjob_actions.show(cluster, args.name)
            case "wait":
                return trainjob_actions.wait(cluster, args.name, timeout=args.timeout)
            case _:
                return trainjob_actions.delete(
                    cluster, args.name, volume=args.volume, timeout=args.timeout, wait=args.wait
                )
    match args.action:
        case "submit":
            if args.only:
                raise ValueError(
                    f"--only {args.only} is for --as trainjob: leave it out, or use `elastic-gpt job render`"
                )
            return actions.submit(cluster, _spec(args, trailing, cluster.namespace), dry_run=args.dry_run == "server")
        case "list":
            return watch.jobs(cluster, everywhere=args.all_namespaces)
        case "status":
            return watch.show(cluster, args.name)
        case "watch":
            return watch.watch(cluster, args.name)
        case "logs":
            return logs.logs(cluster, args.name, of=args.of, tail=args.tail, follow=args.follow)
        case "scale":
            return actions.scale(cluster, args.name, args.nodes, timeout=args.timeout, wait=args.wait)
        case "suspend":
            return actions.suspend(cluster, args.name, timeout=args.timeout, wait=args.wait)
        case "resume":
            return actions.resume(cluster, args.name, timeout=args.timeout, wait=args.wait)
        case "wait":
            return actions.wait(cluster, args.name, timeout=args.timeout)
        case "prompt":
            return prompt.prompt(cluster, args.name, timeout=args.timeout, terminal=prompt.attach)
        case "serve":
            return serve.serve(cluster, args.name, timeout=args.timeout, wait=args.wait)
        case "delete":
            return actions.delete(cluster, args.name, volume=args.volume, timeout=args.timeout, wait=args.wait)
        case _:
            return doctor.doctor(cluster, volume=args.volume)
