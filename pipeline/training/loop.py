"""The training loop, from top to bottom: restore, then for every step feed, reduce, log, validate, save, stop.

Everything that a step does follows from its number: its rows, its learning rate, its random numbers. So a run that
is killed anywhere and started again ends, on the same layout, in the same bits.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from pipeline.artifact import WORK
from pipeline.errors import Preempted, TrainingError
from pipeline.parallel.engine import EngineSettings, build_engine, process_group
from pipeline.parallel.mesh import Mesh, shape_batch
from pipeline.stage import HEARTBEATS, SAVE_FILE, Context
from pipeline.track import METRICS, read_metrics
from pipeline.training.checkpoints.saver import Restored, Saver
from pipeline.training.feed import Feeder
from pipeline.training.guard import Finding, Watch, decide
from pipeline.training.heartbeat import Heart
from pipeline.training.ledger import LEDGER, Event, Ledger
from pipeline.training.step import Batch, Step, seed_step, take_step
from pipeline.training.trainee import Recipe, Trained, Trainee, prepare_layers


@contextmanager
def joined(ctx: Context) -> Iterator[Mesh]:
    """Join the ranks of a training for the time of the block; who keeps the others waiting for too long is named."""
    run = ctx.settings
    timeout_s = max(1.5 * run.stall_timeout_s, run.stall_timeout_s + 30)  # the heartbeat comes first: it says more
    beats = ctx.directory / WORK / HEARTBEATS
    with Heart(beats, ctx.rank, ctx.ranks.world_size, run.stall_timeout_s, ctx.attempt, ctx.leave_reason) as heart:
        ctx.beat = heart.beat
        with process_group(run.parallel.tensor, timedelta(seconds=timeout_s)) as mesh:
            yield mesh


def train(ctx: Context, mesh: Mesh, recipe: Recipe, trainee: Trainee) -> Trained:
    """Train until the last step, from the newest checkpoint if there is one.

    Raises:
        TrainingError: If a step went wrong and the guard does not help, or a checkpoint cannot be written.
        Preempted: When a stop was asked for; the state is saved.
    """
    return Training(ctx, mesh, recipe, trainee).run()


class Training:
    """A training under way, on one rank."""

    def __init__(self, ctx: Context, mesh: Mesh, recipe: Recipe, trainee: Trainee) -> None:
        run, self.ctx, self.mesh, self.recipe, self.trainee = ctx.settings, ctx, mesh, recipe, trainee
        self.shape = shape_batch(recipe.batch_rows, run.microbatch_sequences, mesh.data)
        settings = EngineSettings.of(self.shape, run.parallel, recipe.precision, recipe.clip_norm).simplified()
        prepare_layers(trainee.model, recipe.precision, run.parallel.activation_checkpointing)
        optimizer = recipe.optimizer.build(trainee.model, trainee.lr_scales)
        if recipe.average is not None:
            recipe.average.attach(optimizer)
        self.engine = build_engine(trainee.model, optimizer, settings, mesh)
        self.trained = Trained(self.engine, recipe.average)
        if run.compile:
            self._compile()
        self.saver = Saver(
            self.engine,
            trainee.checkpoints,
            mesh,
            settings.zero,
            run.checkpoints,
            recipe.steps,
            attempt=str(ctx.attempt),
            fence=ctx.check_attempt,
            extras=trainee.files,
            about={**trainee.about, "optimizer": recipe.optimizer.kind},
            log=ctx.log,
            beat=lambda: ctx.beat("save", None),
            took=self._note_saving,
        )
        self.longest_save_s = 0.0
        self.watch = Watch(recipe.guard)
        self.ledger = Ledger(ctx.directory / LEDGER, ctx.rank == 0, trainee.name, ctx.check_attempt)
        self.stop = False

    def run(self) -> Trained:
        """Train until the last step."""
        step = self._restore()
        validated = False
        while step < self.recipe.steps:
            step = self._go_on(step)
            validated = step == self.recipe.steps
        self.saver.finish()
        if not validated:  # an earlier try did all steps but was ended before the end
            self._validate(step)
        self.trained.passed_over = len(self.ledger.skipped)
        return self.trained

    def _compile(self) -> None:
        """Compile the layers before the first step, and note what that costs and brings."""
        from pipeline.training.compiling import compile_blocks

        self.ctx.beat("compile", 0)
        first = self.trainee.feed(1, self.mesh.data_rank, self.shape)
        compiled = compile_blocks(self.engine.module, first.microbatches[0])
        self.ctx.log(f"{self.trainee.label}{compiled.words}")
        if self.ctx.rank == 0:
            self.ctx.output.stats |= {f"{self.trainee.prefix}{name}": n for name, n in compiled.stats.items()}

    def _go_on(self, start: int) -> int:
        """Train from after a step until the end, or until the guard goes back; return the step that is reached."""
        steps = self.recipe.steps
        progress = self.ctx.progress(steps, f"{self.trainee.label}steps", start)
        with Feeder(lambda step: self.trainee.feed(step, self.mesh.data_rank, self.shape), start + 1, steps) as feeder:
            for step in range(start + 1, steps + 1):
                event, numbers = self._do_step(feeder, step)
                if event is not None and event.rolled_back_to is not None:
                    return self._roll_back(event)
                last = step == steps
                if last or (self.recipe.validate_every_steps and step % self.recipe.validate_every_steps == 0):
                    numbers |= self._validate(step)
                if numbers:
                    self._log(step, numbers)
                progress.advance(1, _status(numbers))
                if self.stop or last or (numbers and self.saver.due(step, time.monotonic())):
                    self._save(step, numbers)
                if self.stop and not last:
                    self.saver.finish()
                    raise Preempted(f"{self.ctx.task} after step {step} of {steps}, state saved")
        progress.close()
        return steps

    def _do_step(self, feeder: Feeder[Batch], step: int) -> tuple[Event | None, dict[str, float]]:
        """Feed one batch and update the weights; return what the guard did about it, and the step's numbers."""
        began = time.perf_counter()
        self.ctx.beat("feed", step)
        batch, waited_s = feeder.take()
        if step in self.ledger.skipped:
            self._agree()
            return None, {}
        seed_step(self.recipe.seed, step, self.mesh.data_rank)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step) * group.get("lr_scale", 1.0)
        self.ctx.beat("forward and backward", None)
        done, found = self._take_step(batch, step)
        self._agree(found)
        if found is not None:
            return self._handle(found), {}
        self.trained.tokens += int(done.tokens)
        routed = self.trainee.after_step(self.engine.module)
        seconds = time.perf_counter() - began
        return None, {
            **_name_losses(done, self.trainee),
            "lr": self.recipe.rate(step),
            "grad_norm": done.grad_norm,
            "tokens_per_s": done.tokens / seconds,
            "data_wait_fraction": waited_s / seconds,
            **self._stalled(),
            **routed,
        }

    def _take_step(self, batch: Batch, step: int) -> tuple[Step, Finding | None]:
        """Do one step; return also what is wrong with it, if anything: then it has changed nothing."""
        found: list[Finding | None] = []

        def before_update() -> None:
            self.ctx.beat("update", None)
            self.saver.before_update()

        def judge(loss: float, grad_norm: float) -> bool:
            scale = getattr(self.engine.optimizer, "loss_scale", None) if self.recipe.precision == "fp16" else None
            found.append(self.watch.judge(step, loss, grad_norm, scale))
            return found[0] is None

        done = take_step(self.engine, self.mesh, batch, self.trainee.coefficients, before_update, judge)
        if not found:  # what is not finite DeepSpeed does not ask about
            judge(done.loss, done.grad_norm)
        return done, found[0]

    def _handle(self, found: Finding) -> Event:
        """Write down what is wrong with a step, and what is done about it.

        Raises:
            TrainingError: If that is to end.
        """
        self.saver.finish()  # what is complete now is so on every rank
        checkpoint = self.saver.newest or None
        event = decide(self.recipe.guard, self.ledger.events, found, checkpoint, f"{self.ctx.task}: ")
        event = self.ledger.record(event, lambda: self.trainee.documents(found.step))
        self.trainee.forget_step(self.engine.module)
        passed = f"steps {event.skipped[0]} to {event.skipped[-1]} are" if len(event.skipped) > 1 else "it is"
        back = "" if event.rolled_back_to is None else f"back to the checkpoint of step {event.rolled_back_to}; "
        self.ctx.log(f"{self.trainee.label}step {event.step}: {event.reason}; {back}{passed} passed over")
        return event

    def _roll_back(self, event: Event) -> int:
        """Go back to the newest checkpoint; return its step."""
        restored = self.saver.restore()
        if restored is None:
            raise TrainingError(
                f"{self.trainee.checkpoints}: the checkpoint of step {event.rolled_back_to} is gone; run it again"
            )
        self._take_up(restored)
        self.ctx.rewind_tracker(self.trainee.first_step + restored.step)
        return restored.step

    def _restore(self) -> int:
        """Bring back the newest checkpoint; return the step that it is of, 0 where there is none."""
        self.ctx.beat("restore", 0)
        shape = self.shape
        how = f"batches of {shape.rows} rows, {shape.accumulation} x {shape.microbatch}"
        self.ctx.log(f"{self.trainee.label}{self.saver.ranks}; {how} on each data-parallel rank")
        restored = self.saver.restore()
        average = self.recipe.average
        kept = self.recipe.optimizer.state_copies + (average.state_copies if average else 0)
        self.saver.check_space(self.trainee.num_params, kept)
        if restored is None:
            if (lost := self._lost_steps()) > 0:
                again = f"there is no checkpoint: begins at step 0 again ({lost:,} steps had been done)"
                self.ctx.log(f"{self.trainee.label}{again}")
            return 0
        self._take_up(restored)
        if restored.step < self.recipe.steps:
            self.ctx.log(f"{self.trainee.label}continues after {self._where(restored)}")
        return restored.step

    def _lost_steps(self) -> int:
        """Return how many steps of this training an earlier try has logged; on rank 0, which says so."""
        rows = read_metrics(self.ctx.directory / METRICS) if self.ctx.rank == 0 else []
        return min(max((int(row["step"]) for row in rows), default=0) - self.trainee.first_step, self.recipe.steps)

    def _take_up(self, restored: Restored) -> None:
        """Go on from what a checkpoint says beside the weights."""
        self.ledger.check(restored.notes["events"])
        self.trained.tokens = restored.notes["tokens"]
        self.watch.restore(restored.notes["guard"])
        self.trained.validation = restored.notes["validation"]

    def _where(self, restored: Restored) -> str:
        """Say where training goes on: step, tokens, samples, rate, and the layout if it has changed."""
        rows = restored.step * self.recipe.batch_rows
        then, now = restored.ranks, self.saver.ranks
        layout = f"{now}" if then == now else f"{then} then, {now} now"
        return (
            f"step {restored.step} of {self.recipe.steps}: {self.trained.tokens:,} tokens, {rows:,} rows, "
            f"learning rate {self.recipe.rate(restored.step):.2e}; {layout}"
        )

    def _save(self, step: int, numbers: Mapping[str, float]) -> None:
        self.ctx.beat("save", None)
        notes = {
            "tokens": self.trained.tokens,
            "guard": self.watch.state(),
            "validation": dict(self.trained.validation),
            "events": len(self.ledger.events),
        }
        self.saver.save(step, notes, numbers.get("validation_loss"))

    def _note_saving(self, seconds: float) -> None:
        """Note what saving takes at the most, so that who ends this training knows how long before to say so."""
        if seconds > self.longest_save_s:
            self.longest_save_s = seconds
            (self.ctx.directory / WORK / SAVE_FILE).write_text(f"{seconds:.3f}", "ascii")

    def _agree(self, found: Finding | None = None) -> None:
        """Learn whether some rank was asked to stop, and whether one could not write its part of a checkpoint.

        Raises:
            TrainingError: If the ranks do not find the same.
        """
        flags = [float(self.ctx.should_stop()), float(self.saver.failed), float(found is not None)]
        stop, failed, finding = self.mesh.sum_all(flags, self.engine.device)
        if finding not in (0, self.mesh.place.world):
            raise TrainingError(
                f"{self.ctx.task}: {finding:.0f} of {self.mesh.place.world} ranks found something wrong with a step: "
                "they do not compute the same; check the machines, and `python -m pipeline stage=prove`"
            )
        self.stop = stop > 0
        if failed:
            self.saver.raise_failure()

    def _stalled(self) -> dict[str, float]:
        stall_s = self.saver.stall_s
        return {"checkpoint_stall_s": stall_s} if stall_s else {}

    def _validate(self, step: int) -> Mapping[str, float]:
        self.ctx.beat("validate", None)
        self.saver.before_update()
        with self.trained.evaluated() as module:
            numbers = self.trainee.validate(module)
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.ctx.task}: the {self.trainee.prefix}{name} of step {step} is {value}; the checkpoints "
                    f"before it stay in {self.trainee.checkpoints}; a lower optimizer.lr or a clip_norm often helps"
                )
        self.trained.validation = numbers
        return numbers

    def _log(self, step: int, numbers: Mapping[str, float]) -> None:
        first, prefix = self.trainee.first_step, self.trainee.prefix
        tracker = self.ctx.tracker(first + step - 1)
        tracker.log(first + step, {f"{prefix}{name}": value for name, value in numbers.items()})


def _name_losses(done: Step, trainee: Trainee) -> dict[str, float]:
    """Return the loss that was minimized, and where it has several terms each of them."""
    if len(done.terms) == 1:
        return {"loss": done.loss}
    named = {f"loss.{trainee.term_names.get(term, term)}": mean for term, mean in done.terms.items()}
    return {"loss": done.loss} | named


def _status(numbers: Mapping[str, float]) -> str:
    return (
        f"loss {numbers['loss']:.3f}  {numbers['tokens_per_s']:,.0f} tokens/s" if "loss" in numbers else "passed over"
    )
