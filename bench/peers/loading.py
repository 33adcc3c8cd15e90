"""One way to load random sequences, timed: python loading.py NAME DATA SEQ_LEN ROWS SECONDS [CHECKOUT].

DATA is what `bench/loader.py` made. With ROWS 0 the way's own copy of the data is written. Every way gives batches of
ROWS sequences in random order as int64, inputs and labels; start-up lasts from an imported library to the first batch.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

END, VOCABULARY = 50256, 50257
Batches = Iterator[Any]


def main() -> None:
    """Prepare or measure, and print a line of JSON."""
    name, (data, seq_len, rows, seconds) = sys.argv[1], (Path(sys.argv[2]), *map(int, sys.argv[3:6]))
    if rows == 0:
        if name in PREPARE:
            PREPARE[name](data, seq_len)
        return
    opener = OPEN[name]()
    began, began_cpu = time.perf_counter(), time.process_time()
    batches = opener(data, seq_len, rows)
    first = next(batches)
    start_s, start_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    inputs, labels = map(np.asarray, first)
    assert inputs.shape == labels.shape == (rows, seq_len)
    assert inputs.dtype == labels.dtype == np.int64
    count, began, began_cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        next(batches)
        count += rows
    print(
        json.dumps(
            {
                "start_s": start_s,
                "start_cpu_s": start_cpu_s,
                "per_s": count / (time.perf_counter() - began),
                "per_cpu_s": count / (time.process_time() - began_cpu),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        ),
        flush=True,
    )
    os._exit(0)  # some ways leave threads behind


def random_rows(count: int, rows: int) -> Iterator[np.ndarray]:
    """Yield batches of a random order, drawn before the clock starts."""
    order = np.random.default_rng(0).permutation(count)[: count // rows * rows].reshape(-1, rows)
    while True:
        yield from order


def bare_gather() -> Callable[..., Batches]:
    """Return a memory map of which numpy copies all rows of a batch in one call: the limit of this table."""

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        flat = np.memmap(data / "flat.bin", np.uint16, "r")
        count = (len(flat) - 1) // seq_len
        table = np.lib.stride_tricks.as_strided(flat, (count, seq_len + 1), (2 * seq_len, 2), writeable=False)
        for chosen in random_rows(count, rows):
            tokens = table[chosen].astype(np.int64)
            yield tokens[:, :-1], tokens[:, 1:]

    return batches


def bare_fixed() -> Callable[..., Batches]:
    """Return a memory map of rows of fixed length, which do not overlap."""

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        flat = np.memmap(data / "flat.bin", np.uint16, "r")
        count = len(flat) // (seq_len + 1)
        table = flat[: count * (seq_len + 1)].reshape(count, seq_len + 1)
        for chosen in random_rows(count, rows):
            tokens = table[chosen].astype(np.int64)
            yield tokens[:, :-1], tokens[:, 1:]

    return batches


def bare_index() -> Callable[..., Batches]:
    """Return a memory map indexed by the place of every token."""

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        flat, places = np.memmap(data / "flat.bin", np.uint16, "r"), np.arange(seq_len + 1)
        for chosen in random_rows((len(flat) - 1) // seq_len, rows):
            tokens = flat[chosen[:, None] * seq_len + places].astype(np.int64)
            yield tokens[:, :-1], tokens[:, 1:]

    return batches


def bare_slices() -> Callable[..., Batches]:
    """Return what nanoGPT's get_batch does, but for its sampling with replacement: a slice for every row."""

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        count = (data / "flat.bin").stat().st_size // 2 // seq_len - 1
        for chosen in random_rows(count, rows):
            flat = np.memmap(data / "flat.bin", np.uint16, "r")
            places = (chosen * seq_len).tolist()
            yield (
                np.stack([flat[place : place + seq_len].astype(np.int64) for place in places]),
                np.stack([flat[place + 1 : place + 1 + seq_len].astype(np.int64) for place in places]),
            )

    return batches


def ours(packing: str, documents: bool) -> Callable[[], Callable[..., Batches]]:
    """Return the pipeline's loader."""

    def importing() -> Callable[..., Batches]:
        from pipeline.text.loader import Loader, Order
        from pipeline.text.mixture import Temperature
        from pipeline.text.packing import BestFit, Contiguous
        from pipeline.text.stream import TokenStream

        how = {"contiguous": Contiguous(), "best_fit": BestFit()}[packing]

        def batches(data: Path, seq_len: int, rows: int) -> Batches:
            parts = json.loads((data / "parts.json").read_text())
            stream = TokenStream([str(data / name) for name in parts], list(parts.values()), END, VOCABULARY)
            order = Order(Temperature(), how, seq_len, rows, steps=10**6, seed=0)
            loader = Loader({"tokens": stream}, order)
            for step in range(1, 10**6):
                batch = loader.read(step, documents=documents)
                yield batch.inputs, batch.labels

        return batches

    return importing


def datasets_rows() -> Callable[..., Batches]:
    """Return `datasets`, rows of fixed length, as numpy."""
    import datasets

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        table = datasets.load_from_disk(str(data / "datasets")).with_format("numpy")
        for chosen in random_rows(len(table), rows):
            tokens = np.asarray(table[chosen]["tokens"]).astype(np.int64)
            yield tokens[:, :-1], tokens[:, 1:]

    return batches


def write_datasets(data: Path, seq_len: int) -> None:
    """Write rows of fixed length for `datasets`."""
    import datasets

    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), length=seq_len + 1)})

    def rows() -> Iterator[dict[str, Any]]:
        for block in row_blocks(data, seq_len):
            yield from ({"tokens": row} for row in block)

    table = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(data / "datasets-cache"))
    table.save_to_disk(str(data / "datasets"))


def row_blocks(data: Path, seq_len: int) -> Iterator[np.ndarray]:
    """Yield the rows of the flat file, some at a time."""
    flat = np.memmap(data / "flat.bin", np.uint16, "r")
    count = (len(flat) - 1) // seq_len
    table = np.lib.stride_tricks.as_strided(flat, (count, seq_len + 1), (2 * seq_len, 2), writeable=False)
    for begin in range(0, count, 1024):
        yield table[begin : begin + 1024]


def mosaicml() -> Callable[..., Batches]:
    """Return mosaicml-streaming's dataset, asked for one sample after another: faster than its own iteration."""
    streaming = import_streaming()

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        streaming.base.util.clean_stale_shared_memory()
        table = streaming.StreamingDataset(local=str(data / "mds"), shuffle=True, batch_size=rows)
        for chosen in random_rows(len(table), rows):
            tokens = np.stack([table[row]["tokens"] for row in chosen.tolist()]).astype(np.int64)
            yield tokens[:, :-1], tokens[:, 1:]

    return batches


def write_mosaicml(data: Path, seq_len: int) -> None:
    """Write rows of fixed length for mosaicml-streaming."""
    streaming = import_streaming()
    with streaming.MDSWriter(out=str(data / "mds"), columns={"tokens": f"ndarray:uint16:{seq_len + 1}"}) as out:
        for block in row_blocks(data, seq_len):
            for row in block:
                out.write({"tokens": np.ascontiguousarray(row)})


def import_streaming() -> Any:
    """Import mosaicml-streaming; its readers of images, which are not used, want torchvision."""
    import transformers.feature_extraction_utils  # noqa: F401 - transformers itself is to see that there is none

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = MagicMock()
    sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    import streaming

    return streaming


def litdata_tokens() -> Callable[..., Batches]:
    """Return litdata's StreamingDataset and its loader, in this process."""
    import litdata

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        items = litdata.TokensLoader(block_size=seq_len + 1)
        table = litdata.StreamingDataset(str(data / "litdata"), item_loader=items, shuffle=True, drop_last=True)
        while True:
            for batch in litdata.StreamingDataLoader(table, batch_size=rows, num_workers=0, drop_last=True):
                tokens = batch.long()
                yield tokens[:, :-1], tokens[:, 1:]

    return batches


def write_litdata(data: Path, seq_len: int) -> None:
    """Write the documents for litdata."""
    import litdata

    litdata.optimize(
        fn=documents_of,
        inputs=[str(data)],
        output_dir=str(data / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
        item_loader=litdata.TokensLoader(),
    )


def documents_of(data: str) -> Iterator[Any]:
    """Yield the documents as tensors."""
    import torch

    flat = np.fromfile(f"{data}/flat.bin", np.uint16)
    for document in np.split(flat, np.cumsum(np.load(f"{data}/lengths.npy"))[:-1]):
        yield torch.from_numpy(document)


def megatron() -> Callable[..., Batches]:
    """Return Megatron-LM's GPTDataset, with no index cached yet."""
    gpt, indexed, utils = import_megatron()
    shutil.rmtree(Path(sys.argv[2]) / "megatron", ignore_errors=True)  # the indices of an earlier run

    def batches(data: Path, seq_len: int, rows: int) -> Batches:
        tokenizer = MagicMock(eod=END, pad=VOCABULARY, vocab_size=VOCABULARY, unique_identifiers={"name": "gpt2"})
        config = gpt.GPTDatasetConfig(
            random_seed=0,
            sequence_length=seq_len,
            blend=([str(data / "megatron")], None),
            split="1,0,0",
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = indexed.IndexedDataset(str(data / "megatron"))
        table = gpt.GPTDataset(
            documents,
            str(data / "megatron"),
            np.arange(len(documents), dtype=np.int32),
            None,
            utils.Split.train,
            config,
        )
        order = iter(range(10**12))
        while True:
            samples = [table[next(order) % len(table)] for _ in range(rows)]
            yield tuple(np.stack([sample[side].numpy() for sample in samples]) for side in ("tokens", "labels"))

    return batches


def write_megatron(data: Path, seq_len: int) -> None:
    """Compile Megatron's helper and write its index of the documents; its tokens are the flat file."""
    compile_helper(Path(sys.argv[6]) / "megatron/core/datasets")
    _, indexed, _ = import_megatron()
    lengths = np.load(data / "lengths.npy")
    (data / "megatron.bin").hardlink_to(data / "flat.bin")
    with indexed._IndexWriter(str(data / "megatron.idx"), np.uint16) as writer:
        writer.write(lengths.tolist(), None, list(range(len(lengths) + 1)))


def compile_helper(folder: Path) -> None:
    """Compile as Megatron's Makefile does, but for this interpreter instead of the first on the path."""
    import pybind11

    out = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    flags = ["-O3", "-Wall", "-shared", "-std=c++17", "-fPIC"]
    subprocess.run(["c++", *flags, *includes, str(folder / "helpers.cpp"), "-o", str(out)], check=True)


def import_megatron() -> tuple[Any, Any, Any]:
    """Import Megatron's datasets; the tree wants triton, which is replaced by nothing."""
    from no_triton import Nothing

    sys.meta_path.insert(0, Nothing())
    sys.path.insert(0, sys.argv[6])
    from megatron.core.datasets import gpt_dataset, indexed_dataset, utils

    return gpt_dataset, indexed_dataset, utils


OPEN: dict[str, Callable[[], Callable[..., Batches]]] = {
    "gather": bare_gather,
    "fixed": bare_fixed,
    "index": bare_index,
    "slices": bare_slices,
    "ours": ours("contiguous", documents=False),
    "ours_documents": ours("contiguous", documents=True),
    "ours_best_fit": ours("best_fit", documents=True),
    "datasets": datasets_rows,
    "mosaicml": mosaicml,
    "litdata": litdata_tokens,
    "megatron": megatron,
}
PREPARE: dict[str, Callable[[Path, int], None]] = {
    "datasets": write_datasets,
    "mosaicml": write_mosaicml,
    "litdata": write_litdata,
    "megatron": write_megatron,
}

if __name__ == "__main__":
    main()
