"""The Python of mole_asr/moe/README.md works, block after block as a reader would type it."""

import re
from pathlib import Path

import torch

from mole_asr.moe import RoutingPlan

README = Path(__file__).parents[2] / "mole_asr" / "moe" / "README.md"


def test_the_blocks_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    y_BTD, plan = names["y_BTD"], names["plan"]
    assert isinstance(y_BTD, torch.Tensor) and isinstance(plan, RoutingPlan)
    assert y_BTD.shape == (2, 50, 256) and plan.expert_ids.shape == (87, 2)
    assert not y_BTD[1, 37:].any() and y_BTD[1, :37].any()
