"""`elastic-gpt COMMAND`: opens each room's door, nothing else."""

import difflib
import importlib
import os
import sys

COMMANDS = {
    "prepare": ("prepare.prepare", "text files to token files: train.bin, val.bin, meta.json"),
    "inspect": ("prepare.look", "what is in prepared data: a table, a histogram, a full check"),
    "convert": ("prepare.convert", "prepared data in nanoGPT's or llm.c's format"),
    "train": ("model_zoo.nanogpt.train", "train a GPT on this machine, or as one worker of many"),
    "launch": ("elastic_gpt.nodes.launch", "train elastically under DLRover: several nodes here, or one node in a pod"),
    "master": ("elastic_gpt.nodes.master", "DLRover's job master, scaling a running job: what a job's master pod runs"),
    "job": ("elastic_gpt.jobs.commands", "the same on Kubernetes: submit, watch, scale, suspend, talk to the model"),
    "ledger": ("elastic_gpt.ledger", "what happened to a run, and what it cost"),
    "drill": ("elastic_gpt.drill.drill", "kill and scale local nodes on purpose, and prove that nothing changed"),
    "generate": ("model_zoo.nanogpt.generate", "talk to a trained model"),
}

HELP = (
    "usage: elastic-gpt COMMAND ...\n\n"
    "GPT training on nodes that come and go; the loss curve does not notice.\n\n"
    + "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
    + "\n\n`elastic-gpt COMMAND --help` tells more. A first run:\n\n"
    "  elastic-gpt prepare --sample --tokenizer char --output-dir data\n"
    "  elastic-gpt launch --nodes 2 -- train debug_cpu --data.dir data --run-dir run\n"
    "  elastic-gpt generate run --prompt 'The '"
)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        cure = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"error: no command '{arguments[0]}': {cure}", file=sys.stderr)
        return 2
    try:
        room = importlib.import_module(COMMANDS[arguments[0]][0])
        return int(room.main(arguments[1:], prog=f"elastic-gpt {arguments[0]}"))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `elastic-gpt train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
