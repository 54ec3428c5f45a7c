"""What keeps a GPT training right while its nodes come and go."""

import warnings

# DLRover needs the old package pynvml, and torch warns of it at each import: nothing that a user of ours can mend.
warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
