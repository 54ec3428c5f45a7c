"""Generates text with a trained model, in a terminal.

    elastic-gpt generate RUN --prompt "Once upon a time"     one reply
    elastic-gpt generate RUN                                 asks for prompts; exit, quit or Ctrl-D leaves

Needs only the model and its tokenizer: no data, no master, no network. RUN may also be an exported
folder or a URL. A reply is the text after the prompt, and appears as it is drawn. Ctrl-C ends a
reply; at the prompt it leaves.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from elastic_gpt.devices import find_device
from prepare.frontdoor import DONE, Namespace, Parser, command, whole

from .engine import Request, generate
from .loading import load
from .sampling import check_sampling
from .text import prompt_ids, text_stream


@command
def main(argv: list[str] | None = None, prog: str = "elastic-gpt generate") -> int:
    """The command; returns its exit code (prepare/frontdoor.py)."""
    options = _parser(prog).parse_args(argv)
    reply = _prepare(options)
    if options.prompt is None:
        _talk(reply)
    else:
        try:
            _print_stream(reply(options.prompt))
        except KeyboardInterrupt:
            print()  # so that the shell's prompt begins a new line
            raise
    return DONE


def _prepare(options: Namespace) -> Callable[[str], Iterator[str]]:
    """Check the options, load tokenizer and model. Returns a function from a prompt to a stream of text."""
    check_sampling(options.temperature, options.top_k, options.top_p)
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; give at least 1")
    device = find_device(options.device)
    loaded = load(options.run, device, options.tokenizer)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer in {options.run}; give --tokenizer DIR, the folder that prepare wrote")
    print(loaded.description, file=sys.stderr)
    replies = itertools.count()
    end = tokenizer.eot_id

    def reply(prompt: str) -> Iterator[str]:
        request = Request(
            prompt_ids(prompt, tokenizer),
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=None if options.seed is None else (options.seed + next(replies)) % 2**64,
            stop_ids=[] if end is None else [end],
        )
        ids = generate(model, request, tokenizer.vocab_size)
        return text_stream(itertools.takewhile(lambda id_: id_ != end, ids), tokenizer, options.stop)

    return reply


def _talk(reply: Callable[[str], Iterator[str]]) -> None:
    """Ask for prompts and reply, until exit, quit, Ctrl-D or Ctrl-C. Each prompt starts a new text."""
    remember = _history() if sys.stdin.isatty() else lambda: None
    while True:
        try:
            prompt = input("GPT prompt > ")
            remember()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt.strip() in ("exit", "quit"):
            return
        try:
            _print_stream(reply(prompt))
        except KeyboardInterrupt:
            print()
        except ValueError as error:  # the prompt has characters that the tokenizer does not know
            print(f"error: {error}", file=sys.stderr)


def _history() -> Callable[[], None]:
    """Set up line editing for input(), with earlier prompts. Returns a function that saves the last prompt."""
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "elastic-gpt" / "prompts"
    with contextlib.suppress(OSError):  # there is no history yet, or it cannot be read
        readline.read_history_file(path)
    readline.set_history_length(1000)

    def remember() -> None:
        with contextlib.suppress(OSError):  # the history cannot be written, which is no reason to stop
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            readline.write_history_file(path)

    return remember


def _print_stream(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


EXAMPLES = """\
examples:
  %(prog)s run --prompt 'Once upon a time'            one reply
  %(prog)s run                                        a prompt, reply after reply; exit or Ctrl-D leaves
  %(prog)s run --prompt 'The ' --temperature 0        always the likeliest token
"""


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Generate text with the newest checkpoint of a run.", epilog=EXAMPLES)
    parser.add_argument("run", metavar="MODEL", help="run directory, exported folder, nanoGPT's ckpt.pt, or a URL")
    parser.add_argument("--prompt", metavar="TEXT", help="one reply to this text; without it, prompts are asked for")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens a reply (256)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that sum to P only")
    parser.add_argument(
        "--seed", type=whole(0, 2**64 - 1), metavar="N", help="the same seed, the same text; without it, always another"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a reply before TEXT; repeatable"
    )
    parser.add_argument("--device", help="cpu or cuda; without it, cuda where there is one")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (RUN/tokenizer)")
    return parser
