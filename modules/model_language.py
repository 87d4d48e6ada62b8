"""Language model BCN, the bidirectional cloze network (ABINet, language model).

Legend: N texts, T steps (end token counted), E features, C classes.
"""

import torch
from torch import Tensor, nn

from modules.outputs import LanguageOutput
from modules.transformer import PositionalEncoding, TransformerDecoder

# The only step of a shorter text would have nothing to attend to.
SHORTEST_TEXT = 2


class LanguageModel(nn.Module):
    """Predicts every character from the characters on both sides of it.

    Queries are positions and the memory is the text, so that no step sees its own character in any layer. `detach`
    stops gradients into the probabilities; `use_self_attn` adds self-attention among the queries.
    """

    float32_layers = ("cls", "proj", "token_encoder", "pos_encoder")

    def __init__(
        self,
        *,
        num_classes: int = 37,
        num_steps: int = 26,
        num_layers: int = 4,
        d_model: int = 512,
        nhead: int = 8,
        d_inner: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        detach: bool = True,
        use_self_attn: bool = False,
    ):
        super().__init__()
        self.detach = detach
        self.proj = nn.Linear(num_classes, d_model, bias=False)
        self.token_encoder = PositionalEncoding(length=num_steps, d_model=d_model, dropout=dropout)
        self.pos_encoder = PositionalEncoding(length=num_steps, d_model=d_model, dropout=0.0)
        self.model = TransformerDecoder(
            num_layers=num_layers,
            d_model=d_model,
            nhead=nhead,
            d_inner=d_inner,
            dropout=dropout,
            activation=activation,
            use_self_attn=use_self_attn,
        )
        self.cls = nn.Linear(d_model, num_classes)
        self.register_buffer("own_step", torch.eye(num_steps, dtype=torch.bool), persistent=False)  # (T, T)

    def forward(self, probabilities: Tensor, lengths: Tensor) -> LanguageOutput:
        """probabilities (N, T, C), summing to 1 over C; lengths (N,) with the end token, clamped to [2, T] here.

        Every step attends to all other steps before the length.
        """
        if self.detach:
            probabilities = probabilities.detach()
        memory = self.token_encoder(self.proj(probabilities))  # (N, T, E)
        steps = torch.arange(memory.shape[1], device=lengths.device)
        outside = steps >= lengths.clamp(SHORTEST_TEXT, memory.shape[1])[:, None]  # (N, T)
        feature = self.model(
            self.pos_encoder.positions().expand(memory.shape[0], -1, -1),
            memory,
            memory_mask=self.own_step,
            memory_key_padding_mask=outside,
            tgt_key_padding_mask=outside,
        )  # (N, T, E)
        return LanguageOutput(logits=self.cls(feature), feature=feature)
