"""Data: texts and corpora, tokenizers, batches that are the same for the same seed, streams."""
