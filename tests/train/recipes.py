"""The recipes of the repository, and the smoke recipe made narrower still."""

from pathlib import Path

from train import config

CONFIGS = Path(config.__file__).parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))
NARROW = Path(__file__).with_name("narrow.toml")
