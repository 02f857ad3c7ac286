"""The model: a small transformer that guesses the next character. It knows nothing of training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention and a multilayer perceptron, each normalised before and added.

    Args:
        width: size of the hidden state.
        heads: of the attention.
        dropout: probability of dropping a hidden unit.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[B, T, width]` to `[B, T, width]`."""
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.projections(self.before_attention(hidden)).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        hidden = hidden + self.dropout(self.merge(seen.transpose(1, 2).flatten(2)))
        result: Tensor = hidden + self.dropout(self.perceptron(hidden))
        return result


class Transformer(nn.Module):
    """Character-level language model, after Radford et al. (2019).

    Args:
        characters: size of the alphabet.
        context: characters it looks back at, at most.
        layers: number of blocks.
        width: size of the hidden state.
        heads: of each attention.
        dropout: probability of dropping a hidden unit.
    """

    def __init__(
        self, characters: int, context: int, layers: int, width: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, numbers: Tensor) -> Tensor:
        """Return logits of the next characters `[B, T, characters]`, for characters `[B, T]`."""
        places = torch.arange(numbers.shape[1], device=numbers.device)
        hidden = self.characters(numbers) + self.positions(places)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits

    @torch.no_grad()
    def continue_text(self, numbers: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Return characters `[T]` with `length` more after them, drawn by the generator."""
        for _ in range(length):
            logits = self(numbers[None, -self.context :])[0, -1]
            drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
            numbers = torch.cat([numbers, drawn.to(numbers.device)])
        return numbers
