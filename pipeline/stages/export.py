"""Export of a language model to the Hugging Face layout, checked by loading it back."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.models.hf.classes import unexportable
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.stages.finetune import refuse_classifier
from pipeline.stages.loading import load_language_model, model_settings, planned_model
from pipeline.text.tokenizers import TOKENIZER


class Export(Stage):
    """Writes what transformers' `from_pretrained` loads, and compares its logits with ours.

    Heads that predict further tokens are for training alone, and are left out.

    Attributes:
        max_logit_difference: Largest difference in fp32 that passes.
    """

    version: ClassVar[int] = 3
    produces: ClassVar[str] = "export"
    result: ClassVar[str | None] = ""

    kind: Literal["export"] = "export"
    model: Annotated[str, Input("model")]
    max_logit_difference: float = Field(default=1e-4, gt=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse models that no layout of transformers can express."""
        yield from refuse_classifier(upstream)
        model = planned_model(upstream["model"])
        if model is not None and (reason := unexportable(model)):
            yield "model", reason

    def check_inputs(self, inputs: Mapping[str, Artifact], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse the same of a model that only its own files describe."""
        if "model" in inputs and (reason := unexportable(model_settings(inputs["model"]))):
            yield "model", reason

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the number of parameters, and the largest logit difference."""
        difference = stats["max_logit_difference"]
        return f"{stats['parameters'] / 1e6:.1f} M parameters", f"largest logit difference {difference:.1e}"

    def run(self, ctx: Context) -> None:
        """Write the files, load them with transformers, and compare."""
        import torch

        from pipeline.models.hf.export import export_hf

        ctx.refuse(self.check_inputs(ctx.inputs, ctx.settings))
        source = ctx.inputs["model"]
        model = load_language_model(source)
        if ahead := getattr(model.config, "predict_ahead", 0):
            ctx.log(f"the {ahead} heads that predict further tokens are left out: no layout has them")
        with ctx.scratch() as scratch:
            end_of_text = source.stats["end_of_text_id"]
            shape, chance = (4, min(64, model.config.max_seq_len)), torch.Generator().manual_seed(0)
            ids_BT = torch.randint(model.config.real_vocab_size, shape, generator=chance)
            difference = export_hf(
                model, source.file(TOKENIZER), scratch, ids_BT, eos_id=end_of_text, bos_id=end_of_text
            )
            if not difference <= self.max_logit_difference:
                raise ArtifactError(
                    f"{ctx.task}: the exported model's logits differ from ours by {difference:.2e}, more than "
                    f"{self.max_logit_difference:.0e}; nothing was exported"
                )
            for path in sorted(scratch.iterdir()):
                with ctx.output.write(path.name) as final:
                    path.rename(final)
        ctx.output.stats |= {"max_logit_difference": difference, "parameters": model.config.num_params()}
