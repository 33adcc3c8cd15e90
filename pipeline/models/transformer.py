"""The Transformer: a decoder, an encoder or both, assembled from settings, with its output layers and its loss.

Letters of the shape suffixes: B rows, T positions fed now, S positions seen, U positions of a decoder that reads an
encoder, D d_model, V ids of the vocabulary, C classes of pairs of texts, N labels.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.cache import Cache
from pipeline.models.config import AnyModel, Decoder, Encoder, EncoderDecoder
from pipeline.models.layers import Block, Stack, activate, make_norm
from pipeline.models.loss import IGNORED_LABEL, Output, TokenLoss, labels_ahead, summed_cross_entropy, summed_loss
from pipeline.models.positions import sinusoids
from pipeline.models.seams import Seam, nothing
from pipeline.models.sight import View, look, memory_mask, place
from pipeline.models.weights import SENTENCE_CLASSES

if TYPE_CHECKING:
    import torch.distributed as dist

UNITS = {"sentence": "sentences", "balance": "rows", "router_z": "rows"}


def unit_of_loss(term: str) -> str:
    """Return of what a summed loss is divided by the number to be a mean: labels, rows, or rows with a class."""
    return UNITS.get(term, "labels")


class Transformer(nn.Module):
    """A language model. `init_weights` gives it weights that depend on a seed alone.

    Attributes:
        token_loss: What is added to the cross entropy while it trains.
        enter_output: What hidden states pass before the output layer, and `leave_output` the logits; see
            `models.seams`.
        first_id: The id of the first row of the embedding and of the output layer; 0 but where ranks share the rows.
        vocabulary_group: Those ranks.
        length_multiple: What the numbers of positions must be multiples of, where ranks share them.
    """

    length_multiple: int = 1
    first_id: int = 0
    vocabulary_group: "dist.ProcessGroup | None" = None

    def __init__(self, config: AnyModel) -> None:
        super().__init__()
        self.config, self.token_loss = config, TokenLoss()
        self.enter_output: Seam = nothing
        self.leave_output: Seam = nothing
        encoder, both = isinstance(config, Encoder), isinstance(config, EncoderDecoder)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        types = config.token_types if isinstance(config, Encoder) else 0
        self.token_type_embedding = nn.Embedding(types, config.d_model) if types else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Stack(config, config.num_layers, bidirectional=True) if encoder or both else None
        layers = config.decoder_layers if isinstance(config, EncoderDecoder) else config.num_layers
        self.decoder = None if encoder else Stack(config, layers, bidirectional=False, cross=both)
        ahead = config.predict_ahead if isinstance(config, Decoder) else 0
        self.ahead = nn.ModuleList(Block(config, config.num_layers) for _ in range(ahead))
        self._make_heads(config)

    def _make_heads(self, config: AnyModel) -> None:
        tied, rows = config.tie_embeddings, config.padded_vocab_size
        self.head = None if tied else nn.Linear(config.d_model, rows, bias=False)
        self.head_transform = self.head_bias = self.pooler = self.sentence_head = None
        if isinstance(config, Encoder):
            if config.head_transform:
                dense = nn.Linear(config.d_model, config.d_model, bias=config.bias)
                self.head_transform = nn.ModuleDict({"dense": dense, "norm": make_norm(config)})
            if config.head_bias:
                self.head_bias = nn.Parameter(torch.zeros(rows))
            if config.pooler:
                self.pooler = nn.Linear(config.d_model, config.d_model)
                self.sentence_head = nn.Linear(config.d_model, SENTENCE_CLASSES)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        token_types: Tensor | None = None,
        sentence: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the logits (B, T, V), or with labels the summed losses, each a scalar in fp32, by name.

        Note: labels are not shifted here. `labels[b, t]` is what is to be said at `ids[b, t]`, or -100.

        Args:
            ids: (B, T).
            labels: (B, T), or (B, U) of an encoder-decoder.
            documents: (B, T); if given, numbers the documents of each row: no position sees another document, and
                positions count from the beginning of each. -1 is padding.
            prefix: (B, T); true at the positions that all of their document may see, though they come later.
            token_types: (B, T); null is 0 everywhere.
            sentence: (B); the class of each pair of texts, or -100.
            decoder_ids: (B, U); what an encoder-decoder's decoder reads.
            decoder_documents: (B, U); it sees those of the encoder's documents that have the same number.
            cache: If given, `ids` (or `decoder_ids`) continue what it holds, and are added to it.
        """
        x_BTD, expert_losses, view = self.last_layer(
            ids,
            documents,
            prefix=prefix,
            token_types=token_types,
            decoder_ids=decoder_ids,
            decoder_documents=decoder_documents,
            cache=cache,
        )
        if labels is None:
            return self.logits(self._finish(x_BTD))
        losses = self._losses(x_BTD, labels, sentence)
        for number, block in enumerate(self.ahead, 1):
            ahead_BTD, _ = block(x_BTD, view)
            hidden_ND = self._finish(ahead_BTD).flatten(0, 1)
            later_N = labels_ahead(labels, documents, number).flatten()
            losses[f"ahead_{number}"] = self._token_loss(hidden_ND, later_N)
        if self.config.experts is not None:
            losses |= {"balance": expert_losses[0], "router_z": expert_losses[1]}
        return losses

    def last_layer(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        token_types: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor, View | None]:
        """Return what the last layer makes of what `forward` is given, without the last norm, (B, T, D).

        Also the losses of the experts, (2), and what a decoder's layers saw.
        """
        if isinstance(self.config, EncoderDecoder):
            if decoder_ids is None:
                raise ConfigError("decoder_ids: an encoder-decoder needs what its decoder reads")
            memory_BSD, expert_losses = self.encode(ids, documents)
            x_BUD, more = self.decode(decoder_ids, memory_BSD, documents, decoder_documents, cache)
            return x_BUD, expert_losses + more, None
        if isinstance(self.config, Encoder):
            return *self.encode(ids, documents, token_types), None
        return self._read(ids, documents, prefix, cache)

    def hidden(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return what the last layer of a decoder or an encoder knows at each position, (B, T, D), norm applied."""
        if isinstance(self.config, Encoder):
            return self._finish(self.encode(ids, documents)[0])
        return self._finish(self._read(ids, documents, prefix, cache)[0])

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return a score for each id of the vocabulary, (..., V), from what the last layer knows.

        The rows that pad the embedding are cut off, so nobody can ever sample them.
        """
        logits_BTV = self.output().logits(self.enter_output(self._transformed(x_BTD)))
        return self.leave_output(logits_BTV)[..., : self.config.real_vocab_size]

    def output(self) -> Output:
        """Return the output layer."""
        config = self.config
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        scale = (config.logit_scale or 1.0) / config.width_ratio
        return Output(
            weight_VD,
            self.head_bias,
            config.real_vocab_size,
            scale,
            config.logit_softcap,
            self.first_id,
            self.vocabulary_group,
        )

    def encode(
        self, ids_BT: Tensor, documents_BT: Tensor | None = None, token_types_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the encoder makes of `ids_BT`, (B, T, D), and the losses of its experts, (2).

        The last norm of an encoder-decoder's encoder is applied, since its decoder reads the result.
        """
        assert self.encoder is not None, "this model has no encoder"
        self._check_length(ids_BT)
        at = place(ids_BT, causal=False, documents_BT=documents_BT)
        sights = look(self.config, at, False, self.encoder.relative, self.embedding.weight.dtype)
        view = View(*sights, ids_BT, None if documents_BT is None else documents_BT >= 0)
        x_BTD, losses = self.encoder(self._embed(ids_BT, at.positions, token_types_BT), view)
        return (self.encoder.finish(x_BTD) if self.decoder is not None else x_BTD), losses

    def decode(
        self,
        ids_BU: Tensor,
        memory_BSD: Tensor,
        documents_BS: Tensor | None = None,
        documents_BU: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the decoder knows at each of `ids_BU` after reading what the encoder made, (B, U, D).

        Args:
            documents_BS: Numbers the encoder's documents, -1 is padding.
            documents_BU: Numbers the decoder's; null with `documents_BS` reads all that is not padding.
        """
        assert self.decoder is not None, "this model has no decoder"
        memory_BSD = self.decoder.enter_memory(memory_BSD)
        mask = memory_mask(documents_BS, documents_BU)
        x_BUD, losses, _ = self._read(ids_BU, documents_BU, None, cache, memory_BSD, mask)
        return x_BUD, losses

    def _read(
        self,
        ids_BT: Tensor,
        documents_BT: Tensor | None,
        prefix_BT: Tensor | None,
        cache: Cache | None,
        memory_BSD: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, View]:
        """Return what the decoder knows at each position, without the last norm, its experts' losses, what it saw."""
        assert self.decoder is not None, "this model has no decoder"
        if cache is None:
            self._check_length(ids_BT)
        at = place(ids_BT, True, documents_BT, prefix_BT, cache)
        sights = look(self.config, at, True, self.decoder.relative, self.embedding.weight.dtype)
        real_BT = None if documents_BT is None else documents_BT >= 0
        view = View(*sights, ids_BT, real_BT, memory_BSD, mask)
        return *self.decoder(self._embed(ids_BT, at.positions), view, cache), view

    def _embed(self, ids_BT: Tensor, positions: Tensor, token_types_BT: Tensor | None = None) -> Tensor:
        config = self.config
        x_BTD: Tensor = self.embedding(ids_BT)
        if config.embedding_scale is not None:
            x_BTD = x_BTD * config.embedding_scale
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions)
        elif config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions, config.d_model).to(x_BTD.dtype)
        if self.token_type_embedding is not None:
            types = torch.zeros_like(ids_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + self.token_type_embedding(types)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        embedded_BTD: Tensor = self.dropout(x_BTD)
        return embedded_BTD

    def _check_length(self, ids_BT: Tensor) -> None:
        if ids_BT.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                f"max_seq_len: the model reads {self.config.max_seq_len} positions, found {ids_BT.shape[1]};"
                " cut the text, or train a model with a larger max_seq_len"
            )

    def _finish(self, x_BTD: Tensor) -> Tensor:
        last = self.encoder if self.decoder is None else self.decoder
        assert last is not None
        return last.finish(x_BTD)

    def _transformed(self, x_BTD: Tensor) -> Tensor:
        """Return what the output layer reads."""
        if self.head_transform is None:
            return x_BTD
        dense, norm = self.head_transform["dense"], self.head_transform["norm"]
        read_BTD: Tensor = norm(activate(dense(x_BTD), self.config))
        return read_BTD

    def _losses(self, x_BTD: Tensor, labels_BT: Tensor, sentence_B: Tensor | None) -> dict[str, Tensor]:
        normed_BTD, labels_N = self._finish(x_BTD), labels_BT.flatten()
        hidden_ND = normed_BTD.flatten(0, 1)
        if isinstance(self.config, Encoder):  # most positions have no label
            kept_N = labels_N != IGNORED_LABEL
            hidden_ND, labels_N = hidden_ND[kept_N], labels_N[kept_N]
        losses = {"tokens": self._token_loss(self._transformed(hidden_ND), labels_N)}
        if sentence_B is not None and self.pooler is not None and self.sentence_head is not None:
            logits_BC = self.sentence_logits(normed_BTD)
            losses["sentence"] = summed_loss(logits_BC, sentence_B)
        return losses

    def sentence_logits(self, x_BTD: Tensor) -> Tensor:
        """Return a score for each class of a pair of texts, (B, C), from the first position, as BERT does."""
        assert self.pooler is not None, "this model has no pooler"
        assert self.sentence_head is not None
        logits_BC: Tensor = self.sentence_head(torch.tanh(self.pooler(x_BTD[:, 0])))
        return logits_BC

    def _token_loss(self, x_ND: Tensor, labels_N: Tensor) -> Tensor:
        extra = self.token_loss if self.training else None
        return summed_cross_entropy(self.enter_output(x_ND), self.output(), labels_N, extra)
