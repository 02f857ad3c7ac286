"""The data: the help texts that come with Python, 465,000 characters of English on its language."""

from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Alphabet:
    """Characters and their numbers.

    Args:
        text: holds every character there is.
    """

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self._numbers = {character: number for number, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Numbers `[T]` of the characters of a text; ValueError names one that there is not."""
        if unknown := [character for character in text if character not in self._numbers]:
            raise ValueError(f"no {unknown[0]!r} in the alphabet: {''.join(self.characters)!r}")
        return torch.tensor([self._numbers[character] for character in text])

    def decode(self, numbers: Tensor) -> str:
        """The text of numbers `[T]`."""
        return "".join(self.characters[number] for number in numbers.tolist())


class Windows(Dataset[Tensor]):
    """Stretches of a text, each with its next character.

    Args:
        numbers: the text, `[T]`.
        length: characters in a stretch.
        stride: from the begin of one to that of the next.
    """

    def __init__(self, numbers: Tensor, length: int, stride: int) -> None:
        self.numbers = numbers
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        return 1 + (len(self.numbers) - self.length - 1) // self.stride

    def __getitem__(self, index: int) -> Tensor:
        """Return stretch number `index` and one character more, `[length + 1]`."""
        begin = index * self.stride
        return self.numbers[begin : begin + self.length + 1]


def load_text() -> tuple[Alphabet, Tensor, Tensor]:
    """Return the alphabet, the text to train on and the text to validate with, its last tenth."""
    text = "\n\n".join(dict.fromkeys(topics[name] for name in sorted(topics)))
    alphabet = Alphabet(text)
    numbers = alphabet.encode(text)
    train, valid = numbers.tensor_split([len(numbers) * 9 // 10])
    return alphabet, train, valid
