"""Train with `dora run`, or `python -m {{ cookiecutter.package_name }}.train`; both take `key=value`."""

import torch

from .core import distrib, setup_logging
from .core.launch import hydra_main
from .core.rng import seed_everything
from .core.utils import UserError
from .schema import Config
from .solver import Solver


@hydra_main(config_path="config", config_name="config", schema=Config)
def main(cfg: Config) -> None:
    """Train, or resume training, the run that the config describes."""
    setup_logging()
    distrib.init()
    seed_everything(cfg.seed)
    torch.autograd.set_detect_anomaly(cfg.detect_anomaly)
    Solver(cfg).run()


def load_solver(sig: str, version: str = "latest", device: str = "cpu") -> Solver:
    """Return the solver of a run, to look at in a notebook or script.

    Args:
        sig: the run's signature.
        version: `latest` for the last commit, `best`, or `ema` for the averaged weights.
        device: of the solver.
    """
    xp = main.get_xp_from_sig(sig)
    xp.cfg.device = device
    solver = Solver(xp.cfg, xp)
    if not solver.restore(read_only=True, version=version):
        raise UserError(f"run {sig} has no checkpoint yet: {solver.checkpoint_path}")
    return solver


if __name__ == "__main__":
    main()
