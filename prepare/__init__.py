"""Text to tokens: documents in, train.bin, val.bin and meta.json out. Knows no torch."""
