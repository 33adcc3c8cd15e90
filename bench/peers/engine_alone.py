"""The pipeline's engine in memory, with nothing around it: python engine_alone.py CORPUS OUT TOKENIZER.

CORPUS is a corpus artifact; only the encoding is timed, of batches like those of the stage.
"""

import json
import sys
import time
from pathlib import Path

from pipeline.artifact import open_artifact
from pipeline.stages.tokenize import sample_corpus
from pipeline.text.arrow import read_texts
from pipeline.text.encoding import BATCH_BYTES
from pipeline.text.engine import choose_engine
from pipeline.text.tokenizers import END_OF_TEXT, load

corpus, tokenizer = open_artifact(Path(sys.argv[1])), load(Path(sys.argv[3]) / "tokenizer.json")
engine, end = choose_engine(tokenizer, sample_corpus(corpus)), tokenizer.token_id(END_OF_TEXT)
cpu_s = wall_s = 0.0
tokens = 0
for part in corpus.parts():
    batches = [batch.texts for batch in read_texts(corpus.file(part), BATCH_BYTES)]
    cpu, wall = time.process_time(), time.monotonic()
    tokens += sum(len(engine.encode(batch, end)[0]) for batch in batches)
    cpu_s, wall_s = cpu_s + time.process_time() - cpu, wall_s + time.monotonic() - wall
print(json.dumps({"tokens": tokens, "cpu_s": cpu_s, "wall_s": wall_s, "engine": engine.name}))
