"""Text: raw files, corpora, filters, tokenizers and token streams. Knows nothing of models and parallelism."""
