"""What a validation reports: one number for everything, and its parts where there are several."""

import math

import pytest

from pipeline.training.metrics import Score
from pipeline.training.objectives import Causal, Distillation, Masked, NextSentence
from pipeline.training.validation import Validation, name_terms, predicts_text


class Held:
    """What a stream says of itself."""

    num_tokens, num_bytes = 100, 400


class Known(Validation):
    """Knows the scores beforehand."""

    scores = {}

    def _score(self, module, stream, mesh):
        return next(score for name, score in self.scores.items() if self.held[name] is stream)


class Asked:
    """Examples of which only the objective matters."""

    def __init__(self, objective):
        self.objective = objective


def numbers(objective, **scores):
    known = Known({name: Held() for name in scores}, Asked(objective), 1)
    object.__setattr__(known, "scores", scores)
    return known.run(None, None)


def tokens(nats, labels, **more):
    return Score({"tokens": nats, **more}, {"labels": labels, "rows": 2, "sentences": 2})


def test_one_source_with_one_term_has_one_loss():
    assert numbers(Causal(), web=tokens(6.0, 3)) == {
        "validation_loss": 2.0,
        "validation_bits_per_byte": pytest.approx(2.0 / 4 / math.log(2)),
    }
    assert numbers(Masked(), web=tokens(6.0, 3)) == {"validation_loss": 2.0}


def test_the_loss_of_several_sources_is_the_mean_over_all_tokens():
    found = numbers(Causal(), web=tokens(6.0, 3), code=tokens(9.0, 1))
    assert found["validation_loss"] == 15.0 / 4
    assert (found["validation_loss.web"], found["validation_loss.code"]) == (2.0, 9.0)
    assert found["validation_bits_per_byte.code"] == pytest.approx(9.0 / 4 / math.log(2))
    assert found["validation_bits_per_byte"] == pytest.approx(15.0 / 16 / math.log(2))


def test_each_term_has_its_name():
    found = numbers(NextSentence(), web=tokens(6.0, 3, sentence=1.0))
    assert found == {"validation_loss": 2.5, "validation_loss.masked": 2.0, "validation_loss.next_sentence": 0.5}
    both = numbers(NextSentence(), web=tokens(6.0, 3, sentence=1.0), code=tokens(6.0, 3, sentence=3.0))
    assert both["validation_loss"] == 3.0
    assert both["validation_loss.code.next_sentence"] == 1.5


def test_terms_of_several_sources_are_those_of_the_loss_alone():
    found = numbers(Causal(), web=tokens(6.0, 3, ahead_1=9.0), code=tokens(6.0, 3, ahead_1=9.0))
    assert not [name for name in found if "ahead" in name or "next_token" in name]
    assert numbers(Causal(), web=tokens(6.0, 3, ahead_1=9.0))["validation_loss.ahead_1"] == 3.0


def test_what_only_helps_to_train_has_no_name():
    assert name_terms(Causal(), tokens(6.0, 3, balance=2.0, router_z=1.0)) == {}


def test_only_where_each_token_is_predicted_bits_per_byte_mean_something():
    assert predicts_text(Distillation(teacher="@t"))
    assert not predicts_text(Distillation(teacher="@t", objective=Masked()))
    assert not predicts_text(Masked())
