"""The tokens of transformers: greedy, with a penalty for repetition, and by beam search."""

import pytest
import torch
import transformers

from pipeline.models.generation.settings import BeamSearch, Greedy
from pipeline.models.generation.writing import generate
from pipeline.models.hf.load import import_hf

PROMPTS = [[5, 9, 3], [4, 2, 8, 30, 31, 32, 7], [11, 12], [20] * 5]
START, END, PAD, NEW = 0, 1, 0, 12
IDS = {"vocab_size": 40, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
THEIRS = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "T5ForConditionalGeneration": ("T5Config", T5 | {"decoder_start_token_id": START}),
}


@pytest.fixture(params=THEIRS)
def pair(request, tmp_path):
    """Give a model of theirs with random weights, and the same as ours."""
    name, settings = THEIRS[request.param]
    theirs = getattr(transformers, request.param)(getattr(transformers, name)(**IDS, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    theirs.save_pretrained(tmp_path)
    return theirs, import_hf(tmp_path)


def of_theirs(theirs, prompt, end, **settings):
    ids = torch.tensor([prompt])
    made = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=end,
        pad_token_id=PAD,
        **settings,
    )[0].tolist()
    made = made[1 if theirs.config.is_encoder_decoder else len(prompt) :]
    return made[: made.index(end)] if end in made else made


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_greedy(pair, penalty):
    theirs, ours = pair
    found = generate(ours, PROMPTS, Greedy(repetition_penalty=penalty), max_new_tokens=NEW, end_id=END, start_id=START)
    assert found == [of_theirs(theirs, prompt, END, repetition_penalty=penalty) for prompt in PROMPTS]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_beams(pair, length_penalty):
    theirs, ours = pair
    free = generate(ours, PROMPTS, Greedy(), max_new_tokens=NEW, start_id=START)
    settings, lengths = BeamSearch(num_beams=4, length_penalty=length_penalty), set()
    for end in (END, free[0][4]):  # the second one ends beams in the middle of the search
        found = generate(ours, PROMPTS, settings, max_new_tokens=NEW, end_id=end, start_id=START)
        assert found == [of_theirs(theirs, p, end, num_beams=4, length_penalty=length_penalty) for p in PROMPTS]
        lengths |= {len(ids) for ids in found}
    assert len(lengths) > 1 or length_penalty > 0  # which favours the longest
