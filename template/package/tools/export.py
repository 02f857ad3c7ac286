"""Export a run's weights as safetensors, with its config and a model card.

    python -m my_research.tools.export SIG                     # into exported/SIG/
    python -m my_research.tools.export SIG --version best
    python -m my_research.tools.export SIG --push ann/digits   # to the Hugging Face Hub as well

The files can be read without this repo's core; the card says how.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from . import escape_output, flatten, write_text

CARD = """---
tags: [pytorch, {project}]
---
# {project}, run {sig}

{about}

| metric | value |
|---|---|
{metrics}

The {version} checkpoint, after {epochs} epochs; its config is in [config.json](config.json).

```python
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))  # a {kind}
```
"""


def card(solver: Any, package: str, version: str, model: Any) -> str:
    """Return the text of a model card, with the metrics of the exported epoch."""
    history: list[Mapping[str, Any]] = solver.history
    numbers = {k: v for k, v in flatten(history[-1]).items() if isinstance(v, int | float)}
    rows = [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
    return CARD.format(
        project=package.replace("_", "-"),
        sig=solver.xp.sig,
        about=(importlib.import_module(package).__doc__ or "").strip(),
        metrics="\n".join(rows),
        version=version,
        epochs=len(history),
        kind=type(model).__name__,
    )


def export(solver: Any, package: str, version: str, name: str, folder: Path) -> None:
    """Write weights, config and card into a folder.

    Args:
        solver: of the run, restored.
        package: of the project.
        version: of the weights, for the card.
        name: of the module in the solver.
        folder: made if missing.
    """
    from safetensors.torch import save_file

    model = attrgetter(name)(solver)
    # Copies, as the format has no tensors that share memory, such as tied weights.
    weights = {key: t.detach().cpu().clone().contiguous() for key, t in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((solver.folder / "config.json").read_bytes())
    write_text(folder / "config.json", json.dumps(config, indent=2))
    write_text(folder / "README.md", card(solver, package, version, model))


def push(folder: Path, repo: str) -> str:
    """Upload a folder to the Hub; return its address, or exit with the reason."""
    import huggingface_hub as hub

    if hub.get_token() is None:
        sys.exit(f"export: not logged in, see `hf auth login`; the files are in {folder}")
    api: Any = hub.HfApi()
    api.create_repo(repo, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=str(folder)))


def main(argv: Sequence[str] | None = None) -> None:
    """Export a run; see the head of this file."""
    parser = argparse.ArgumentParser(description="Export a run's weights as safetensors.")
    parser.add_argument("sig", help="signature of the run")
    parser.add_argument("--version", default="latest", help="latest, best or ema")
    parser.add_argument("--module", default="model", help="attribute of the solver to export")
    parser.add_argument("--out", type=Path, help="folder; exported/SIG by default")
    parser.add_argument("--push", metavar="REPO", help="upload to this repo of the Hub as well")
    args = parser.parse_args(argv)
    escape_output()
    package = (__package__ or "").rpartition(".")[0]
    train = importlib.import_module(f"{package}.train")
    folder = args.out or Path("exported", args.sig)
    try:
        solver = train.load_solver(args.sig, args.version)
        export(solver, package, args.version, args.module, folder)
    except (AttributeError, RuntimeError, ImportError) as error:
        sys.exit(f"export: {error}")
    print(f"Exported: {folder}")
    if args.push:
        print(f"Pushed: {push(folder, args.push)}")


if __name__ == "__main__":
    main()
