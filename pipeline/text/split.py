"""Which documents are held out of training."""

import numpy as np
import numpy.typing as npt


def held_out(text_hash: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which documents are held out: those whose content hash lies in the lowest `fraction` of all hashes.

    The choice depends on a document's text alone: not on order, tokenizer or what else is in the corpus, and copies
    of a text are always on the same side.
    """
    return text_hash < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
