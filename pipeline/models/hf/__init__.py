"""Hugging Face's layouts: which of them computes a model, how one goes out (`export`), and how one comes in (`load`).

Only `export` imports transformers; what planning needs (`classes`, `config`) imports no torch either.
"""
