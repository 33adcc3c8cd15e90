"""What stages read of a model that another one made: its settings, its weights and whether a tokenizer is its own.

A model is an artifact of ours, or a directory in Hugging Face's layout that was adopted (see `stages.imported`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.models.config import AnyModel, Decoder, Encoder, EncoderDecoder
from pipeline.models.files import CONFIG_FILE, is_theirs, read_config
from pipeline.stage import Stage
from pipeline.text.tokenizers import TOKENIZER, Tokenizer, load

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.transformer import Transformer

FOR_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # what the ids of a text depend on


def load_language_model(source: Artifact) -> "Transformer":
    """Return the model of an artifact in the precision of its files, once each was read against its checksum.

    Raises:
        ArtifactError: If a file is damaged, or it is a classifier, or a model that our settings cannot describe.
    """
    model, weights = open_language_model(source)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict(dict(weights), assign=True)
    return model.eval()


def open_language_model(source: Artifact) -> "tuple[Transformer, Mapping[str, Tensor]]":
    """Return the model of an artifact and its weights, once each file was read against its checksum.

    If it is one of ours, the model is on the device "meta", and weights are read when they are asked for.

    Raises:
        ArtifactError: If a file is damaged, or it is a classifier, or a model that our settings cannot describe.
    """
    from pipeline.models.saved import open_model
    from pipeline.models.transformer import Transformer

    for name in source.names:
        source.file(name)
    if is_theirs(source.path):
        from pipeline.models.hf.load import import_hf

        theirs = import_hf(source.path)
        return theirs, theirs.state_dict()
    model, weights = open_model(source.path)
    if not isinstance(model, Transformer):
        raise ArtifactError(f"{source.path}: wanted a language model, found a classifier")
    return model, weights


def model_settings(source: Artifact) -> AnyModel:
    """Return the settings of the model of an artifact, without its weights and without torch.

    Raises:
        ArtifactError: If its `config.json` is damaged, or a model that our settings cannot describe.
    """
    source.proven_file(CONFIG_FILE)
    if is_theirs(source.path):
        from pipeline.models.hf.config import read_hf_config

        return read_hf_config(source.path)
    return read_config(source.path).model


def planned_model(made_by: Stage) -> AnyModel | None:
    """Return the settings of the model that a stage makes or stands for, where its own settings say them."""
    model = getattr(made_by, "planned_model", None) or getattr(made_by, "model", None)
    return model if isinstance(model, Decoder | Encoder | EncoderDecoder) else None


def check_tokenizer(wanted: Artifact, tokens: Artifact, *, may_grow: bool = False) -> None:
    """Refuse tokens that were not made with the tokenizer of another artifact.

    The files may differ where the ids of texts do not: in their formatting, in what is put around a text, and in
    tokens that `import_tokenizer` was told of beside those that the file had.

    Args:
        may_grow: Whether such tokens may have ids that the model of `wanted` has no rows for.

    Raises:
        ArtifactError: If the tokens are of another tokenizer.
    """
    if wanted.manifest.files.get(TOKENIZER) == tokens.manifest.files.get(TOKENIZER):
        return
    theirs, ours = load(wanted.file(TOKENIZER)), load(tokens.file(TOKENIZER))
    rows = wanted.stats["vocab_size"]  # a tokenizer of theirs may have special tokens beyond, which no text has
    has_rows = ours.vocab_size <= max(rows, theirs.vocab_size) and tokens.stats["end_of_text_id"] < rows
    if not (may_grow or has_rows) or not _agree(theirs, ours):
        raise ArtifactError(
            f"{tokens.place}: its tokenizer (vocabulary of {tokens.stats['vocab_size']}) is not the one of "
            f"{wanted.place} (vocabulary of {wanted.stats['vocab_size']}); tokenize with that one"
        )


def _agree(theirs: Tokenizer, ours: Tokenizer) -> bool:
    """Return whether a tokenizer gives the ids that another one gives once it is told of the same special tokens."""
    try:
        theirs.extend(list(ours.special_tokens), list(ours.added_tokens))
    except ArtifactError:
        return False
    one, other = theirs.data, ours.data
    return all(one.get(name) == other.get(name) for name in FOR_IDS)
