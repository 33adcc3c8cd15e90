"""What a checkpoint on the disk is; imports no torch.

`step-00000123/` holds `weights-00000-of-00004.safetensors` and `optimizer-00000-of-00004.safetensors` of every rank:
one-dimensional pieces of tensors, each where it lay in training. `checkpoint.json` says which pieces make which tensor,
and has the checksum of every file; it is written last, in a directory that gets its name after that.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash

from pipeline.artifact import FileRecord, write_json
from pipeline.errors import ArtifactError, ConfigError
from pipeline.settings import Settings, decode, encode

INDEX = "checkpoint.json"
DAMAGED, UNFINISHED = ".damaged", ".tmp"
WEIGHTS, OPTIMIZER = "weights", "optimizer"  # the two kinds of files
VECTOR = "vector"  # what a state is called that describes a parameter as a whole, "squares/<parameter>"

# The names of safetensors for the types of numbers that torch and numpy call otherwise
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class Ranks(Settings):
    """How a training is spread: `data` times `tensor` ranks, and the ZeRO stage."""

    data: int
    tensor: int
    zero: int

    def __str__(self) -> str:
        shared = f" of {self.tensor} tensor-parallel ranks" if self.tensor > 1 else ""
        noun = "rank" if self.data * self.tensor == 1 else "ranks"
        return f"{self.data * self.tensor} {noun}{f', groups{shared}' if shared else ''}, ZeRO stage {self.zero}"

    @property
    def world(self) -> int:
        """Number of all ranks."""
        return self.data * self.tensor


class Piece(Settings):
    """A range of a tensor that one rank wrote.

    Attributes:
        rank: Whose files hold it.
        tensor_rank: Which slice of the tensor it is of; 0 where the tensor is not sliced.
        start: Its first element, of the slice, counted row by row; `stop` is after its last.
    """

    rank: int
    tensor_rank: int
    start: int
    stop: int


class Record(Settings):
    """A tensor, and all states of the optimizer that lie like it.

    Attributes:
        shape: Of the whole.
        sliced: The dimension along which tensor-parallel ranks share it in equal slices; null is not at all.
        pieces: Together all of it, once.
        squares: The sum of its squares by state: "weights", or of the optimizer "exp_avg" and the like.
    """

    shape: list[int]
    sliced: int | None
    pieces: list[Piece]
    squares: dict[str, float]


class Scalar(Settings):
    """A number that the optimizer keeps for every parameter.

    Attributes:
        dtype: Of a tensor without dimensions, as torch calls it; null is a plain number.
        values: By parameter.
    """

    dtype: str | None
    values: dict[str, float | int]


class Part(Settings):
    """What one rank contributes: its files, and its pieces of every tensor."""

    files: dict[str, FileRecord]
    tensors: dict[str, Record]


class Index(Settings):
    """All of a checkpoint that is not a number of a tensor.

    Attributes:
        temporary: Whether it goes when the next one is complete.
        validation_loss: Of its step, where one was taken.
        ranks: How the training was spread that it is of.
        notes: What the training loop keeps.
        about: What makes a model of it: "precision", "vocab_size", "end_of_text_id".
        scaler: What moves in the loss scaler of fp16.
        scalars: The optimizer's, by state.
        tensors: By the name of a parameter or buffer, or of what the optimizer keeps of one as a whole.
    """

    format: Literal[1] = 1
    step: int
    temporary: bool
    validation_loss: float | None
    ranks: Ranks
    notes: dict[str, Any]
    about: dict[str, Any]
    scaler: dict[str, float | int]
    scalars: dict[str, Scalar]
    files: dict[str, FileRecord]
    tensors: dict[str, Record]


def file_name(state: str, rank: int, world: int) -> str:
    """Return the file in which a rank keeps its pieces of the weights, or of a state of the optimizer."""
    return f"{WEIGHTS if state == WEIGHTS else OPTIMIZER}-{rank:05d}-of-{world:05d}.safetensors"


def key(name: str, state: str) -> str:
    """Return what a piece is called in its file: the name of its tensor, for the optimizer "<state>/<name>"."""
    return name if state in (WEIGHTS, VECTOR) else f"{state}/{name}"


def step_directory(directory: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return what has the name of a complete checkpoint, the newest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch("[0-9]{8,}", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory is a checkpoint, to judge by its files."""
    return (directory / INDEX).is_file()


def read_index(checkpoint: Path) -> Index:
    """Read the index of a checkpoint.

    Raises:
        ArtifactError: If there is none, or it is not one of this version.
    """
    path = checkpoint / INDEX
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); wanted a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or data.keys() != {"xxh128", "index"}:
        raise ArtifactError(f"{path}: not the index of a checkpoint of this version")
    if _checksum(data["index"]) != data["xxh128"]:
        raise ArtifactError(f"{path}: does not have the checksum that stands in it")
    try:
        return decode(Index, data["index"])
    except ConfigError as error:
        problem = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: not the index of a checkpoint of this version ({problem})") from None


def write_index(checkpoint: Path, index: Index) -> None:
    """Write the index of a checkpoint, with its own checksum, in one durable step."""
    data = json.loads(json.dumps(encode(index), allow_nan=False))  # as it will be read
    write_json(checkpoint / INDEX, {"xxh128": _checksum(data), "index": data})


def _checksum(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def join_parts(parts: Iterable[Part]) -> tuple[dict[str, FileRecord], dict[str, Record]]:
    """Return the files of all ranks, and every tensor with the pieces of all of them."""
    files: dict[str, FileRecord] = {}
    tensors: dict[str, Record] = {}
    for part in parts:
        files |= part.files
        for name, more in part.tensors.items():
            known = tensors.get(name)
            if known is None:
                tensors[name] = more
                continue
            assert (known.shape, known.sliced) == (more.shape, more.sliced), name
            states = dict.fromkeys([*known.squares, *more.squares])
            squares = {state: known.squares.get(state, 0.0) + more.squares.get(state, 0.0) for state in states}
            tensors[name] = known.model_copy(update={"pieces": known.pieces + more.pieces, "squares": squares})
    return files, tensors


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int], int]], multiple: int = 8) -> bytes:
    """Return what a safetensors file begins with, before the numbers of its tensors one after another.

    Args:
        tensors: Type in the words of safetensors, shape and bytes of each, by its key, in their order.
        multiple: Of its length in bytes, so that the numbers lie where a processor or a disk wants them.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % multiple)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, by key, and where their numbers begin.

    Raises:
        ArtifactError: If it is not such a file.
    """
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"a header of {size} bytes")
            tensors = json.loads(stream.read(size))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged ({error}); wanted a safetensors file") from None
    tensors.pop("__metadata__", None)
    return tensors, 8 + size
