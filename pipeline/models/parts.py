"""Settings of parts that a model may have: stretched rotary positions, and mixtures of experts. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Choice, Settings


class LinearScaling(Choice):
    """Positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)


class Llama3Scaling(Choice):
    """Slow rotations are divided by `factor`, fast ones kept, those between blended (Llama 3, arXiv:2407.21783).

    Attributes:
        original_max_seq_len: Positions that the model was trained with before.
        low_freq_factor: Rotations that turn fewer times over these positions are divided.
        high_freq_factor: Those that turn more often are kept.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    original_max_seq_len: int = Field(gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)


class YarnScaling(Choice):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): as Llama 3's, over a ramp of dimensions, and attention is sharpened.

    Attributes:
        beta_fast: Turns over the original positions above which a rotation is kept.
        beta_slow: Turns below which it is divided by `factor`.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    original_max_seq_len: int = Field(gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)


AnyScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class TokenChoice(Choice):
    """Every token chooses its `top_k` experts (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
        scores: What a token's scores go through before the choice. Sigmoid is DeepSeek-V3's (arXiv:2412.19437).
        renormalize: Whether the weights of the chosen experts are made to add up to 1.
        capacity_factor: An expert takes at most this times its even share of each row; what is over passes it by.
            Null drops nothing.
    """

    kind: Literal["token_choice"] = "token_choice"
    top_k: int = Field(default=2, ge=1)
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    capacity_factor: float | None = Field(default=None, gt=0)


class ExpertChoice(Choice):
    """Every expert chooses the tokens of a row that it likes best (Zhou et al. 2022, arXiv:2202.09368).

    For encoders only: a choice among all tokens of a row tells a token what comes after it.

    Attributes:
        capacity_factor: Experts that a token has on average.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = Field(default=2.0, gt=0)


class Hash(Choice):
    """A token's id says which expert it has (Roller et al. 2021, arXiv:2106.04426); nothing is learned."""

    kind: Literal["hash"] = "hash"


AnyRouter = Annotated[TokenChoice | ExpertChoice | Hash, Field(discriminator="kind")]


class Experts(Settings):
    """Feed-forward layers of which each token uses only some.

    Attributes:
        count: How many there are in a layer, the shared ones not counted.
        d_ff: Width of each; null is the model's.
        shared: How many more there are that every token uses, as one layer of that many times the width.
        balance_loss: Weight of the loss that evens out the load (Fedus et al. 2022, arXiv:2101.03961), taken over each
            row, so that it depends on no microbatch (DeepSeek-V3's sequence-wise loss). 0 is without.
        router_z_loss: Weight of the squared logarithm of the router's normalizer (Zoph et al. 2022, arXiv:2202.08906).
        balance_bias_rate: How far a step moves the bias that evens out the load without a loss (Wang et al. 2024,
            arXiv:2408.15664); null has no bias.
    """

    count: int = Field(ge=2)
    d_ff: int | None = Field(default=None, gt=0)
    router: AnyRouter = TokenChoice()
    shared: int = Field(default=0, ge=0)
    balance_loss: float = Field(default=0.01, ge=0)
    router_z_loss: float = Field(default=0.0, ge=0)
    balance_bias_rate: float | None = Field(default=None, gt=0)
