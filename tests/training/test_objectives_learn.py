"""Each objective trains a tiny model to a loss that follows from an argument, written beside it."""

import math

import numpy as np
import pytest
import torch
from objective_cases import END, ids_for, make_row, objective_of

from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.models.initial import init_weights
from pipeline.models.loss import summed_divergence
from pipeline.models.transformer import Transformer, unit_of_loss
from pipeline.text.loader import Rows
from pipeline.training.objectives.batch import Examples, count_terms

ROWS = 32  # of a batch
SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "max_seq_len": 64, "vocab_multiple": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def nearly_nothing(choices):
    """Where the argument says zero: a twentieth of what a guess among so many letters or classes costs."""
    return 0.05 * math.log(choices)


def make_model(family, num_ids, **changes):
    model = Transformer(family(vocab_size=num_ids, **{**SIZES, **changes}))
    init_weights(model, 1)
    return model


def rows_of(documents, length):
    rows = [make_row(document, length=length) for document in documents]
    return Rows(*(np.stack([getattr(row, name) for row in rows]) for name in ("inputs", "tokens", "documents")))


class Lesson:
    """An objective, its vocabulary, and a language: from a generator to one row's documents."""

    def __init__(self, objective, num_letters, language, seq_len):
        self.objective, self.ids, self.language = objective, ids_for(objective, num_letters), language
        self.first = self.ids.vocab_size - num_letters  # the first letter's id
        self.examples = Examples(objective, self.ids, seq_len, True, seed=1)

    def batch(self, number, rows=ROWS):
        rng, length = np.random.default_rng(number), self.objective.row_tokens(self.examples.seq_len)
        batches = [rows_of([self.language(rng, self.first) for _ in range(rows)], length) for _ in range(2)]
        numbers = range(number * rows, (number + 1) * rows)
        example = self.examples.make(batches[0], numbers, self.examples.seq_len, batches[1])
        return {name: torch.from_numpy(array) for name, array in example.items()}, count_terms(example)


def mean_losses(model, lesson, number, rows=ROWS):
    fed, counts = lesson.batch(number, rows)
    return {name: loss / counts[unit_of_loss(name)] for name, loss in model(**fed).items()}


def learn(model, steps, losses, lr=3e-3):
    """Train on `losses(step)`, the rate falling to nothing in the last half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        sum(losses(step).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def taught(family, lesson, steps, lr=3e-3, **changes):
    """Return the losses of a model, on rows it has not seen, after its training."""
    config = family(**SIZES)
    assert not list(lesson.objective.check(type(config)(**{**SIZES, **changes}), lesson.examples.seq_len))
    model = make_model(family, lesson.ids.vocab_size, **changes)
    learn(model, steps, lambda step: mean_losses(model, lesson, step), lr)
    model.eval()
    with torch.no_grad():
        return {name: loss.item() for name, loss in mean_losses(model, lesson, 1_000_000, 512).items()}


def uniform(letters, length):
    return lambda rng, first: first + rng.integers(0, letters, length)


def cycle(letters, length):
    """Letters in their order, round and round, from any of them on."""
    return lambda rng, first: first + (rng.integers(letters) + np.arange(length)) % letters


def alphabet(length):
    """The first letters, always the same."""
    return lambda rng, first: first + np.arange(length)


def test_causal_nothing_beats_the_entropy_of_random_letters():
    lesson = Lesson(objective_of("causal"), 4, uniform(4, 16), 16)
    assert taught(Decoder, lesson, 100)["tokens"] == pytest.approx(math.log(4), abs=0.02)


def test_prefix_only_a_prefix_of_nothing_leaves_a_guess():
    """One of 16 prefixes is but the end of text: then the first letter costs log 8, and every other costs nothing.

    A row has 1 to 16 labels, 8.5 on average.
    """
    lesson = Lesson(objective_of("prefix"), 8, cycle(8, 16), 16)
    assert taught(Decoder, lesson, 200)["tokens"] == pytest.approx(math.log(8) / 16 / 8.5, abs=0.01)


@pytest.mark.parametrize("spm_share", [0.0, 1.0])
def test_fill_in_the_middle_costs_the_choice_of_the_middle(spm_share):
    """The text is always the same, so all there is to guess is where it was cut.

    Of 13 * 13 equally likely pairs of cuts PSM shows both, the smaller first; SPM shows but where the suffix begins.
    """
    pairs = np.sort(np.indices((13, 13)).reshape(2, -1), axis=0)
    shown = pairs[1:] if spm_share else pairs
    shares = np.unique(shown, axis=1, return_counts=True)[1] / 169
    entropy = -(shares * np.log(shares)).sum()
    objective = objective_of("fill_in_middle", rate=1.0, spm_share=spm_share, documents_per_row=1)
    lesson = Lesson(objective, 12, lambda rng, first: [*range(first, first + 12), END], 17)
    # 12 letters, three markers and the end of text are labels
    assert taught(Decoder, lesson, 300, lr=5e-3)["tokens"] == pytest.approx(entropy / 16, abs=0.03)


@pytest.mark.parametrize("unit", ["token", "span"])
def test_masked_letters_of_a_cycle_follow_from_their_neighbours(unit):
    lesson = Lesson(objective_of("masked", unit=unit), 8, cycle(8, 24), 24)
    assert taught(Encoder, lesson, 300, lr=5e-3)["tokens"] < nearly_nothing(8)


def test_masked_random_letters_cost_what_the_mask_hides():
    """Of random letters of 4 a mask (80 %) says nothing, and a letter that is shown (20 %) says much.

    It is the true one if it was kept (10 %) or drawn by chance (a quarter of 10 %): in 12.5 of 20 cases, and each of
    the three others in 2.5.
    """
    shown = np.array([12.5, 2.5, 2.5, 2.5]) / 20
    loss = 0.8 * math.log(4) - 0.2 * (shown * np.log(shown)).sum()
    lesson = Lesson(objective_of("masked", rate=0.5), 4, uniform(4, 24), 24)
    assert taught(Encoder, lesson, 200)["tokens"] == pytest.approx(loss, abs=0.02)


def test_next_sentence_texts_of_other_letters_do_not_belong_together():
    """A text has letters of one of 8 alphabets of 2; a partner has the same one, and cannot be told, in 1 of 8 cases.

    Then either class has its share: 1 for 2 of a true pair, of which there are 8 to each such partner.
    """
    lesson = Lesson(
        objective_of("next_sentence"), 16, lambda rng, first: first + 2 * rng.integers(8) + rng.integers(0, 2, 21), 24
    )
    # Of all pairs 1/2 are true and 1/16 alike by chance: among the 9/16 that look alike, 8 of 9 are true.
    alike = np.array([8, 1]) / 9
    loss = -9 / 16 * (alike * np.log(alike)).sum()
    losses = taught(Encoder, lesson, 300, token_types=2, pooler=True)
    assert losses["sentence"] == pytest.approx(loss, abs=0.05)
    assert losses["tokens"] < math.log(2) + 0.05  # a masked letter is one of two


def test_sentence_order_is_seen_in_the_alphabet():
    lesson = Lesson(objective_of("sentence_order"), 21, alphabet(21), 24)
    losses = taught(Encoder, lesson, 300, lr=5e-3, token_types=2, pooler=True)
    assert losses["sentence"] < nearly_nothing(2)
    assert losses["tokens"] < nearly_nothing(21)  # and what is hidden in it, too


@pytest.mark.slow
def test_span_corruption_spans_of_the_alphabet_follow_from_what_is_left():
    """What stands around a sentinel says all that it hides; the last span ends with the last letter."""
    objective = objective_of("span_corruption", noise_density=0.3, mean_span=2.0, num_sentinels=8)
    length = objective.row_tokens(24)
    lesson = Lesson(objective, length, alphabet(length), 24)
    assert taught(EncoderDecoder, lesson, 300, lr=5e-3)["tokens"] < nearly_nothing(length)


@pytest.mark.slow
@pytest.mark.parametrize("decoder_only", [False, True])
def test_denoisers_whatever_hides_the_alphabet_it_can_be_told(decoder_only):
    denoisers = [
        {"mode": "[NLU]", "noise_density": 0.2, "mean_span": 2.0},
        {"mode": "[S2S]", "noise_density": 0.25},
        {"mode": "[NLG]", "noise_density": 0.5, "mean_span": 4.0},
    ]
    objective = objective_of("denoisers", denoisers=denoisers, decoder_only=decoder_only, num_sentinels=8)
    seq_len = 36 if decoder_only else 24
    length = objective.row_tokens(seq_len)
    lesson = Lesson(objective, length, alphabet(length), seq_len)
    family = Decoder if decoder_only else EncoderDecoder
    assert taught(family, lesson, 200, lr=5e-3)["tokens"] < nearly_nothing(length)


def test_distillation_the_student_comes_to_predict_what_the_teacher_does():
    """The teacher knows which letter follows which; the student sees random letters and only the teacher's opinion.

    In the end it predicts the teacher's language as well as that can be predicted: with the entropy of its chain.
    """
    chain = np.random.default_rng(3).dirichlet(np.full(6, 0.5), 6)

    def walk(rng, first):
        letters = [rng.integers(6)]
        for share in rng.random(15):
            letters.append(min(5, int(np.searchsorted(np.cumsum(chain[letters[-1]]), share))))
        return first + np.array(letters)

    inner = Lesson(objective_of("causal"), 6, walk, 16)
    teacher = make_model(Decoder, inner.ids.vocab_size)
    learn(teacher, 150, lambda step: mean_losses(teacher, inner, step))
    teacher.requires_grad_(False)
    lesson = Lesson(objective_of("distillation", teacher="@teacher", weight=1.0), 6, uniform(6, 16), 16)
    student = make_model(Decoder, inner.ids.vocab_size)

    def divergence(step):
        fed, counts = lesson.batch(step)
        hidden = [model.hidden(fed["ids"], documents=fed["documents"]).flatten(0, 1) for model in (student, teacher)]
        labels = fed["labels"].flatten()
        loss = summed_divergence(hidden[0], student.output(), hidden[1], teacher.output(), labels, 2.0)
        return {"distill": loss / counts["labels"]}

    before = divergence(999)["distill"].item()
    learn(student, 200, divergence)
    with torch.no_grad():
        after = divergence(999)["distill"].item()
        losses = [mean_losses(model, inner, 10_000, 512)["tokens"].item() for model in (student, teacher)]
    assert before > 0.5
    assert after < 0.01 * before
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
