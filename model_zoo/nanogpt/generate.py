"""Text from a trained model, in a terminal.

    elastic-gpt generate RUN --prompt "Once upon a time"     one reply, then the end
    elastic-gpt generate RUN                                 a prompt, reply after reply; exit, quit or Ctrl-D leaves

Needs the run directory and the tokenizer folder only: no data, no master, no network. The reply is what follows the
prompt, without the prompt, and appears as it is drawn. Ctrl-C ends a reply; at the prompt it leaves.
"""

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from .model import GPT, GPTConfig
from .sampling import check_sampling, generate

if TYPE_CHECKING:
    from prepare.tokenizer import Tokenizer


def main(argv: list[str] | None = None, prog: str = "elastic-gpt generate") -> int:
    """The command; returns its exit code: 0, 1 for an error of the user's, 130 for Ctrl-C in the middle of the work."""
    try:
        options = _parser(prog).parse_args(argv)
        reply = _prepare(options)
        if options.prompt is None:
            _talk(reply)
        else:
            _print_stream(reply(options.prompt))
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain once more when it flushes stdout at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def load_model(run: Path, device: torch.device) -> tuple[GPT, int]:
    """The model of a run directory's newest whole checkpoint, in eval mode on `device`, and its step.

    Raises ValueError (CheckpointError is one) where there is no run or no checkpoint, or config.yaml fits neither.
    """
    from elastic_gpt.checkpoint import load_model_weights

    step, weights = load_model_weights(run)
    path = run / "config.yaml"
    try:
        config = GPTConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no model ({_line(error)}); restore the file that training wrote") from error
    with torch.device("meta"):
        model = GPT(config)  # names and shapes only: the weights are assigned, nothing is drawn
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint of step {step}: not the model in {path} ({_line(error)}); restore that"
        ) from error
    return model.to(device).eval(), step


def reply_ids(
    model: GPT,
    tokenizer: "Tokenizer",
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The ids that follow `prompt`, one at a time, until the text ends. An empty prompt is the start of a text."""
    if not prompt and tokenizer.eot_id is not None:
        ids = [tokenizer.eot_id]  # what stands between texts
    else:
        ids = tokenizer.encode(prompt or "\n").tolist()
    tokens = torch.tensor([ids], dtype=torch.int64, device=model.wte.weight.device)
    stream = generate(
        model,
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        vocab_size=tokenizer.vocab_size,
    )
    for token in stream:
        id_ = int(token.item())
        if id_ == tokenizer.eot_id:
            return
        yield id_


def text_stream(ids: Iterable[int], tokenizer: "Tokenizer", stops: Iterable[str] = ()) -> Iterator[str]:
    """Pieces of text as the ids come in, up to the first of `stops`, which is left out.

    An id may end inside a UTF-8 character and a stop may be spread over several ids: what could still become one of
    them is held back until the next id decides. Bytes that are not UTF-8 become U+FFFD.
    """
    stops = [stop for stop in stops if stop]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for id_ in ids:
        held += decoder.decode(tokenizer.decode_bytes([id_]))
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        ready = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if ready:
            yield held[:ready]
            held = held[ready:]
    yield held + decoder.decode(b"", final=True)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _prepare(options: argparse.Namespace) -> Callable[[str], Iterator[str]]:
    """Check the options, load tokenizer and model; the result turns a prompt into a stream of text."""
    check_sampling(options.temperature, options.top_k, options.top_p)
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; give at least 1")
    from prepare.tokenizer import load

    device = _device(options.device)
    model, step = load_model(options.run, device)
    folder = options.tokenizer or options.run / "tokenizer"
    if not folder.is_dir():
        raise ValueError(f"there is no tokenizer folder {folder}; give --tokenizer DIR, the folder that prepare wrote")
    tokenizer = load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; "
            "give --tokenizer DIR, the folder of the data that the model was trained on"
        )
    print(f"model of step {step}, {model.parameter_count():,} parameters, on {device}", file=sys.stderr)
    generator = torch.Generator(device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)

    def reply(prompt: str) -> Iterator[str]:
        ids = reply_ids(
            model,
            tokenizer,
            prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
        return text_stream(ids, tokenizer, options.stop)

    return reply


def _device(name: str | None) -> torch.device:
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device; give cpu or cuda") from error
    if device.type == "cuda" and not cuda:
        raise ValueError(f"--device {name}: torch sees no CUDA device here; give --device cpu")
    return device


def _line(error: Exception) -> str:
    """The error on one line, where a library's message has many."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _talk(reply: Callable[[str], Iterator[str]]) -> None:
    """Prompt and reply, until exit, quit, Ctrl-D or Ctrl-C at the prompt. Each prompt starts afresh."""
    import readline  # noqa: F401  # line editing and history for input()

    while True:
        try:
            prompt = input("GPT prompt > ")
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


def _print_stream(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Generate text with the newest checkpoint of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, as training wrote it")
    parser.add_argument("--prompt", metavar="TEXT", help="one reply to this text; without it, prompts are asked for")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens a reply (256)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that sum to P only")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same seed, the same text; without it, always another"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a reply before TEXT; repeatable"
    )
    parser.add_argument("--device", help="cpu or cuda; without it, cuda where there is one")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (RUN/tokenizer)")
    return parser
