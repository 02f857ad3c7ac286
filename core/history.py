"""The history of a run: a dict of stages an epoch, a dict of metrics a stage; in one JSON file."""

from __future__ import annotations

import json
import logging
import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .utils import write_and_rename

logger = logging.getLogger(__name__)

History = list[dict[str, Any]]

# Names of metrics that are better when they are higher.
HIGHER = re.compile(
    r"^(?!.*(brier|loss|neg|nll|nonfinite|perplexity|(?<![a-z])err(or)?s?(?![a-z]))).*(?<![a-z])"
    r"(m?acc|accuracy|au[a-z]*c|bleu|chrf|cider|correct|dice|elbo|elo|f1|hits@|jaccard|kappa"
    r"|likelihood|m?ap|mcc|meteor|m?iou|m?rr|ndcg|pass@|pearson|pesq|precision|psnr|r2|recall"
    r"|returns?|rewards?|rouge|[a-z]*score|(si_?)?s[dn]r|similarity|spearman|ssim|stoi|success"
    r"|top\d+|wins?)\d*(?![a-z])"
)


def is_higher_better(metric: str) -> bool:
    """Whether a metric, as `stage.name`, is an accuracy, score, reward or the like, by its name."""
    return bool(HIGHER.search(metric.partition(".")[2].lower()))


@dataclass
class FileLink:
    """A history kept in one JSON file."""

    history_file: Path
    history: History = field(default_factory=list)

    def load(self) -> None:
        """Read what was published last, if anything."""
        if self.history_file.exists():
            self.history = json.loads(self.history_file.read_text())

    def update_history(self, history: History) -> None:
        HistoryFile(self).write(history)


class HistoryFile:
    """The file of a run's history, in which Dora and `report` look.

    An epoch is formatted once: with Dora's own writing, a long history would hold up the training.

    Args:
        link: of the run; one without a `history_file` does its own writing.
    """

    def __init__(self, link: Any) -> None:
        self._link = link
        self._epochs: list[tuple[Any, str]] = []  # as they were, and as they were written

    def read(self) -> History:
        """What was published last; nothing if that is damaged, which is said."""
        try:
            self._link.load()
        except ValueError as error:
            logger.warning(
                "%s can't be read: %s; the checkpoint has the history as well",
                self._link.history_file,
                error,
            )
            return []
        history: History = self._link.history
        return history

    def write(self, history: History) -> None:
        """Replace the published history."""
        path = getattr(self._link, "history_file", None)
        if path is None:
            self._link.update_history(history)
            return
        for index, epoch in enumerate(history):
            if index == len(self._epochs) or self._epochs[index][0] != epoch:
                self._epochs[index : index + 1] = [(deepcopy(epoch), json.dumps(epoch))]
        del self._epochs[len(history) :]
        self._link.history[:] = history
        with write_and_rename(path, "w") as file:
            file.write("[\n" + ",\n".join(line for _, line in self._epochs) + "\n]\n")
