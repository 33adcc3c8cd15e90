import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken

from pipeline.errors import ArtifactError, ConfigError
from pipeline.plan import identify_sources
from pipeline.settings import decode
from pipeline.stage import Run
from pipeline.stages.import_tokenizer import ImportTokenizer
from pipeline.text.hostile import HOSTILE
from pipeline.text.ranks import recover_merges, shown
from pipeline.text.tokenizer_files import PATTERNS, Gpt2
from pipeline.text.tokenizers import BYTE_CHARACTERS, byte_level, from_json, load
from pipeline.text.trainers import Job, Unigram

DATA = Path(__file__).parents[1] / "data"
MERGES = DATA / "gpt2/vocab.bpe"
SCRIPTS = json.loads((DATA / "scripts.json").read_text("utf-8"))
TEXTS = [json.loads(line)["text"] for line in (DATA / "mini.jsonl").read_text().splitlines()]
TEXTS += [*HOSTILE, *(sentence for script in SCRIPTS.values() for sentence in script)]
TEXTS += [random.Random(seed).randbytes(300).decode("utf-8", "replace") for seed in range(100)]
END = "<|endoftext|>"
# As tiktoken writes them: https://github.com/openai/tiktoken, tiktoken_ext/openai_public.py
TIKTOKEN_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": PATTERNS["o200k"],
}


def tokenizer_stage(vocabulary: dict, **settings) -> ImportTokenizer:
    return decode(ImportTokenizer, {"kind": "import_tokenizer", "vocabulary": vocabulary, **settings})


@pytest.fixture
def bring(tmp_path, run_stage):
    """Give a function that imports a tokenizer and returns (it, the numbers in its manifest)."""

    def run(vocabulary: dict, **settings):
        made = run_stage(tokenizer_stage(vocabulary, **settings), {}, tmp_path / f"made{len(list(tmp_path.iterdir()))}")
        return load(made.file("tokenizer.json")), made.stats

    return run


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory) -> Path:
    """Give a directory with GPT-2's tokenizer in every format, all derived from its merges."""
    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = Gpt2(path=str(MERGES)).read()
    vocab = tokenizer.data["model"]["vocab"]
    value = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    lines = [
        base64.b64encode(bytes(value[character] for character in token)).decode() + f" {number}"
        for token, number in sorted(vocab.items(), key=lambda item: item[1])
    ]
    (directory / "gpt2.tiktoken").write_text("\n".join(lines) + "\n")
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = directory / vocab_name.removesuffix(".json")
        folder.mkdir()
        (folder / vocab_name).write_text(json.dumps(vocab | {END: 50256}))
        (folder / merges_name).write_bytes(MERGES.read_bytes())
    (directory / "hub").mkdir()
    tokenizer.save(directory / "hub/tokenizer.json")
    return directory


def ranks(path: Path) -> dict[bytes, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in rows}


@pytest.mark.slow
def test_every_format_of_gpt2_gives_its_ids(bring, gpt2_files):
    vocabularies = [
        {"kind": "gpt2", "path": str(MERGES)},
        {"kind": "gpt2", "path": str(gpt2_files / "vocab")},
        {"kind": "gpt2", "path": str(gpt2_files / "encoder")},
        {"kind": "tiktoken", "path": str(gpt2_files / "gpt2.tiktoken"), "pattern": "gpt2"},
        {"kind": "huggingface", "path": str(gpt2_files / "hub")},
        {"kind": "huggingface", "path": str(gpt2_files / "hub/tokenizer.json")},
    ]
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=TIKTOKEN_PATTERNS["gpt2"],
        mergeable_ranks=ranks(gpt2_files / "gpt2.tiktoken"),
        special_tokens={END: 50256},
    )
    wanted = theirs.encode_ordinary_batch(TEXTS)
    for vocabulary in vocabularies:
        tokenizer, stats = bring(vocabulary, special_tokens=[END])
        assert stats == {"vocab_size": 50257, "end_of_text": END, f"special.{END}": 50256}
        assert tokenizer.encode("Hello world!") == [15496, 995, 0]
        assert tokenizer.encode("我爱人工智能")[:5] == [22755, 239, 163, 230, 109]
        assert [tokenizer.encode(text) for text in TEXTS] == wanted
        assert all(tokenizer.decode(ids) == text for ids, text in zip(wanted, TEXTS, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", TIKTOKEN_PATTERNS)
def test_ranks_give_the_ids_of_tiktoken_with_every_pattern(bring, gpt2_files, pattern):
    path = gpt2_files / "gpt2.tiktoken"
    theirs = tiktoken.Encoding(
        "x", pat_str=TIKTOKEN_PATTERNS[pattern], mergeable_ranks=ranks(path), special_tokens={END: 50300}
    )
    vocabulary = {"kind": "tiktoken", "path": str(path), "pattern": pattern, "special_ids": {END: 50300}}
    tokenizer, stats = bring(vocabulary, special_tokens=["<|im_start|>"])
    assert [tokenizer.encode(text) for text in TEXTS] == theirs.encode_ordinary_batch(TEXTS)
    assert (stats[f"special.{END}"], stats["special.<|im_start|>"]) == (50300, 50301)
    own = tokenizer_stage({**vocabulary, "pattern": TIKTOKEN_PATTERNS["gpt2"]}).vocabulary.read()
    assert own.encode("it's 12345") == Gpt2(path=str(MERGES)).read().encode("it's 12345")


@pytest.mark.parametrize("seed", range(40))
def test_ranks_that_no_merges_make_give_the_ids_of_tiktoken_all_the_same(seed):
    noise = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < 300:
        parts = [token for token in tokens if set(token) <= set(b"abc")]
        made_of_two = noise.choice(parts) + noise.choice(parts)
        token = made_of_two if seed % 2 else bytes(noise.choices(b"abc", k=noise.randrange(2, 6)))
        tokens += [] if token in tokens else [token]
    order = {token: rank for rank, token in enumerate(tokens)}
    merges, regular = recover_merges(order)
    ours = byte_level(
        {shown(token): rank for token, rank in order.items()},
        [(shown(a), shown(b)) for a, b in merges],
        r"[a-c]+|.",
        ignore_merges=not regular,
    )
    theirs = tiktoken.Encoding("x", pat_str=r"[a-c]+|.", mergeable_ranks=order, special_tokens={})
    texts = ["".join(noise.choices("abc", k=noise.randrange(1, 25))) for _ in range(200)]
    assert [ours.encode(text) for text in texts] == theirs.encode_ordinary_batch(texts)
    assert seed % 2 or not regular


def test_bert_gives_the_ids_of_transformers(bring, tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,!'-中", "the", "whale"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["##ing", "##ed", "cafe", "sea"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/vocab.txt").write_text("\n".join(words) + "\n")
    theirs = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, do_lower_case=True)
    texts = ["The Whale, seeing the sea!", "Café  CAFÉ\tnaïve", "中文 the", "Ωmega", "", *TEXTS[:20]]
    vocabulary = {"kind": "bert", "path": str(tmp_path / "bert")}
    tokenizer, stats = bring(vocabulary, end_of_text="[SEP]")
    assert [tokenizer.encode(text) for text in texts] == [theirs(t, add_special_tokens=False).input_ids for t in texts]
    assert stats["end_of_text"] == "[SEP]"
    assert {name: stats[f"special.{name}"] for name in words[:5]} == {w: n for n, w in enumerate(words[:5])}
    assert stats["special.[UNK]"] in tokenizer.encode("Ωmega")
    assert not {0, 2, 3, 4} & set(tokenizer.encode("[SEP] a[CLS]b [PAD]"))
    cased, _ = bring({**vocabulary, "lowercase": False}, end_of_text="[SEP]")
    assert cased.encode("The") == [1]


def test_plain_bytes_need_no_file(bring):
    tokenizer, stats = bring({"kind": "bytes"}, special_tokens=[END, "<|im_start|>"], added_tokens=["<tool>"])
    assert stats == {"vocab_size": 259, "end_of_text": END, f"special.{END}": 256, "special.<|im_start|>": 257}
    assert tokenizer.encode("é<tool>\n") == [0xC3, 0xA9, 258, 10]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)


def test_a_foreign_unigram_model_cannot_be_made_to_forge_its_end_of_text(bring, tmp_path):
    made, _ = Unigram().train(Job(lambda: TEXTS[:5], 400, [END, "</s>", "<unk>"], [], tmp_path))
    data = made.data
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] == 0]
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="this tokenizer cannot encode every text"):
        bring({"kind": "huggingface", "path": str(path)}, end_of_text="</s>")
    data["model"]["unk_id"] = 2
    path.write_text(json.dumps(data))
    tokenizer, stats = bring({"kind": "huggingface", "path": str(path)}, end_of_text="</s>")
    assert stats["special.</s>"] == 1
    assert 1 in from_json(json.dumps(data)).encode("a</s>b")
    assert 1 not in tokenizer.encode("a</s>b </s></s>")


def test_the_end_of_text_must_be_there(bring, gpt2_files):
    vocabulary = {"kind": "huggingface", "path": str(gpt2_files / "hub")}
    with pytest.raises(ArtifactError, match=r"end_of_text: the tokenizer has no token '<\|eot\|>'.*special_tokens"):
        bring(vocabulary, end_of_text="<|eot|>")
    tokenizer, stats = bring(vocabulary, end_of_text="<|eot|>", special_tokens=["<|eot|>"])
    assert stats["special.<|eot|>"] == tokenizer.vocab_size - 1 == 50256
    with pytest.raises(ArtifactError, match="ordinary text is encoded to the special token 'e'"):
        bring(vocabulary, end_of_text="e")


def test_what_the_settings_alone_show_is_refused_before_the_start(tmp_path):
    run, vocabulary = Run(kind="local"), {"kind": "bytes"}
    assert list(tokenizer_stage(vocabulary, special_tokens=[END]).check({}, run)) == []
    assert list(tokenizer_stage(vocabulary).check({}, run)) == [
        ("end_of_text", f"this vocabulary has no token '{END}'; name it in special_tokens")
    ]
    shared = tokenizer_stage(vocabulary, special_tokens=[END, "a"], added_tokens=["a"])
    assert [place for place, _ in shared.check({}, run)] == ["added_tokens"]
    ordinary = tokenizer_stage({"kind": "gpt2", "path": str(MERGES)}, added_tokens=[END])
    assert [place for place, _ in ordinary.check({}, run)] == ["end_of_text"]
    fixed = {"kind": "tiktoken", "path": "x", "pattern": "gpt2", "special_ids": {END: 7}}
    assert list(tokenizer_stage(fixed).check({}, run)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": {"kind": "hugging_face", "path": "x"}}, "no vocabulary is called 'hugging_face'; did you mean"),
        ({"vocabulary": {"kind": "huggingface"}}, r"vocabulary\.path: missing"),
        (
            {"vocabulary": {"kind": "tiktoken", "path": "x", "pattern": "cl100"}},
            "vocabulary.pattern: no pattern is called 'cl100'; did you mean 'cl100k'",
        ),
        (
            {"vocabulary": {"kind": "tiktoken", "path": "x", "pattern": "gpt2", "special_ids": {"a": -1}}},
            "special_ids.a: wanted greater than or equal to 0",
        ),
        (
            {"vocabulary": {"kind": "tiktoken", "path": "x", "pattern": "gpt2", "special_ids": {"a": 2**32 - 1}}},
            "special_ids.a: wanted less than 16777216",
        ),
        ({"vocabulary": {"kind": "bytes"}, "special_tokens": ["a", "a"]}, "special_tokens: wanted different tokens"),
        ({"vocabulary": {"kind": "bytes"}, "added_tokens": [""]}, "added_tokens: wanted different tokens"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        decode(ImportTokenizer, {"kind": "import_tokenizer", **settings})


def line(token: bytes, rank: int) -> str:
    return f"{base64.b64encode(token).decode()} {rank}\n"


BYTES = "".join(line(bytes([byte]), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "ranks: this file is empty; wanted the vocabulary of a tokenizer"),
        (BYTES + "no base64! 256\n", "ranks, line 257: wanted a token in base64 and its rank, found 'no base64! 256'"),
        (BYTES + "YWI=\n", "ranks, line 257: wanted a token in base64 and its rank, found 'YWI='"),
        (BYTES + "YWI= x\n", "ranks, line 257: wanted a token in base64 and its rank"),
        (BYTES + line(b"ab", 257), "ranks: no token has rank 256, though 257 is the last"),
        (BYTES + line(b"ab", 255), "line 257: the token b'ab' or the rank 255 is there twice"),
        (BYTES + line(b"a", 256), "line 257: the token b'a' or the rank 256 is there twice"),
        ("".join(line(bytes([n]), n) for n in range(9)), "ranks: 247 of the 256 bytes are no tokens, the first 0x09"),
        (BYTES[: len(BYTES) // 2], "ranks"),
    ],
)
def test_bad_ranks_are_refused(bring, tmp_path, content, message):
    (tmp_path / "ranks").write_text(content)
    with pytest.raises(ArtifactError) as error:
        bring({"kind": "tiktoken", "path": str(tmp_path / "ranks"), "pattern": "gpt2"}, special_tokens=[END])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gap_that_a_special_token_fills_is_none(bring, tmp_path):
    (tmp_path / "ranks").write_text(BYTES + line(b"ab", 257))
    vocabulary = {"kind": "tiktoken", "path": str(tmp_path / "ranks"), "pattern": "gpt2", "special_ids": {END: 256}}
    tokenizer, stats = bring(vocabulary)
    assert (tokenizer.encode("abc"), stats[f"special.{END}"], stats["vocab_size"]) == ([257, 99], 256, 258)
    with pytest.raises(ArtifactError, match=r"special_ids\.<\|endoftext\|>: .*ranks has another token or id for it"):
        bring({**vocabulary, "special_ids": {END: 257, "<|pad|>": 256}})
    with pytest.raises(ArtifactError, match="pattern: not a regular expression"):
        bring({**vocabulary, "pattern": "(a"})


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("huggingface", {"tokenizer.json": '{"version": "1.0", "mo'}, "tokenizer.json: not a tokenizer in the Hugging"),
        ("huggingface", {"tokenizer.json": ""}, "tokenizer.json: not a tokenizer in the Hugging Face format"),
        ("huggingface", {"vocab.txt": "a"}, "this directory has no tokenizer.json; its files are of kind 'bert'"),
        ("huggingface", {"merges.txt": "a b"}, "this directory has no tokenizer.json; its files are of kind 'gpt2'"),
        ("huggingface", {}, "this directory has no tokenizer.json; name another file or directory"),
        ("gpt2", {"merges.txt": "a b"}, "lacks vocab.json with merges.txt or encoder.json with vocab.bpe"),
        ("gpt2", {"vocab.json": '{"a": 0', "merges.txt": "a b"}, "vocab.json: not JSON"),
        ("gpt2", {"vocab.json": "[]", "merges.txt": "a b"}, "vocab.json: wanted a JSON object with a different id"),
        ("gpt2", {"vocab.json": '{"a": 0, "b": 0}', "merges.txt": "a b"}, "vocab.json: wanted a JSON object"),
        ("gpt2", {"vocab.json": '{"!": 0}', "merges.txt": "a b"}, "vocab.json: no token '\"', which merges.txt needs"),
        ("gpt2", {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b c"}, "merges.txt, line 2: wanted two"),
        ("gpt2", {"vocab.json": '{"a": 0}', "merges.txt": "ab c"}, "the merge 'ab c' joins a token that no merge"),
        ("gpt2", {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}, "merges.txt: no merges"),
        ("bert", {"vocab.txt": ""}, "vocab.txt: this file is empty"),
        ("bert", {"vocab.txt": "a\nb\n"}, "vocab.txt: no token '[UNK]'"),
        ("bert", {"vocab.txt": "[UNK]\na\nb\na\n"}, "vocab.txt: the token 'a' is empty or there twice"),
        ("bert", {}, "vocab.txt: no such file or directory"),
    ],
)
def test_bad_files_are_refused(bring, tmp_path, kind, files, message):
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_text(content)
    with pytest.raises(ArtifactError) as error:
        bring({"kind": kind, "path": str(tmp_path / "files")})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_one_of_other_bytes_are_refused(bring, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for kind in ("gpt2", "bert", "tiktoken"):
        vocabulary = {"kind": kind, **({"pattern": "gpt2"} if kind == "tiktoken" else {})}
        with pytest.raises(ArtifactError, match="none: no such file"):
            bring({**vocabulary, "path": str(tmp_path / "none")}, special_tokens=[END])
        with pytest.raises(ArtifactError, match="binary: 'utf-8' codec can't decode"):
            bring({**vocabulary, "path": str(tmp_path / "binary")}, special_tokens=[END])


def test_the_files_are_part_of_the_fingerprint(tmp_path):
    (tmp_path / "merges").write_text("a b")
    stage = tokenizer_stage({"kind": "gpt2", "path": str(tmp_path / "merges")})
    before = identify_sources(stage)
    assert list(before) == ["vocabulary.path"]
    (tmp_path / "merges").write_text("a c")
    assert identify_sources(stage) != before


def test_a_tokenizer_that_draws_lots_is_refused(bring, tmp_path):
    data = byte_level({"a": 0, "b": 1, "ab": 2}, [("a", "b")]).data
    data["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="this tokenizer has BPE dropout, so the ids of a text are random"):
        bring({"kind": "huggingface", "path": str(tmp_path / "tokenizer.json")}, special_tokens=[END])
