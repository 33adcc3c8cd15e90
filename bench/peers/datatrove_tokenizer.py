"""datatrove: JSONL through its DocumentTokenizer: python datatrove_tokenizer.py INPUT OUT TOKENIZER."""

import json
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    source, out, directory = map(Path, sys.argv[1:])
    reader = JsonlReader(str(source.parent), glob_pattern=source.name)
    tokenizer = DocumentTokenizer(
        f"{out}/tokens",
        f"{directory}/tokenizer.json",
        eos_token="<|endoftext|>",
        save_final_metadata=False,
        shuffle_documents=False,
    )
    LocalPipelineExecutor([reader, tokenizer], tasks=1, workers=1, logging_dir=f"{out}/logs").run()
    print(json.dumps({"tokens": sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // 2}))
