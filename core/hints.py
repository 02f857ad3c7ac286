"""Hints on errors in a config: one line from all causes, with the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence


def explain(error: BaseException, known: Sequence[str] = ()) -> str:
    """Return a line on an error in the config, from all its causes, with the nearest key."""
    if options := getattr(error, "options", None):
        group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
        return f"there is no {group}={name}: {group} is one of {', '.join(sorted(options))}"
    # Hydra's parser keeps the override that it can't read apart from its message.
    lines = [override] if (override := getattr(error, "override", "")) else []
    cause: BaseException | None = error
    key = ""
    while cause is not None:
        text = str(cause) or type(cause).__name__
        key = key or (found[1] if (found := re.search(r"full_key: (\S+)", text)) else "")
        text = re.sub(r"^In '\S+': \w+ raised while composing config:\n", "", text)
        lines.append(f"{text}\n".replace(":\n", ": ").splitlines()[0].rstrip("."))
        if (mark := getattr(cause, "problem_mark", None)) is not None:  # of YAML's parser
            lines.append(f"line {mark.line + 1}: {getattr(cause, 'problem', '')}")
        cause = cause.__cause__
    return ": ".join(dict.fromkeys([*lines, *_hints(lines, key, known)]))


def _hints(lines: Sequence[str], key: str, known: Sequence[str]) -> Iterator[str]:
    """Yield hints on an error in the config."""
    if key and not any(key in line for line in lines):
        yield f"in {key}"
    if inner := [name for name in known if name.startswith(f"{key}.")]:
        yield f"its keys are {', '.join(inner)}"
    elif key and known and key not in known:
        ends = {name.rpartition(".")[2]: name for name in known}  # `lr` may be that of `optim`
        near = [ends.get(n, n) for n in difflib.get_close_matches(key, [*known, *ends], n=1)]
        yield f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(known)}"
    half_new = "Missing mandatory value" if known else "not in '"  # in the schema or config only
    hints = {
        half_new: "a new one has its type in schema.py and its value in config.yaml",
        "is not a ListConfig": "a list is written [a, b]",
        "Ambiguous value": "one value makes one run; for several runs, write a grid",
    }
    yield from (hint for words, hint in hints.items() if any(words in line for line in lines))
