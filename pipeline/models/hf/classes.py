"""All layouts, and which of them computes a model. Nothing here imports torch."""

from pipeline.models.config import AnyModel
from pipeline.models.hf.decoders import GPT2, LLAMA, MISTRAL, MIXTRAL, QWEN3, QWEN3_MOE
from pipeline.models.hf.encoders import BERT, MASKED_BERT, MODERN_BERT, T5
from pipeline.models.hf.layout import Layout

# The first that computes a model is the one that it is exported to.
LAYOUTS = (LLAMA, GPT2, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, BERT, MASKED_BERT, MODERN_BERT, T5)
NUM_NAMED = 2  # so many of the nearest layouts are named to whoever has a model that none computes


def layout_of(config: AnyModel) -> Layout | None:
    """Return the layout that computes exactly what this model computes, or None."""
    return next((layout for layout in _family(config) if not layout.differences(config)), None)


def hf_layout(config: AnyModel) -> str | None:
    """Return which of Hugging Face's classes computes exactly what this model computes, or None."""
    layout = layout_of(config)
    return None if layout is None else layout.architecture


def unexportable(config: AnyModel) -> str | None:
    """Return why a model cannot be exported to Hugging Face's layouts, or None if it can."""
    if layout_of(config) is not None:
        return None
    nearest: list[tuple[set[str], str]] = []  # the first layouts of those that need least, each another thing
    for layout in sorted(_family(config), key=lambda layout: len(layout.differences(config))):
        needs = set(layout.differences(config))
        if not any(needs >= others for others, _ in nearest):
            nearest.append((needs, layout.architecture))
    ways = [f"{architecture} would need {', '.join(sorted(needs))}" for needs, architecture in nearest[:NUM_NAMED]]
    return f"no Hugging Face layout computes this model: {'; '.join(ways)}"


def _family(config: AnyModel) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.kind == config.kind]
