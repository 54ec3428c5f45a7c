"""`elastic-gpt COMMAND`: opens each room's door, nothing else."""

import importlib
import sys
from importlib.metadata import version

from elastic_gpt.huge_pages import start_over_with_huge_pages
from prepare.frontdoor import DONE, USERS_MISTAKE, command, hint

COMMANDS = {
    "prepare": ("prepare.prepare", "text files to token files: train.bin, val.bin, meta.json"),
    "inspect": ("prepare.look", "what is in prepared data: a table, a histogram, a full check"),
    "convert": ("prepare.convert", "prepared data in nanoGPT's or llm.c's format"),
    "train": ("model_zoo.nanogpt.train", "train a GPT on this machine, or as one worker of many"),
    "run": ("elastic_gpt.script", "a training script of your own, here or as one worker of many"),
    "launch": ("elastic_gpt.nodes.launch", "train elastically under DLRover: several nodes here, or one node in a pod"),
    "master": ("elastic_gpt.nodes.master", "DLRover's job master, scaling a running job: what a job's master pod runs"),
    "job": ("elastic_gpt.jobs.commands", "the same on Kubernetes: submit, watch, scale, suspend, talk to the model"),
    "replay": ("model_zoo.nanogpt.replay", "a certificate: train a stretch of a run again, and compare"),
    "ledger": ("elastic_gpt.ledger", "what happened to a run, and what it cost"),
    "drill": ("elastic_gpt.drill.drill", "kill and scale local nodes on purpose, and prove that nothing changed"),
    "evaluate": ("model_zoo.nanogpt.evaluate", "loss, perplexity and bits per byte on held-out text"),
    "export": ("model_zoo.nanogpt.export", "a trained model for Hugging Face's transformers, or for nanoGPT"),
    "serve": ("model_zoo.nanogpt.serving.serve", "a trained model over HTTP, and a page to talk to it"),
    "generate": ("model_zoo.nanogpt.generate", "talk to a trained model"),
}

HELP = (
    "usage: elastic-gpt COMMAND ...\n\n"
    "GPT training on nodes that come and go; the loss curve does not notice.\n\n"
    + "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
    + "\n\n`elastic-gpt COMMAND --help` tells more, `elastic-gpt --version` which one this is. A first run:\n\n"
    "  elastic-gpt prepare --sample --tokenizer char --output-dir data\n"
    "  elastic-gpt launch --nodes 2 -- train debug_cpu --data.dir data --run-dir run\n"
    "  elastic-gpt generate run --prompt 'The '"
)


@command
def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:  # `elastic-gpt help train`
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return DONE if arguments else USERS_MISTAKE
    if arguments[0] in ("-V", "--version"):
        print(f"elastic-gpt {version('elastic-gpt')}")
        return DONE
    if arguments[0] not in COMMANDS:
        cure = hint(arguments[0], tuple(COMMANDS)) or f": choose from {', '.join(COMMANDS)}"
        raise ValueError(f"no command '{arguments[0]}'{cure}")
    if arguments[0] in ("train", "run"):
        start_over_with_huge_pages()
    room = importlib.import_module(COMMANDS[arguments[0]][0])
    return int(room.main(arguments[1:], prog=f"elastic-gpt {arguments[0]}"))


if __name__ == "__main__":
    sys.exit(main())
