"""The smallest solver: a linear layer learns to answer zero."""

import torch

from .core import BaseSolver, distrib
from .core.run import XP
from .schema import Config


class Solver(BaseSolver):
    """Shows what every solver has: state, stages, commits."""

    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp, cfg.checkpoint)
        self.cfg = cfg
        self.device = distrib.device(cfg.device)
        self.model = torch.nn.Linear(32, 1).to(self.device)
        distrib.broadcast_model(self.model)
        self.optim = torch.optim.Adam(self.model.parameters(), lr=cfg.optim.lr)
        self.best_state: dict[str, torch.Tensor] = {}
        # Any attribute can be state. Modules, lists and dicts are restored in place.
        self.register_stateful("model", "optim", "best_state")
        self.init_trackers(cfg.trackers, **cfg.wandb)

    def run(self) -> None:
        """Train until all epochs are committed, as the `run` of every solver does."""
        # Restores the run if it was stopped, and saves it when it is asked to stop.
        with self.running():
            # Epochs count from 1.
            for _ in range(self.epoch, self.cfg.epochs + 1):
                # A stage reports its metrics under its name.
                self.run_stage("train", self.train)
                self.run_stage("valid", self.valid)
                # A commit ends the epoch: the metrics join the history, the state is saved.
                self.commit()

    def train(self) -> dict[str, float]:
        """Make some updates, on noise."""
        # A run can be stopped after any of these steps, and resumes with the next.
        steps = self.steps(range(self.cfg.updates_per_epoch), self.cfg.log_updates)
        for _ in steps:
            loss = self.loss()
            self.optim.zero_grad()
            with distrib.eager_sync_model(self.model):
                loss.backward()
            steps.log({"loss": loss})
            self.optim.step()
        return steps.metrics()

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        """Return the loss on fresh noise, and keep the best model so far."""
        metrics = distrib.average_metrics({"loss": self.loss()})
        if metrics["loss"] < min((past["valid"]["loss"] for past in self.history), default=1e9):
            self.best_state = {name: p.clone() for name, p in self.model.state_dict().items()}
        return metrics

    def loss(self) -> torch.Tensor:
        """Return the distance of the answers to a batch of noise from zero."""
        answers: torch.Tensor = self.model(torch.randn(64, 32, device=self.device))
        return answers.abs().mean()
