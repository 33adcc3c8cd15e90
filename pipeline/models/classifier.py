"""A classifier of texts on top of a Transformer.

Letters of the shape suffixes: B rows, T positions, D d_model, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.loss import summed_loss
from pipeline.models.transformer import Transformer


class Classifier(nn.Module):
    """A linear layer on the mean of a Transformer's last layer, taken over the positions that are not padding."""

    def __init__(self, trunk: Transformer, num_classes: int, labels: Sequence[str] | None = None) -> None:
        """Put a classifier on `trunk`; `labels` names the classes, by default "0", "1" and so on."""
        super().__init__()
        self.labels = [str(c) for c in range(num_classes)] if labels is None else list(labels)
        if len(self.labels) != num_classes:
            raise ConfigError(f"labels: wanted {num_classes} names, one for each class, found {len(self.labels)}")
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.d_model, num_classes)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return logits (B, C), or the summed loss of `labels` (B), a scalar in fp32, under the name "tokens".

        Args:
            ids: (B, T).
            mask: (B, T); true at real positions. Padding must come after them.
        """
        if missing := -ids.shape[1] % self.trunk.length_multiple:
            ids, mask = F.pad(ids, (0, missing)), F.pad(mask, (0, missing))
        documents_BT = torch.where(mask, 0, -1)
        if self.trunk.config.kind == "encoder_decoder":
            x_BTD, _ = self.trunk.encode(ids, documents_BT)
        else:  # no real position of a decoder sees the padding after it, but experts would have room for it
            apart = self.trunk.config.kind == "encoder" or self.trunk.config.experts is not None
            x_BTD = self.trunk.hidden(ids, documents=documents_BT if apart else None)
        weight_BT1 = mask.unsqueeze(-1).to(x_BTD.dtype)
        mean_BD = (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        logits_BC: Tensor = self.head(mean_BD)
        if labels is None:
            return logits_BC
        return {"tokens": summed_loss(logits_BC, labels)}
