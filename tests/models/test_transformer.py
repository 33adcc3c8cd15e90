import math

import pytest
import torch
import torch.nn.functional as F
from model_variants import DECODERS, ENCODER_DECODERS, ENCODERS, FAMILIES, VOCAB_SIZE, feed, make, random_ids

from pipeline.errors import ConfigError
from pipeline.models.classifier import Classifier
from pipeline.models.initial import hidden_matrices, init_weights, lr_scales
from pipeline.models.loss import TokenLoss, summed_divergence
from pipeline.models.transformer import Transformer
from pipeline.models.weights import active_params, tensor_problems, weights

# Sums of a few hundred numbers of size one, in another order: fp32 has 24 bits, of which the last three may go.
ROUNDING = 2e-6
# The same for logits of models whose weights are ten times as large as usual, and for gradients summed over all tokens.
LARGE_ROUNDING = 1e-4
CAUSAL = [*DECODERS, *ENCODER_DECODERS]


def assert_close(found, wanted, tolerance=LARGE_ROUNDING):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_list_of_weights_is_what_the_module_has(name):
    model = make(name)
    assert {w.name: w.shape for w in weights(model.config)} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_are_those_that_torch_counts(name):
    """6 a weight and 12 a pair: three times what the products of a forward pass are, where all positions see all."""
    from torch.utils.flop_counter import FlopCounterMode

    model, rows, length = make(name, sliding_window=None, global_every=None, local_rope_theta=None), 2, 12
    fed = {"ids": random_ids(rows, length)}
    if model.config.kind == "encoder_decoder":
        fed["decoder_ids"] = random_ids(rows, length)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**fed)
    counted = 3 * counter.get_total_flops() / (rows * length)
    heads = sum(math.prod(w.shape) * w.uses for w in weights(model.config) if w.name.startswith("ahead"))
    pairs = 12 * model.config.num_heads * model.config.head_dim * length * len(model.ahead)
    assert model.config.flops_per_token(length) - 6 * heads - pairs == pytest.approx(counted, rel=1e-9)


def test_a_token_uses_the_experts_that_it_has():
    dense, sparse = make("llama", d_ff=16), make("mixtral", num_kv_heads=4)
    routers = 2 * 4 * 16
    assert active_params(sparse.config) == active_params(dense.config) + routers  # 2 experts of 8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_a_block_but_routers_is_cut(name):
    for weight in weights(make(name).config):
        if ".blocks." in weight.name and len(weight.shape) > 1 and not weight.name.endswith("router.weight"):
            assert weight.cut is not None, weight.name
            assert weight.shape[weight.cut] % 2 == 0


def test_what_cannot_be_cut_is_said():
    config = make("mixtral").config
    assert list(tensor_problems(config, 2)) == []
    assert list(tensor_problems(config, 4)) == [
        "num_heads (4) and num_kv_heads (2) must be multiples of 4",
    ]
    assert "d_ff (64) must be a multiple of 3" in list(tensor_problems(config, 3))
    assert list(tensor_problems(config, 2, [8, 10])) == []
    assert list(tensor_problems(config, 2, [8, 7, 9])) == [
        "sequences of 7 positions cannot be shared by 2 ranks; take lengths that divide",
    ]


# --- what sees what


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_never_moves_an_earlier_logit(name):
    model = make(name)
    fed = feed(model)
    key = "decoder_ids" if "decoder_ids" in fed else "ids"
    changed = fed[key].clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB_SIZE
    before, after = model(**fed), model(**(fed | {key: changed}))
    if model.config.experts is None:
        assert torch.equal(before[:, :7], after[:, :7])
    else:  # products of other sizes may round otherwise
        assert_close(before[:, :7], after[:, :7], ROUNDING)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_sees_what_follows(name):
    model, ids = make(name), random_ids()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB_SIZE
    assert not torch.allclose(model(ids)[:, 6], model(changed)[:, 6])


def test_a_window_hides_what_is_far():
    model, ids = make("window", num_layers=1, global_every=None, sliding_window=3), random_ids()
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB_SIZE
    moved = (model(ids) != model(changed)).any(-1)[0]
    assert moved.tolist() == [4 <= position < 7 for position in range(12)]
    model = make("modernbert", num_layers=1, global_every=None, sliding_window=4)
    moved = ((model(ids) - model(changed)).abs() > ROUNDING).any(-1)[0]
    assert moved.tolist() == [2 <= position <= 6 for position in range(12)]


def test_a_prefix_is_seen_by_all_of_its_document_and_nothing_else():
    model, ids = make(), random_ids(rows=1)
    documents = torch.tensor([[0] * 6 + [1] * 6])
    prefix = torch.tensor([[True] * 3 + [False] * 3 + [True] * 2 + [False] * 4])
    before = model(ids, documents=documents, prefix=prefix)
    for changed, moved in ((2, range(6)), (4, range(4, 6)), (7, range(6, 12)), (9, range(9, 12))):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB_SIZE
        found = (model(other, documents=documents, prefix=prefix) != before).any(-1)[0]
        assert found.tolist() == [position in moved for position in range(12)]


PACKED = torch.tensor(
    [[4] * 5 + [5] * 1 + [7] * 6, [0] * 2 + [9] * 10]
)  # numbers of documents of 5, 1, 6, 2 and 10 ids
ALONE = [name for name in [*DECODERS, *ENCODERS] if name != "chosen"]  # experts that choose see all of a row


@pytest.mark.parametrize("name", ALONE)
def test_changing_one_document_never_moves_anothers_logits(name):
    model, ids = make(name), random_ids()
    before = model(ids, documents=PACKED)
    for row, document in ((0, 4), (0, 5), (0, 7), (1, 0), (1, 9)):
        inside = torch.zeros_like(PACKED, dtype=torch.bool)
        inside[row] = PACKED[row] == document
        after = model(ids.where(~inside, (ids + 1) % VOCAB_SIZE), documents=PACKED)
        if "experts" in DECODERS.get(name, {}):  # products of other sizes may round otherwise
            assert_close(before[~inside], after[~inside], ROUNDING)
        else:
            assert torch.equal(before[~inside], after[~inside])
        assert not torch.allclose(before[inside], after[inside])
    assert not torch.allclose(before[0, 5:], model(ids)[0, 5:])  # without the mask it would leak


@pytest.mark.parametrize("name", ALONE)
def test_a_packed_document_is_read_as_if_it_were_alone(name):
    model, ids = make(name), random_ids()
    packed = model(ids, documents=PACKED)
    for row, numbers in enumerate(PACKED):
        for document in numbers.unique():
            alone = model(ids[row : row + 1, numbers == document])
            assert_close(packed[row : row + 1, numbers == document], alone)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_packed_pairs_are_read_as_if_they_were_alone(name):
    model, ids, targets = make(name), random_ids(rows=1), random_ids(rows=1, length=9, seed=1)
    documents = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2])
    target_documents = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2])
    packed = model(ids, documents=documents, decoder_ids=targets, decoder_documents=target_documents)
    assert packed.isfinite().all()
    for document in (0, 1):
        inputs, outputs = documents[0] == document, target_documents[0] == document
        assert_close(packed[:, outputs], model(ids[:, inputs], decoder_ids=targets[:, outputs]))


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_of_an_encoder_is_not_seen(name):
    model, ids = make(name), random_ids()
    documents = torch.tensor([[0] * 12, [0] * 8 + [-1] * 4])
    changed = ids.clone()
    changed[1, 8:] = 0
    before, after = (model(x, documents=documents) for x in (ids, changed))
    assert_close(before[0], after[0], ROUNDING)
    assert_close(before[1, :8], after[1, :8], ROUNDING)
    assert_close(before[1:, :8], model(ids[1:, :8]))


def test_the_loss_of_one_document_has_no_gradient_in_another():
    model, ids = make(), random_ids()
    embedded = model.embedding(ids).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded
    labels = random_ids(seed=1).where(PACKED == 7, -100)
    model(ids, labels, documents=PACKED)["tokens"].backward()
    moved = embedded.grad.abs().sum(-1) > 0
    assert torch.equal(moved, PACKED == 7)


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(ConfigError, match="max_seq_len: the model reads 16 positions, found 17"):
        make()(random_ids(length=17))
    with pytest.raises(ConfigError, match="max_seq_len: the model reads 16 positions, found 17"):
        make("bert")(random_ids(length=17))
    with pytest.raises(ConfigError, match="decoder_ids: an encoder-decoder needs what its decoder reads"):
        make("t5")(random_ids())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_hold_real_ids_only(name):
    model = make(name)
    assert model.embedding.weight.shape == (64, 16)
    fed = feed(model)
    assert model(**fed).shape == (2, 10 if "decoder_ids" in fed else 12, VOCAB_SIZE)


def test_logits_are_capped():
    assert make("capped", std=2.0)(random_ids()).abs().max() <= 2.0


def test_token_types_are_added():
    model, ids = make("bert"), random_ids()
    zero = torch.zeros_like(ids)
    assert torch.equal(model(ids), model(ids, token_types=zero))
    assert not torch.allclose(model(ids), model(ids, token_types=zero + 1))


# --- first weights


def test_first_weights_follow_from_seed_and_name_alone():
    deep, shallow = make(seed=3, num_layers=2), make(seed=3, num_layers=1)
    torch.manual_seed(99)
    again = make(seed=3)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, deep.state_dict()[name])
    for name in ("embedding.weight", "decoder.blocks.0.attention.query.weight", "decoder.blocks.0.mlp.gate.weight"):
        assert torch.equal(deep.state_dict()[name], shallow.state_dict()[name])
    assert not torch.equal(make(seed=4).embedding.weight, deep.embedding.weight)
    first, second = deep.decoder.blocks[0].mlp, deep.decoder.blocks[1].mlp
    assert not torch.equal(first.up.weight, second.up.weight)


def test_first_weights_have_the_deviation_of_the_settings():
    model = make(d_model=128, num_layers=2, std=0.02, bias=True, vocab_size=1000)
    blocks = model.decoder.blocks
    # 16384 draws: their deviation is off by 0.6 percent (one in sqrt(2n)); four times that
    for weight, std in [
        (model.embedding.weight[:1000], 0.02),
        (blocks[1].attention.query.weight, 0.02),
        (blocks[1].attention.out.weight, 0.02 / math.sqrt(4)),
        (blocks[0].mlp.down.weight, 0.02 / math.sqrt(4)),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.025)
    assert model.embedding.weight[1000:].eq(0).all()
    assert model.decoder.norm.weight.eq(1).all()
    assert blocks[0].attention.query.bias.eq(0).all()


def test_a_decoder_that_reads_an_encoder_writes_three_times_a_layer():
    model = make("t5", d_model=128, std=0.02)
    assert model.decoder.blocks[0].cross.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.025)
    assert model.encoder.blocks[0].attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.025)


def test_a_wider_model_begins_smaller_and_learns_more_slowly_where_it_is_wide():
    base, wide = (make(d_model=width, std=0.02, mup_base_width=32, vocab_size=1000) for width in (32, 128))
    plain = make(d_model=32, std=0.02, vocab_size=1000)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), plain.parameters(), strict=True))
    assert wide.decoder.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.01, rel=0.025)
    assert wide.embedding.weight[:1000].std().item() == pytest.approx(0.02, rel=0.025)
    scales = lr_scales(wide, wide.config)
    assert {name for name, scale in scales.items() if scale == 0.25} == hidden_matrices(wide.config)
    assert scales["embedding.weight"] == scales["decoder.norm.weight"] == 1
    ids = random_ids()
    assert_close(wide(ids), F.linear(wide.hidden(ids), wide.embedding.weight)[..., :1000] / 4)


# --- the losses


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_without_a_label_are_zero(name):
    model = make(name).train()
    fed = feed(model)
    labels = torch.full_like(fed.get("decoder_ids", fed["ids"]), -100)
    losses = model(**fed, labels=labels)
    sum(loss for term, loss in losses.items() if term not in ("balance", "router_z")).backward()
    assert losses["tokens"].item() == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


@torch.no_grad()
def test_the_loss_is_fp32_and_needs_no_gradient():
    model = make(std=0.02).bfloat16()
    loss = model(random_ids(), random_ids(seed=1))["tokens"]
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
    x, weight = model.hidden(random_ids()).flatten(0, 1), model.embedding.weight
    logits = (x @ weight.T)[:, :VOCAB_SIZE].float()
    torch.testing.assert_close(loss, F.cross_entropy(logits, random_ids(seed=1).flatten(), reduction="sum"))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_model_are_those_of_its_logits(name):
    """Above all those of an embedding that is the output layer too."""
    model = make(name)
    fed = feed(model)
    labels = random_ids(length=fed.get("decoder_ids", fed["ids"]).shape[1], seed=1)
    labels[0, 2:5] = -100
    loss = model(**fed, labels=labels)["tokens"]
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    wanted = F.cross_entropy(model(**fed).flatten(0, 1), labels.flatten(), reduction="sum")
    wanted.backward()
    assert_close(loss, wanted)
    for name, p in model.named_parameters():
        if p.grad is not None:
            size = p.grad.abs().max().clamp(min=1)
            assert_close(found[name] / size, p.grad / size)


def test_the_heads_that_look_ahead_say_what_comes_later():
    model, ids = make("ahead"), random_ids()
    labels = random_ids(seed=1)
    losses = model(ids, labels, documents=PACKED)
    assert list(losses) == ["tokens", "ahead_1", "ahead_2"]
    later = torch.full_like(labels, -100)
    later[:, :-2] = labels[:, 2:].where(PACKED[:, 2:] == PACKED[:, :-2], -100)
    assert (later != -100).sum() == 3 + 0 + 4 + 0 + 8
    last = {}
    model.ahead[1].register_forward_hook(lambda module, fed, made: last.update(made=made[0]))
    model(ids, labels, documents=PACKED)
    logits = model.logits(model.decoder.finish(last["made"]))
    assert_close(losses["ahead_2"], F.cross_entropy(logits.flatten(0, 1), later.flatten(), reduction="sum"))


def test_pairs_of_texts_have_a_loss_of_their_own():
    model, ids = make("bert"), random_ids()
    losses = model(ids, torch.full_like(ids, -100), sentence=torch.tensor([1, -100]))
    hidden = model.hidden(ids)
    pooled = torch.tanh(hidden[:, 0] @ model.pooler.weight.T + model.pooler.bias)
    logits = pooled @ model.sentence_head.weight.T + model.sentence_head.bias
    assert_close(losses["sentence"], F.cross_entropy(logits[:1], torch.tensor([1])))


def test_smoothing_and_the_z_loss_count_in_training_only():
    model, ids, labels = make(), random_ids(), random_ids(seed=1)
    plain = model(ids, labels)["tokens"]
    model.token_loss = TokenLoss(label_smoothing=0.1, z_loss=0.01)
    assert torch.equal(model(ids, labels)["tokens"], plain)
    logits = model(ids).flatten(0, 1)
    wanted = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=0.1)
    wanted = wanted + 0.01 * logits.logsumexp(-1).square().sum()
    assert_close(model.train()(ids, labels)["tokens"], wanted)


def test_a_student_that_says_what_its_teacher_says_has_no_divergence():
    teacher, ids, labels = make("grouped", d_model=32, seed=5), random_ids(), random_ids(seed=1).flatten()
    student = make()
    x, teacher_x = student.hidden(ids).flatten(0, 1), teacher.hidden(ids).flatten(0, 1).detach()
    found = summed_divergence(x, student.output(), teacher_x, teacher.output(), labels, temperature=2.0)
    p = (teacher(ids).flatten(0, 1) / 2).softmax(-1)
    q = (student(ids).flatten(0, 1) / 2).log_softmax(-1)
    wanted = 4 * F.kl_div(q, p, reduction="sum")
    assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found, list(student.parameters())),
        torch.autograd.grad(wanted, list(student.parameters())),
        strict=True,
    ):
        assert_close(a / b.abs().max(), b / b.abs().max())
    same = summed_divergence(teacher_x, teacher.output(), teacher_x, teacher.output(), labels, temperature=2.0)
    assert same.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral"])
def test_the_loss_falls_in_training(name):
    model = make(name, std=0.02).train()
    fed = feed(model, rows=4)
    labels = random_ids(rows=4, length=fed.get("decoder_ids", fed["ids"]).shape[1], seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = model(**fed, labels=labels)["tokens"] / labels.numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    assert losses[-1] < 1.0


# --- the classifier


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert", "t5"])
def test_a_classifier_does_not_see_padding(name):
    model = Classifier(make(name), 3)
    init_weights(model, 0)
    ids, mask = random_ids(), torch.ones(2, 12, dtype=torch.bool)
    mask[:, 8:] = False
    assert_close(model(ids, mask), model(ids[:, :8], mask[:, :8]))
    trunk = model.trunk
    hidden = trunk.encode(ids[:, :8])[0] if name == "t5" else trunk.hidden(ids[:, :8])
    assert_close(model(ids, mask), model.head(hidden.mean(1)))
    labels = torch.tensor([2, -100])
    wanted = F.cross_entropy(model(ids, mask)[:1], labels[:1])
    assert_close(model(ids, mask, labels)["tokens"], wanted)


def test_a_classifier_needs_a_name_for_each_class():
    assert Classifier(make(), 2).labels == ["0", "1"]
    with pytest.raises(ConfigError, match="labels: wanted 2 names, one for each class, found 1"):
        Classifier(make(), 2, ["spam"])


def test_a_transformer_is_made_of_settings_alone():
    assert isinstance(Transformer(make("t5").config), Transformer)
