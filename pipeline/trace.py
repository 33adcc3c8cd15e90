"""`python -m pipeline trace run=MODEL step=N | doc=ID [root=DIR]`: which documents were in which step of a pretraining.

Computed from the settings of the run, where every row is a function of its step; nothing was stored for it. `run` is a
directory, finished or not, a URL, or JOB.TASK.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifact import MANIFEST, WORK, Artifact, open_artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.operate import find_artifact
from pipeline.plan import stage_of
from pipeline.settings import nearest
from pipeline.stage import Stage
from pipeline.stages.pretrain import Pretrain
from pipeline.text.corpus import HELD
from pipeline.verify import inputs_of
from pipeline.worker import read_task

if TYPE_CHECKING:
    from pipeline.text.loader import Loader

WORDS = ("run", "step", "doc", "root")
HEADING = "sample\ttokens of\tdocument\tsource\tspan"


def trace(arguments: Sequence[str]) -> int:
    """Print the documents of a step, or the steps of a document; return the exit status.

    Raises:
        ConfigError: If the words are not those above, or there is no such step.
        ArtifactError: If there is no such run or document, or the run's tokens are no longer there.
    """
    words = _parse(arguments)
    stage, tokens = _open_run(words["run"], Path(words.get("root", "artifacts")))
    if "doc" in words:
        _print_steps(stage, tokens, words["doc"])
    else:
        _print_documents(stage.open_loader(tokens), _step(words["step"], stage.steps))
    return 0


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    words = dict(word.partition("=")[::2] for word in arguments)
    problems = [f"trace: no word is called '{name}'{nearest(name, list(WORDS))}" for name in words if name not in WORDS]
    if not words.get("run"):
        problems.append("trace: say which run: run=PATH or run=JOB.TASK")
    if ("step" in words) == ("doc" in words):
        problems.append("trace: say either step=NUMBER or doc=ID")
    if problems:
        raise ConfigError(*problems)
    return words


def _step(text: str, steps: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or not 1 <= int(text) <= steps:
        raise ConfigError(f"trace: step: wanted a number from 1 to {steps}, found '{text[:40]}'")
    return int(text)


def _open_run(name: str, root: Path) -> tuple[Pretrain, dict[str, Artifact]]:
    """Return the settings of a pretraining and its tokens by source; its order depends on no other input."""
    task = Path(name) / WORK / "task.json"
    if task.is_file() and not (Path(name) / MANIFEST).is_file():  # not finished: where a spike is looked into
        frozen = read_task(task)
        stage = _pretraining(frozen.stage, name)
        return stage, {source: open_artifact(Path(frozen.inputs[field])) for source, field in stage.sources.items()}
    model = find_artifact(name, root, whole=False)
    stage = _pretraining(stage_of(model), model.place)
    inputs, missing = inputs_of(model, root, stage.sources.values())
    if missing:
        raise ArtifactError(f"{model.place}: {missing[0]}, so its order cannot be made again")
    return stage, {source: inputs[field] for source, field in stage.sources.items()}


def _pretraining(stage: Stage, place: str) -> Pretrain:
    if not isinstance(stage, Pretrain):
        raise ArtifactError(f"{place}: wanted a run of pretraining, found one of '{stage.kind}'")
    return stage


def _print_documents(loader: "Loader", step: int) -> None:
    """Print every piece of a document that the labels of a step's rows are of."""
    print(HEADING)
    for sample, (source, spans) in enumerate(loader.spans(step)):
        for span in spans:
            print(sample, source, span.id, span.source, f"{span.begin}:{span.end}", sep="\t")


def _print_steps(stage: Pretrain, tokens: Mapping[str, Artifact], document: str) -> None:
    """Print the steps that saw a document, for each source that has it."""
    from pipeline.text.stream import open_stream

    loader = stage.open_loader(tokens)
    lines = []
    for number, (name, stream) in enumerate(zip(loader.names, loader.streams, strict=True)):
        for start, stop in stream.find(document):
            steps = loader.steps_of(number, start, stop)
            seen = f"in steps {', '.join(map(str, steps))}" if steps else f"in none of {stage.steps:,} steps"
            lines.append(f"{name}\t{document}\t{stop - start} tokens\t{seen}")
        if tokens[name].parts(HELD) and open_stream(tokens[name], HELD).find(document):
            lines.append(f"{name}\t{document}\theld out: no step saw it")
    if not lines:
        places = ", ".join(str(artifact.place) for artifact in tokens.values())
        raise ArtifactError(f"trace: no document has the id '{document}' in {places}")
    print("\n".join(lines))
