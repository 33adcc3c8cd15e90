"""What the states of a training take of a rank's memory: weights, gradients, and what the optimizer keeps."""

from pipeline.parallel.engine import Precision
from pipeline.stage import Run

FP32 = 4  # bytes


def state_bytes(params: int, state_copies: int, precision: Precision, run: Run) -> int:
    """Return the bytes of a rank's share of a model's states: what it needs at the least.

    Left out are activations and logits, the buffers of exchanges between ranks, what torch and its libraries take of
    their own (some hundred MB, on a GPU more), and what differs between tensor-parallel ranks, which are taken to share
    all weights evenly. What `run.parallel.offload` keeps on the host counts too.

    Args:
        params: Weights of the whole model.
        state_copies: Numbers in fp32 that optimizer and average keep for each weight.
    """
    mine = params / run.parallel.tensor
    data_ranks = run.ranks // run.parallel.tensor
    zero, in_16_bits = run.parallel.zero, precision != "fp32"
    simple = data_ranks == 1 and zero < 3 and not in_16_bits and run.parallel.offload is None  # see EngineSettings
    if zero == 0 or simple:
        return round(mine * FP32 * (2 + state_copies))
    shared = mine / data_ranks
    weights = 2 if in_16_bits else FP32
    gradients = 2 + FP32 if in_16_bits else FP32  # of 16 bits, summed in fp32
    whole = {1: weights + gradients, 2: weights, 3: 0}[zero]
    cut = {1: 0, 2: gradients, 3: weights + gradients}[zero] + FP32 * (1 + state_copies)  # with fp32 masters
    return round(mine * whole + shared * cut)
