"""Checkpoints of a training as inputs: what `checkpoints/step-00000123` holds becomes an artifact of kind "model".

The artifact is `<root>/cache/<model>-<step>-<fingerprint>/`, with the weights of that step in the precision of the
training; the checkpoint itself stays as it is, and may go later.
"""

import tempfile
import time
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, FileRecord, Manifest, atomic, write_manifest
from pipeline.errors import ArtifactError
from pipeline.models.files import CONFIG_FILE, WEIGHTS_FILE, read_config
from pipeline.settings import encode, fingerprint
from pipeline.stage import CHECKPOINTS
from pipeline.text.tokenizers import TOKENIZER
from pipeline.training.checkpoints.format import WEIGHTS, Index, read_index

NEEDED = (CONFIG_FILE, TOKENIZER)


def adopt_checkpoint(directory: Path, cache: Path) -> Path:
    """Return the directory in `cache` of the model artifact that a checkpoint is; made once.

    Raises:
        ArtifactError: If the checkpoint is damaged, or does not hold all that makes a model.
    """
    began = time.monotonic()
    index = read_index(directory)
    for name in NEEDED:
        if name not in index.files:
            raise ArtifactError(f"{directory}: has no {name}, so no model can be made of it; take a finished model")
    identity = fingerprint({name: encode(record) for name, record in index.files.items() if _makes_model(name)})
    target = cache / f"{_name(directory)}-{identity}"
    if not (target / MANIFEST).is_file():
        (target / WORK).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="adopted.", suffix=".tmp", dir=cache) as scratch:
            _write(directory, index, target, Path(scratch), identity, began)
    return target


def _makes_model(name: str) -> bool:
    return name in NEEDED or name.startswith(f"{WEIGHTS}-")


def _name(directory: Path) -> str:
    """Return how the artifact is called: by the model whose checkpoint it is, and the step."""
    above = directory.parent.parent.name if directory.parent.name == CHECKPOINTS else directory.parent.name
    return f"{above}-{directory.name}"[-64:].lstrip("-.")


def _write(directory: Path, index: Index, target: Path, scratch: Path, identity: str, began: float) -> None:
    """Write the files of the artifact, its manifest last; several processes at once write the same."""
    from pipeline.stages.imported import Imported, made_now
    from pipeline.training.checkpoints.read import check_file, write_weights

    files: dict[str, FileRecord] = {}
    for name in NEEDED:
        check_file(directory, index, name)
        files[name] = index.files[name]
        with atomic(target / name, scratch / name) as temporary:
            temporary.write_bytes((directory / name).read_bytes())
    model = read_config(target).model
    with atomic(target / WEIGHTS_FILE, scratch / WEIGHTS_FILE) as temporary:
        files[WEIGHTS_FILE] = write_weights(directory, temporary)
    stats = {"vocab_size": model.real_vocab_size, "parameters": model.num_params(), **index.about}
    manifest = Manifest(
        kind=Imported.produces,
        name=target.name.removesuffix(f"-{identity}"),
        fingerprint=identity,
        stage=encode(Imported(path=str(directory), model=model)),
        inputs={},
        files=dict(sorted(files.items())),
        stats=stats,
        made=made_now(time.monotonic() - began),
    )
    write_manifest(scratch, manifest)
    (scratch / MANIFEST).replace(target / MANIFEST)
