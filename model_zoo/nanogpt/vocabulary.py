"""A fingerprint of a tokenizer's vocabulary. It is saved with a run, so that another tokenizer is noticed."""

import hashlib
import json
import tempfile
from pathlib import Path

from prepare.tokenizer import Tokenizer


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits, the same for the same tokens with the same ids, whatever folder or tool they come from."""
    with tempfile.TemporaryDirectory(prefix="elastic-gpt-") as folder:
        section = tokenizer.save(Path(folder))
    identity = [section.kind, section.sha256, sorted(section.specials.items()), tokenizer.vocab_size]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
