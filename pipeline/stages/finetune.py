"""Fine-tuning a pretrained model to sort texts into classes, against the same model from random weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.models.config import AnyModel
from pipeline.parallel.engine import Precision
from pipeline.settings import Input, Source
from pipeline.stage import CHECKPOINTS, Context, Run, Stage, Stats
from pipeline.stages.engine_checks import check_engine
from pipeline.stages.loading import model_settings, open_language_model, planned_model
from pipeline.stages.preparing import give_weights
from pipeline.stages.writing import write_model
from pipeline.text.tokenizers import TOKENIZER
from pipeline.training.guard import Guard
from pipeline.training.memory import state_bytes
from pipeline.training.optim import AdamW, AnyOptimizer
from pipeline.training.schedule import AnySchedule, Cosine

if TYPE_CHECKING:
    import torch

    from pipeline.models.classifier import Classifier
    from pipeline.parallel.mesh import BatchShape, Mesh
    from pipeline.training.step import Batch
    from pipeline.training.trainee import Trained


class FinetuneGuard(Guard):
    """The guard of a fine-tuning.

    One example that is wrong for sure weighs much in a batch of few that are learned already, so that only a loss of
    several nats more than before counts as wrong.
    """

    threshold: float = Field(default=200.0, gt=0)


class Finetune(Stage):
    """Trains a classifier on labelled texts, from pretrained weights, and as a baseline from random ones.

    It reads the mean of what a decoder, an encoder or an encoder-decoder's encoder knows at each token.

    Attributes:
        model: What was pretrained: an artifact, or a local directory in Hugging Face's layout.
        data: JSONL file of rows with a text, a label and a split (train, valid or test).
        trunk: "full" trains all weights; "frozen" only the classifier on top (feature extraction).
        baseline: Train the same model from random weights too (then always all weights).
        seq_len: Tokens of a text that are read; what is longer is cut.
        batch_examples: Texts of one optimizer step, over all ranks.
        epochs: Passes over the training texts.
        guard: What is done about steps that go wrong.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "model"
    ranks: ClassVar[Literal["one", "units", "group"]] = "group"

    kind: Literal["finetune"] = "finetune"
    model: Annotated[str, Input("model")]
    data: Annotated[str, Source()]
    text_field: str = "text"
    label_field: str = "label"
    split_field: str = "split"
    trunk: Literal["full", "frozen"] = "full"
    baseline: bool = True
    seq_len: int = Field(default=128, ge=1)
    batch_examples: int = Field(default=32, ge=1)
    epochs: int = Field(default=3, ge=1)
    optimizer: AnyOptimizer = AdamW(lr=5e-4)
    schedule: AnySchedule = Cosine(warmup_fraction=0.1)
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Precision = "fp32"
    guard: FinetuneGuard = FinetuneGuard()
    seed: int = Field(default=0, ge=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse texts longer than the model's sequences, and batches that do not divide."""
        yield from refuse_classifier(upstream)
        yield from self.optimizer.check(run)
        yield from self._check_model(planned_model(upstream["model"]), run)

    def check_inputs(self, inputs: Mapping[str, Artifact], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse the same of a model that only its own files describe."""
        if "model" in inputs:
            yield from self._check_model(model_settings(inputs["model"]), run)

    def _check_model(self, model: AnyModel | None, run: Run) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the model, as far as it is known, and with how it is trained."""
        if model is not None and self.seq_len > model.max_seq_len:
            yield "seq_len", f"{self.seq_len} is longer than the model's max_seq_len of {model.max_seq_len}"
        yield from check_engine(self.batch_examples, "batch_examples", self, run, model, [self.seq_len])

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Weights once, and weights with two moments for every checkpoint of both trainings; the input is the model."""
        return input_bytes * (1 + 4 * (run.checkpoints.keep + 1) * (2 if self.baseline else 1))

    def memory_bytes(self, upstream: Mapping[str, Stage], run: Run) -> int | None:
        """Weights, gradients and what the optimizer keeps, without activations: see `state_bytes`.

        Not known where no settings say how large the model is. With `trunk` "frozen" only the weights count.
        """
        model = planned_model(upstream["model"]) if "model" in upstream else None
        if model is None or model.vocab_size is None:
            return None
        if self.trunk == "frozen" and not self.baseline:
            return model.num_params() * (4 if self.precision == "fp32" else 2) // run.parallel.tensor
        return state_bytes(model.num_params(), self.optimizer.state_copies, self.precision, run)

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how many texts were learned from, and the test accuracy beside the baseline's."""
        result = f"test accuracy {stats['test_accuracy']:.3f}"
        if "baseline.test_accuracy" in stats:
            result += f", from random weights {stats['baseline.test_accuracy']:.3f}"
        return f"{stats['train_examples']:,} examples, {stats['steps']:,} steps", result

    def run(self, ctx: Context) -> None:
        """Train both classifiers one after the other; rank 0 writes the fine-tuned one."""
        from pipeline.parallel.gathering import full_weights
        from pipeline.training.loop import joined

        ctx.refuse(self.check_inputs(ctx.inputs, ctx.settings))
        examples = self._read(ctx)
        steps = -(-len(examples.train) * self.epochs // self.batch_examples)
        with joined(ctx) as mesh:
            scores: dict[str, float] = {}
            if self.baseline:
                trained = self._train(ctx, mesh, examples, steps, pretrained=False)
                scores |= {f"baseline.{name}": value for name, value in self._test(trained, examples).items()}
                trained.engine.destroy()
            trained = self._train(ctx, mesh, examples, steps, pretrained=True)
            scores |= self._test(trained, examples)
            with trained.evaluated():
                weights = full_weights(trained.engine, mesh)
        if ctx.rank == 0:
            self._write(ctx, trained.engine.module, weights)
            ctx.output.stats |= {
                **scores,
                "steps": steps,
                "train_examples": len(examples.train),
                "valid_examples": len(examples.valid),
                "test_examples": len(examples.test),
                "classes": len(examples.labels),
                "majority.test_accuracy": examples.majority_accuracy(),
            }

    def _read(self, ctx: Context) -> "Examples":
        from pipeline.text.labelled import read_labelled
        from pipeline.text.tokenizers import load

        rows = read_labelled(self.data, self.text_field, self.label_field, self.split_field, f"{ctx.task}.data")
        tokenizer = load(ctx.inputs["model"].file(TOKENIZER))
        labels = sorted({row.label for row in rows["train"]})
        known = {label: number for number, label in enumerate(labels)}
        splits = {}
        for split, found in rows.items():
            unknown = next((row.label for row in found if row.label not in known), None)
            if unknown is not None:
                raise ArtifactError(f"{ctx.task}.data: label '{unknown}' of split '{split}' is not in split 'train'")
            splits[split] = [(tokenizer.encode(row.text)[: self.seq_len], known[row.label]) for row in found]
        return Examples(splits["train"], splits["valid"], splits["test"], labels)

    def _train(self, ctx: Context, mesh: "Mesh", examples: "Examples", steps: int, pretrained: bool) -> "Trained":
        from pipeline.models.files import CONFIG_FILE, describe_model
        from pipeline.models.initial import lr_scales
        from pipeline.training.loop import train
        from pipeline.training.trainee import Recipe, Trainee

        model = self._build(ctx, mesh, examples.labels, pretrained)
        config = model.trunk.config
        name = "finetune" if pretrained else "baseline"
        recipe = Recipe.of(self, steps=steps, batch_rows=self.batch_examples, validate_every_steps=None)
        trainee = Trainee(
            model=model,
            feed=lambda step, rank, shape: self._feed(examples, step, rank, shape),
            validate=lambda module: _scores(module, examples.valid, examples.labels, "valid"),
            checkpoints=ctx.directory / CHECKPOINTS / name,
            lr_scales=lr_scales(model, config),
            name=name,
            files={
                CONFIG_FILE: describe_model(config, examples.labels),
                TOKENIZER: ctx.inputs["model"].file(TOKENIZER),
            },
            about={"precision": self.precision},
            num_params=config.num_params() + len(examples.labels) * (config.d_model + 1),
            label=f"{name} ({2 if pretrained else 1} of 2) " if self.baseline else "",
            first_step=steps if pretrained and self.baseline else 0,
        )
        return train(ctx, mesh, recipe, trainee)

    def _build(self, ctx: Context, mesh: "Mesh", labels: Sequence[str], pretrained: bool) -> "Classifier":
        """Return this rank's part of a classifier with its first weights."""
        import torch

        from pipeline.models.classifier import Classifier
        from pipeline.models.initial import first_weight
        from pipeline.models.transformer import Transformer

        source, found = open_language_model(ctx.inputs["model"])
        config = source.config
        with torch.device("meta"):
            model = Classifier(Transformer(config), len(labels), labels)
        if pretrained:
            model.trunk.requires_grad_(self.trunk == "full")

        def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            inside = name.removeprefix("trunk.")
            if pretrained and inside != name:
                return found[inside].to(torch.float32, copy=True)  # which may be the file itself, in memory
            return first_weight(config, name, shape, self.seed)

        give_weights(model, value, self.precision, ctx, mesh)
        return model

    def _feed(self, examples: "Examples", step: int, rank: int, shape: "BatchShape") -> "Batch":
        from pipeline.text.shuffle import permute
        from pipeline.training.step import Batch

        size, first = len(examples.train), (step - 1) * self.batch_examples
        places = [divmod(place, size) for place in range(first, first + self.batch_examples)]
        mine = [
            [examples.train[permute(place, size, self.seed, epoch)] for epoch, place in places[rows]]
            for rows in shape.microbatches(rank)
        ]
        return Batch(
            [_pad(rows) for rows in mine],
            weights={"labels": sum(map(len, mine))},
            tokens=sum(len(ids) for rows in mine for ids, _ in rows),
        )

    def _test(self, trained: "Trained", examples: "Examples") -> dict[str, float]:
        with trained.evaluated() as module:
            return {**trained.validation, **_scores(module, examples.test, examples.labels, "test")}

    def _write(self, ctx: Context, model: "Classifier", weights: "Mapping[str, torch.Tensor]") -> None:
        from pipeline.models.saved import save_model

        tokenizer = ctx.inputs["model"].file(TOKENIZER)
        write_model(ctx, tokenizer, lambda directory: save_model(directory, model, weights))


Example = tuple[list[int], int]  # token ids of a text, number of its label


@dataclass(frozen=True)
class Examples:
    """The labelled texts as token ids, by split."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    labels: list[str]

    def majority_accuracy(self) -> float:
        """Return the test accuracy of always saying the commonest training label."""
        counts = [0] * len(self.labels)
        for _, label in self.train:
            counts[label] += 1
        return sum(label == counts.index(max(counts)) for _, label in self.test) / len(self.test)


def _pad(rows: Sequence[Example]) -> dict[str, "torch.Tensor"]:
    """Return what a classifier is called with: ids and mask [rows, longest], and labels [rows]."""
    import torch

    longest = max(1, *(len(ids) for ids, _ in rows))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (ids, _) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, : len(ids)] = True
    return {"ids": ids_BT, "mask": mask_BT, "labels": torch.tensor([label for _, label in rows])}


def _scores(module: Any, examples: list[Example], labels: Sequence[str], split: str) -> dict[str, float]:
    """Return loss, accuracy and macro-F1 on a split; every rank scores all of it, so none has to wait for another."""
    import torch

    from pipeline.training.metrics import accuracy, macro_f1

    was_training, device = module.training, next(module.parameters()).device
    module.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))  # little padding
    predicted, wanted, nats = [], [], 0.0
    with torch.inference_mode():
        for first in range(0, len(order), 64):
            fed = {name: t.to(device) for name, t in _pad([examples[i] for i in order[first : first + 64]]).items()}
            truth = fed.pop("labels")
            logits = module(**fed)
            nats += torch.nn.functional.cross_entropy(logits.float(), truth, reduction="sum").item()
            predicted += logits.argmax(-1).tolist()
            wanted += truth.tolist()
    module.train(was_training)
    return {
        f"{split}_loss": nats / len(wanted),
        f"{split}_accuracy": accuracy(predicted, wanted),
        f"{split}_macro_f1": macro_f1(predicted, wanted, len(labels)),
    }


def refuse_classifier(upstream: Mapping[str, Stage], field: str = "model") -> Iterator[tuple[str, str]]:
    """Yield the problem of an input that must be a language model, but is a fine-tuned classifier."""
    if isinstance(upstream.get(field), Finetune):
        yield field, "wanted a language model, but fine-tuning makes a classifier"
