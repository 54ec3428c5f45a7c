"""Which tokens a tokenizer's ids stand for, in 16 hex digits: they travel with a run, so that no other's is taken for it."""

import hashlib
import json
import tempfile
from pathlib import Path

from prepare.tokenizer import Tokenizer


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """The same for the same ids of the same tokens, whatever folder or tool the tokenizer came from."""
    with tempfile.TemporaryDirectory(prefix="elastic-gpt-") as folder:
        section = tokenizer.save(Path(folder))
    identity = [section.kind, section.sha256, sorted(section.specials.items()), tokenizer.vocab_size]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
