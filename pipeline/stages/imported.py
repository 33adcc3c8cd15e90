"""Models that are no artifacts as inputs: a directory that others made is adopted as an artifact of kind "model".

It is in Hugging Face's layout; what a checkpoint of ours holds is made a model by `stages.from_checkpoint`.

The artifact is `<root>/cache/<name>-<fingerprint>/`, with a manifest and links to the files of that directory, in which
nothing is written. Its fingerprint is that of their content: a directory that changes is another input, and a task that
was planned with what it held before refuses what it holds now.
"""

import glob
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import pipeline
from pipeline.artifact import MANIFEST, WORK, Artifact, FileRecord, Made, Manifest, read_manifest, write_manifest
from pipeline.env import cpus
from pipeline.errors import ArtifactError
from pipeline.models.config import AnyModel
from pipeline.models.files import CONFIG_FILE, is_theirs
from pipeline.models.hf.config import read_hf_config
from pipeline.models.hf.tensors import INDEX_FILE, tensor_files
from pipeline.progress import Progress
from pipeline.proof import PROVEN, Proofs
from pipeline.remote import CACHE, is_url, open_anywhere
from pipeline.settings import encode, fingerprint
from pipeline.stage import Context, Stage
from pipeline.stages.from_checkpoint import adopt_checkpoint
from pipeline.text.tokenizers import TOKENIZER, load
from pipeline.training.checkpoints.format import is_checkpoint

# Where a directory may say which token ends a text, the first that does; the second is how BERT calls it.
ID_FILES, ID_SETTINGS = (CONFIG_FILE, "generation_config.json"), ("eos_token_id", "sep_token_id")
TOKEN_FILES, TOKEN_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json"), ("eos_token", "sep_token")
BERTS_END_OF_TEXT = "[SEP]"  # the default of its tokenizer's class, which its older directories leave unsaid
NAME_LETTERS = 64


class Imported(Stage):
    """Stands for the stage of an adopted model, of which nobody knows how it was made; it cannot be run.

    Attributes:
        path: The directory.
    """

    produces: ClassVar[str] = "model"

    kind: Literal["imported"] = "imported"
    path: str
    model: AnyModel

    def run(self, ctx: Context) -> None:
        """Refuse to run: no task has this stage."""
        raise AssertionError("an imported model was made elsewhere")

    def verify(self, artifact: Artifact, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Load the model, which looks for every weight; a problem is an ArtifactError."""
        from pipeline.models.hf.load import import_hf
        from pipeline.models.saved import load_model

        (import_hf if is_theirs(artifact.path) else load_model)(artifact.path)
        yield from ()


def open_input(place: str, root: Path, *kinds: str, where: str = "", whole: bool = True) -> Artifact:
    """Open an artifact as `open_anywhere` does, or where a model will do what can be made one.

    That is a local directory in Hugging Face's layout, or a checkpoint of a training of ours.

    Raises:
        ArtifactError: As `open_anywhere`, or if the directory lacks something, or our settings cannot describe it.
        ConfigError: As `open_anywhere`.
    """
    path = Path(place)
    if not is_url(place) and _can_be_adopted(path, kinds):
        try:
            make = adopt_checkpoint if is_checkpoint(path) else adopt
            place = str(make(path.resolve(), root / CACHE))
        except ArtifactError as error:
            lines = str(error).splitlines()
            raise ArtifactError("\n".join(f"{where}: {line}" if where else line for line in lines)) from None
    return open_anywhere(place, root, *kinds, where=where, whole=whole)


def _can_be_adopted(path: Path, kinds: tuple[str, ...]) -> bool:
    """Return whether a directory is a checkpoint, or a model of others; so is our export, where a model is wanted."""
    complete = (path / MANIFEST).is_file()
    if (kinds and "model" not in kinds) or (not complete and (path / WORK).is_dir()) or (complete and not kinds):
        return False
    return is_theirs(path) or is_checkpoint(path)


def adopt(directory: Path, cache: Path) -> Path:
    """Return the directory in `cache` of the artifact that `directory` is; only what changed since is read in full.

    Raises:
        ArtifactError: If it has no `tokenizer.json`, no weights, no token that ends a text, or is damaged, or a model
            that our settings cannot describe.
    """
    began, name = time.monotonic(), directory.name[:NAME_LETTERS] or "model"
    model, files = read_hf_config(directory), _find_files(directory)
    stats = {
        "vocab_size": model.real_vocab_size,
        "end_of_text_id": _end_of_text_id(directory, model.real_vocab_size),
        "parameters": model.num_params(),
    }
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="adopted.", suffix=".tmp", dir=cache) as scratch:
        records = _known(cache, name, files)
        if records is None:
            records = _prove(files, Path(scratch), directory)
            _check_vocabulary(directory / TOKENIZER, model.real_vocab_size)
        identity = fingerprint(
            {"files": {n: encode(record) for n, record in records.items()}, "end_of_text_id": stats["end_of_text_id"]}
        )
        manifest = Manifest(
            kind=Imported.produces,
            name=name,
            fingerprint=identity,
            stage=encode(Imported(path=str(directory), model=model)),
            inputs={},
            files=records,
            stats=stats,
            made=made_now(time.monotonic() - began),
        )
        target = cache / f"{name}-{identity}"
        _complete(target, manifest, files, Path(scratch))
    return target


def _find_files(directory: Path) -> dict[str, Path]:
    """Return the files that make the model, without links, by name."""
    found = {path.name: path for path, _ in tensor_files(directory).values()}
    found |= {name: directory / name for name in (CONFIG_FILE, TOKENIZER)}
    if (directory / INDEX_FILE).is_file():
        found[INDEX_FILE] = directory / INDEX_FILE
    if not found[TOKENIZER].is_file():
        raise ArtifactError(
            f"{directory}: has no {TOKENIZER}, without which no text can be read; save its tokenizer there with "
            "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    return {name: path.resolve() for name, path in sorted(found.items())}


def _check_vocabulary(path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that can make an id of a text for which the model has no row."""
    tokenizer = load(path)
    vocab = tokenizer.data["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    largest = max([*ids, *tokenizer.added_tokens.values()])
    if largest >= vocab_size:
        raise ArtifactError(
            f"{path}: has the id {largest}, but the model's vocab_size is {vocab_size}; they do not belong together"
        )


def _known(cache: Path, name: str, files: Mapping[str, Path]) -> dict[str, FileRecord] | None:
    """Return what was found when these very files were adopted before, if none was written since."""
    for path in sorted(cache.glob(f"{glob.escape(name)}-*/{MANIFEST}")):
        try:
            records = read_manifest(path.parent).files
        except ArtifactError:
            continue  # of another version
        same = records.keys() == files.keys() and all((path.parent / n).resolve() == f for n, f in files.items())
        if same and not Proofs(path.parent).lacking((n, record.xxh128) for n, record in records.items()):
            return records
    return None


def _prove(files: Mapping[str, Path], scratch: Path, directory: Path) -> dict[str, FileRecord]:
    """Read all files in full, several at a time, and leave the proofs of it in `scratch`."""
    proofs = Proofs(scratch)
    progress = Progress(f"reading {directory}", sum(path.stat().st_size for path in files.values()) / 1e6, "MB")

    def prove(name: str) -> FileRecord:
        size, xxh128 = proofs.prove(name, files[name], lambda count: progress.advance(count / 1e6))
        return FileRecord(bytes=size, xxh128=xxh128)

    with ThreadPoolExecutor(max(4, cpus())) as pool:
        try:
            return dict(zip(files, pool.map(prove, files), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()


def _complete(target: Path, manifest: Manifest, files: Mapping[str, Path], scratch: Path) -> None:
    """Make `target` the artifact, whether it is there already, half or whole, or another process makes it now."""
    (target / WORK).mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        link = target / name
        if not link.is_symlink() or link.readlink() != path:
            (scratch / name).symlink_to(path)
            (scratch / name).replace(link)
    if (scratch / PROVEN).exists():
        (scratch / PROVEN).replace(target / PROVEN)
    with suppress(ArtifactError, FileNotFoundError):
        if read_manifest(target).model_copy(update={"made": manifest.made}) == manifest:
            return
    write_manifest(scratch, manifest)
    (scratch / MANIFEST).replace(target / MANIFEST)


def _end_of_text_id(directory: Path, vocab_size: int) -> int:
    """Return the id of the token that ends a text."""
    number = _said_id(directory)
    if number is None:
        raise ArtifactError(
            f"{directory}: nothing says which token ends a text; set eos_token_id in {CONFIG_FILE}, or eos_token in "
            f"{TOKEN_FILES[0]}"
        )
    if not 0 <= number < vocab_size:
        raise ArtifactError(f"{directory / CONFIG_FILE}: the id {number} ends a text, but vocab_size is {vocab_size}")
    return number


def _said_id(directory: Path) -> int | None:
    for file in ID_FILES:
        data = _read_object(directory / file)
        for name in ID_SETTINGS:
            found = data.get(name)
            number = found[0] if isinstance(found, list) and found else found  # the first ends a text, others a turn
            if type(number) is int:
                return number
    ids = _token_ids(directory / TOKENIZER)
    for file in TOKEN_FILES:
        data = _read_object(directory / file)
        for name in TOKEN_SETTINGS:
            found = data.get(name)
            token = found.get("content") if isinstance(found, dict) else found
            if isinstance(token, str) and token in ids:
                return ids[token]
    return ids.get(BERTS_END_OF_TEXT)


def _token_ids(path: Path) -> dict[str, int]:
    """Return the ids of the tokens that a `tokenizer.json` adds to its vocabulary: all special ones are of them."""
    added = _read_object(path).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {token["content"]: token["id"] for token in tokens if {"content", "id"} <= token.keys()}


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error}); copy the model again") from None
    return data if isinstance(data, dict) else {}


def made_now(seconds: float) -> Made:
    """Say when and where an artifact was made that no task makes."""
    return Made(
        version=pipeline.__version__,
        commit=None,
        python=platform.python_version(),
        host=platform.node(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        ranks=1,
    )
