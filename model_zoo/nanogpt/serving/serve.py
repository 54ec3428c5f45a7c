"""Serves a trained model over HTTP: OpenAI's completions, Vertex AI's predictions, KServe's inference, and a page.

    elastic-gpt serve RUN                                       http://127.0.0.1:8080, and a page there
    elastic-gpt serve RUN --follow                              takes each newer checkpoint while the run trains
    elastic-gpt serve s3://bucket/run --host 0.0.0.0 --token-file token

One process, one port. After SIGTERM it ends when all running requests are answered.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvicorn

from elastic_gpt.checkpoint import NoCheckpointYet
from elastic_gpt.devices import find_device
from model_zoo.nanogpt.loading import Loaded, load
from model_zoo.nanogpt.serving.app import GRACE, create_app
from model_zoo.nanogpt.serving.completions import Limits, Service
from model_zoo.nanogpt.serving.connections import Connection
from model_zoo.nanogpt.serving.follow import POLL_SECONDS, follow
from model_zoo.nanogpt.serving.metrics import Metrics
from model_zoo.nanogpt.serving.scheduler import Scheduler
from prepare.frontdoor import DONE, Namespace, Parser, command, number, whole

TOKEN = "ELASTIC_GPT_TOKEN"  # environment variable: the bearer token that clients must send


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt serve") -> int:
    """The command; returns its exit code (prepare/frontdoor.py)."""
    options = _parser(prog).parse_args(argv)
    place = options.model or os.environ.get("AIP_STORAGE_URI")
    if not place:
        raise ValueError("no MODEL: name a run directory, an exported folder, or a URL")
    token = _token(options.token_file, os.environ)
    host, port = _address(options, os.environ)
    routes = {name: _route(variable, default) for name, variable, default in ROUTES}
    listener = _listen(host, port)  # before loading the model, so that a taken port is reported at once
    loaded = _load(options, place)
    assert loaded.tokenizer is not None
    limits = Limits(options.slots, options.queue, options.max_tokens, options.max_seconds)
    metrics = Metrics()
    scheduler = Scheduler(
        loaded.model,
        loaded.step,
        slots=limits.slots,
        queue=limits.queue,
        vocab_size=loaded.tokenizer.vocab_size,
        metrics=metrics,
    )
    service = Service(
        scheduler,
        loaded.tokenizer,
        name=options.name or _name(place),
        block_size=loaded.model.config.block_size,
        parameters=loaded.model.parameter_count(),
        limits=limits,
        metrics=metrics,
    )
    config, device, checkpoints = loaded.model.config, loaded.model.wte.weight.device, loaded.checkpoints
    background = None
    if options.follow:
        if checkpoints is None:
            raise ValueError(f"--follow: {place} is no run, no newer checkpoints will come there: leave it out")
        background = lambda: follow(checkpoints, config, device, scheduler)  # noqa: E731
    app = create_app(service, token=token, background=background, **routes)
    listener.listen(2048)
    shown = f"[{host}]" if ":" in host else host
    print(
        f"{loaded.description}\nserving {service.name} at http://{shown}:{listener.getsockname()[1]}",
        file=sys.stderr,
        flush=True,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(limits.seconds + GRACE),
        )
    )
    server.run([listener])  # returns after a signal, when all requests are answered
    return DONE


ROUTES = (
    ("health_route", "AIP_HEALTH_ROUTE", "/health"),
    ("predict_route", "AIP_PREDICT_ROUTE", "/predict"),
)
"""Options with Vertex AI's environment variables for them, and their defaults."""


def _route(variable: str, default: str) -> str:
    route = os.environ.get(variable, default)
    if not route.startswith("/") or set(route) & set("{}"):
        raise ValueError(f"{variable} is {route!r}: a route begins with / and has no braces")
    return route


def _address(options: Namespace, environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port: loopback, unless a flag or Vertex AI's variables say otherwise."""
    wanted = environment.get("AIP_HTTP_PORT")
    if wanted is not None and not (wanted.isdecimal() and 0 <= int(wanted) < 1 << 16):
        raise ValueError(f"AIP_HTTP_PORT is {wanted!r}: a port is a number from 0 to 65535")
    host = options.host or ("127.0.0.1" if wanted is None else "0.0.0.0")
    return host, int(wanted or 8080) if options.port is None else options.port


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ValueError if the address is wrong or taken."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port} ({error.strerror}): give --host or --port") from error
    return made


def _token(file: Path | None, environment: Mapping[str, str]) -> str | None:
    token, source = environment.get(TOKEN), TOKEN
    if file is not None:
        token, source = file.read_text(encoding="utf-8").strip(), str(file)
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError(
            f"the token in {source} is empty, or has other characters than a header takes: write letters and digits"
        )
    return token


def _load(options: Namespace, place: str) -> Loaded:
    """Load the model. With --follow, wait for the first checkpoint."""
    device, told = find_device(options.device), False
    while True:
        try:
            loaded = load(place, device, options.tokenizer)
            break
        except NoCheckpointYet as error:
            if not options.follow:
                raise
            if not told:
                print(f"waiting for the first checkpoint ({error})", file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL_SECONDS)
    if loaded.tokenizer is None:
        raise ValueError(f"there is no tokenizer in {place}; give --tokenizer DIR, the folder that prepare wrote")
    return loaded


def _name(place: str) -> str:
    """The default name of the model: the last part of its path or URL."""
    plain = place.rstrip("/")
    return (plain if "://" in plain else Path(plain).resolve().name).rsplit("/", 1)[-1] or "model"


EXAMPLES = """\
examples:
  %(prog)s run                                        at http://127.0.0.1:8080; a browser shows a page there
  %(prog)s run --follow                               takes each newer checkpoint of a run that is still training
  %(prog)s s3://bucket/run --port 80 --host 0.0.0.0 --token-file token
  curl localhost:8080/v1/completions --json '{"model": "run", "prompt": "Once", "max_tokens": 50}'
"""


def _parser(prog: str) -> Parser:
    description = "Serve a trained model over HTTP: OpenAI's, Vertex AI's and KServe's protocols, and a page."
    parser = Parser(prog=prog, description=description, epilog=EXAMPLES)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="run directory, exported folder, nanoGPT's ckpt.pt, or a URL (Vertex AI's AIP_STORAGE_URI)",
    )
    parser.add_argument("--host", metavar="ADDRESS", help="where to listen (127.0.0.1; with AIP_HTTP_PORT 0.0.0.0)")
    parser.add_argument("--port", type=whole(0, 65535), metavar="N", help="(8080, or AIP_HTTP_PORT); 0: a free one")
    parser.add_argument("--name", help="what clients call the model (the last part of MODEL)")
    parser.add_argument("--follow", action="store_true", help="take each newer checkpoint of a run that is training")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=f"what clients have to show (or ${TOKEN})")
    parser.add_argument(
        "--slots", type=whole(1), default=Limits.slots, metavar="N", help="generations at a time (%(default)s)"
    )
    parser.add_argument(
        "--queue", type=whole(0), default=Limits.queue, metavar="N", help="generations that wait (%(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=whole(1), default=Limits.tokens, metavar="N", help="new tokens of one (%(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=number(1), default=Limits.seconds, metavar="S", help="a request (%(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda; without it, cuda where there is one")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder, where MODEL has none")
    return parser
