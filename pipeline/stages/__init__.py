"""All stages: `AnyStage` is what YAML picks by `kind:`. Importing them imports no heavy library."""

from typing import Annotated

from pydantic import Field

from pipeline.artifact import Manifest
from pipeline.settings import choices_of
from pipeline.stages.clean import Clean
from pipeline.stages.dedup import Dedup
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.export import Export
from pipeline.stages.finetune import Finetune
from pipeline.stages.generate import Generate
from pipeline.stages.import_tokenizer import ImportTokenizer
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.prove import Prove
from pipeline.stages.report import Report
from pipeline.stages.shard import Shard
from pipeline.stages.tokenize import Tokenize
from pipeline.stages.train_tokenizer import TrainTokenizer

AnyStage = Annotated[
    Shard
    | Clean
    | Dedup
    | TrainTokenizer
    | ImportTokenizer
    | Tokenize
    | Pretrain
    | Finetune
    | Evaluate
    | Generate
    | Export
    | Prove
    | Report,
    Field(discriminator="kind"),
]


def headline(manifest: Manifest) -> tuple[str, str]:
    """Return how much a task made and the number that matters; nothing if its numbers are those of another version."""
    stage = choices_of(AnyStage).get(manifest.stage.get("kind", ""))
    try:
        return stage.headline(manifest.stats) if stage else ("", "")
    except KeyError:
        return "", ""
