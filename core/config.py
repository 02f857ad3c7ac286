"""The config: what has changed in one, and what is wrong with one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .utils import flatten

NEW_KEY = "a new one has its type in schema.py and its value in config.yaml"


def changes(saved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Compare two configs, but for their sections `dora` and `slurm`.

    Returns:
        For each dotted key whose value differs, a text such as `optim.lr: 0.1 -> 0.2`.
    """
    then, now = flatten(saved), flatten(config)
    return {
        key: f"{key}: {then.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(then.keys() | now.keys())
        if repr(then.get(key)) != repr(now.get(key))
        and then.get(key) != now.get(key)
        and not is_without_effect(key)
    }


def is_without_effect(override: str) -> bool:
    """Is an override of a section that Dora reads before it looks at overrides?"""
    return override.lstrip("+~").partition("=")[0].partition(".")[0] in ("dora", "slurm")


def check_overrides(overrides: Iterable[str], known: Sequence[str], typed: bool) -> None:
    """Refuse keys that Hydra accepts, but that would have no effect, or no type."""
    for override in overrides:
        if is_without_effect(override):
            raise SystemExit(
                f"Config error: {override}: set it in config.yaml, which is read before overrides; "
                "for jobs there are `dora launch -g` and, in a grid, `launcher.slurm_`"
            )
        if (
            typed
            and override.startswith("+")
            and override.strip("+").partition("=")[0] not in known
        ):
            raise SystemExit(f"Config error: {override}: no such key, {NEW_KEY}")


def explain_error(error: BaseException, known: Sequence[str] = ()) -> str:
    """What is wrong with the config, from an error and its causes, with the nearest known key."""
    # Hydra's parser keeps the override that it can't read apart from what it says.
    lines = [override] if (override := getattr(error, "override", "")) else []
    if options := getattr(error, "options", None):
        group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
        return f"there is no {group}={name}: {group} is one of {', '.join(sorted(options))}"
    cause: BaseException | None = error
    key = ""
    while cause is not None:
        text = str(cause) or type(cause).__name__
        found = re.search(r"full_key: (\S+)", text)
        key = key or (found[1] if found else "")
        text = re.sub(r"^In '\S+': \w+ raised while composing config:\n", "", text)
        lines.append(text.replace(":\n", ": ").splitlines()[0].rstrip("."))
        if (mark := getattr(cause, "problem_mark", None)) is not None:  # of YAML's parser
            lines.append(f"line {mark.line + 1}: {getattr(cause, 'problem', '')}")
        cause = cause.__cause__
    if key and not any(key in line for line in lines):
        lines.append(f"in {key}")
    if inner := [name for name in known if name.startswith(f"{key}.")]:
        lines.append(f"its keys are {', '.join(inner)}")
    elif key and known and key not in known:
        ends = {name.rpartition(".")[2]: name for name in known}  # `lr` may be that of `optim`
        near = [ends.get(n, n) for n in difflib.get_close_matches(key, [*known, *ends], n=1)]
        lines.append(f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(known)}")
    half_new = "Missing mandatory value" if known else "not in '"  # in the schema or config only
    hints = {
        half_new: NEW_KEY,
        "is not a ListConfig": "a list is written [a, b]",
        "Ambiguous value": "one value makes one run; for several runs, write a grid",
    }
    lines += [hint for words, hint in hints.items() if any(words in line for line in lines)]
    return ": ".join(dict.fromkeys(lines))
