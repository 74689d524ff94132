"""What is compared: conditions (which languages) and systems (where the experts are, and whose)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mole_asr.text.policies import ExpertsConfig

HERE = Path(__file__).parent


def read(name: str) -> dict[str, Any]:
    """A config of this recipe."""
    return yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Condition:
    """Languages to learn.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        windows: of each language's test texts that are measured.
    """

    name: str
    title: str
    windows: int

    @property
    def languages(self) -> list[str]:
        """Codes."""
        return read(f"conditions/{self.name}")["data"]["languages"]


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        config: file in `systems/`; None: `<name>.yaml`.
        renormalize: whether the weights of a token's experts sum to one; False: raw, as published.
        an_expert_each: whether there are as many experts as languages although no label chooses.
    """

    name: str
    title: str
    config: str | None = None
    renormalize: bool | None = None
    an_expert_each: bool = False

    @property
    def file(self) -> str:
        """Name of the config."""
        return f"systems/{self.config or self.name}"

    def words(self, condition: Condition) -> list[str]:
        """What `mole-asr fit` is told beside the configs."""
        words = [] if self.renormalize is None else [f"--model.experts.renormalize={str(self.renormalize).lower()}"]
        return words + ([f"--model.experts.num_experts={len(condition.languages)}"] if self.an_expert_each else [])

    def experts(self, condition: Condition) -> ExpertsConfig:
        """The experts that the config and the words make."""
        values = read(self.file)["model"]["experts"] | {"renormalize": self.renormalize}
        return ExpertsConfig(**values, **({"num_experts": len(condition.languages)} if self.an_expert_each else {}))


CONDITIONS = {
    condition.name: condition
    for condition in (Condition("12", "12 major languages", 48), Condition("50", "12 major and 38 minor languages", 16))
}
START = "start"
SYSTEMS = {
    system.name: system
    for system in (
        System("dense", "dense"),
        System("wide-last2", "dense, twice as wide in the last 2 layers"),
        System("post-moe", "Post-MoE: an expert a language, last 2 layers"),
        System("post-moe-raw", "the same, raw weights as published", "post-moe", renormalize=False),
        System("families", "an expert a branch of languages, last 2 layers"),
        System("wide-all", "dense, twice as wide in all layers"),
        System("all", "an expert a language, all layers"),
        System("all-free", "as many experts in all layers, no label", an_expert_each=True),
    )
}
DENSE = "dense"
EVERYWHERE = ("all", "all-free")
