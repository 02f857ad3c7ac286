"""The solver: data, models and optimizers, and what one epoch does with them."""

import torch

from .core import BaseSolver, Formatter, distrib
from .core.adversarial import AdversarialLoss
from .core.data import loader, split_batch
from .core.run import XP
from .core.utils import make_grid
from .data import load_digits
from .model import Discriminator, Generator, frechet_distance
from .schema import Config


class Solver(BaseSolver):
    """Trains a generator of digits against a discriminator."""

    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp, cfg.checkpoint)
        self.cfg = cfg
        self.device = distrib.device(cfg.device)

        train_set, valid_set = load_digits()
        self.train_loader = loader(
            train_set,
            split_batch(cfg.data.batch_size),
            shuffle=True,
            seed=cfg.seed,
            limit=cfg.data.limit,
            num_workers=cfg.data.num_workers,
            drop_last=True,
        )
        self.real = valid_set.tensors[0]

        self.model = Generator(cfg.model.noise, cfg.model.width).to(self.device)
        distrib.broadcast_model(self.model)
        self.optim = self.adam(self.model)
        adversary = Discriminator(cfg.model.width, cfg.model.dropout).to(self.device)
        # Holds the discriminator and its optimizer; both are state.
        self.adversarial = AdversarialLoss(adversary, self.adam(adversary))

        self.register_stateful("model", "optim", "adversarial")
        self.init_trackers(cfg.trackers, **cfg.wandb)

    def adam(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return an optimizer that forgets quickly, for the loss changes under it."""
        betas = (self.cfg.optim.momentum, 0.999)
        return torch.optim.Adam(model.parameters(), self.cfg.optim.lr, betas)

    def train(self) -> dict[str, float]:
        """Train both models one epoch."""
        self.model.train()
        self.adversarial.train()
        names = ["loss", "adversary_loss"]
        steps = self.steps(
            self.train_loader, self.cfg.log_updates, self.cfg.log_every, finite=names
        )
        for (real,) in steps:  # [B, 1, 8, 8]
            fake = self.model(torch.randn(len(real), self.cfg.model.noise, device=self.device))
            real = real.to(self.device, non_blocking=True)
            adversary_loss = self.adversarial.train_adv(fake, real)
            loss = self.adversarial(fake)
            with distrib.eager_sync_model(self.model):  # averages gradients over processes
                loss.backward()
            metrics = {"loss": loss, "adversary_loss": adversary_loss}
            steps.log(metrics, weight=len(real))  # refuses a NaN before it can be saved
            self.optim.step()
            self.optim.zero_grad()
        return steps.metrics()

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        """Return the distance of made images from held-out real ones, and show some of them.

        All processes make the same images, always from the same noise.
        """
        self.model.eval()
        self.adversarial.eval()
        dice = torch.Generator().manual_seed(0)
        noise = torch.randn(self.cfg.samples, self.cfg.model.noise, generator=dice)
        images = self.model(noise.to(self.device)).cpu()
        loss = self.adversarial(images.to(self.device)).item()
        self.log_image("valid", "samples", make_grid((images[:64] + 1) / 2))
        return {"loss": loss, "frechet": frechet_distance(images, self.real).item()}

    def get_formatter(self, stage_name: str) -> Formatter:
        """Return how metrics are shown."""
        return Formatter({"*loss": ".4f", "frechet": ".2f", "duration": ".1f"})
