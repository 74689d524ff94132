"""The `bench routing` verb: which expert of a trained model computes which language, as a table and a picture.

Letters: L spoken languages (those of the model), E experts, S samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mole_asr.errors import MoleError, print_skipped

if TYPE_CHECKING:
    from torch import Tensor

    from mole_asr.asr.checkpoint import Recogniser
    from mole_asr.corpus.manifest import Manifest

UNITS = ("utterance", "frame")


@dataclass(frozen=True)
class RoutingLoads:
    """Frames of each language that each expert computed, where the language is decided an utterance or a frame.

    Attributes:
        languages: of the model.
        experts: their names: those of the languages, or of the families that share them.
        loads_LE: unit -> float32 [L, E] frames; rows are true languages.
        reliability: unit -> mean r over frames.
        failures: "id: reason" of each utterance that could not be read and was skipped.
    """

    languages: list[str]
    experts: list[str]
    loads_LE: dict[str, "Tensor"]
    reliability: dict[str, float]
    failures: list[str]

    def __str__(self) -> str:
        from mole_asr.moe.statistics import purity

        lines = []
        for unit, loads_LE in self.loads_LE.items():
            lines.append(f"decided by {unit}: share of a language's frames (%) that each expert computes")
            lines.append("spoken  " + "".join(f"{name:>8}" for name in self.experts) + "   frames")
            for code, load_E in zip(self.languages, loads_LE, strict=True):
                shares = "".join(f"{100 * load / max(float(load_E.sum()), 1):8.1f}" for load in load_E.tolist())
                lines.append(f"{code:<8}{shares}{int(load_E.sum()):9d}")
            load = "".join(f"{100 * load:8.1f}" for load in (loads_LE.sum(0) / loads_LE.sum().clamp(min=1)).tolist())
            lines.append(f"load    {load}")
            lines.append(f"purity {float(purity(loads_LE)):.3f}, mean reliability {self.reliability[unit]:.3f}\n")
        return "\n".join(lines).rstrip()


def routing(model: str, manifest: str, output: str | None = None) -> RoutingLoads:
    """Runs a trained model on a manifest and counts who computes what; the model hears the language by itself.

    Args:
        model: folder of the trained model.
        manifest: utterances of known languages (.jsonl).
        output: picture to write (.svg): a heat map a unit of decision; left out, there is only the table.

    Raises:
        MoleError: the model or the manifest cannot be read, the model was pruned or its experts are not chosen by
            language, or no utterance has a language that the model knows.
    """
    from mole_asr.asr.checkpoint import load_model
    from mole_asr.corpus.manifest import Manifest

    if output is not None and not output.endswith(".svg"):
        raise MoleError(f"{output}: the picture is written as .svg; give such a name")
    recogniser, _ = load_model(model)
    if recogniser.mixture.config.mixture != "language":
        raise MoleError(f"{model}: no language chooses its experts; give a model with the mixture 'language'")
    if recogniser.mixture.kept is not None:
        raise MoleError(f"{model}: was pruned; give the model that it was made of")
    loads = _count(recogniser, Manifest(manifest))
    if output is not None:
        _draw(loads, Path(output))
    print_skipped(loads.failures)
    return loads


def _count(recogniser: "Recogniser", manifest: "Manifest") -> RoutingLoads:
    import torch

    experts = recogniser.mixture.expert_names
    loads_LE = {unit: torch.zeros(len(recogniser.languages), len(experts)) for unit in UNITS}
    reliability = dict.fromkeys(UNITS, 0.0)
    failures = []
    for utterance in manifest:
        if utterance.language not in recogniser.languages:
            continue
        try:
            found = _route(recogniser, torch.from_numpy(utterance.read_whole()))
        except (MoleError, OSError) as error:
            failures.append(f"{utterance.id}: {error}")
            continue
        spoken = recogniser.languages.index(utterance.language)
        for unit, (loads_E, total) in found.items():
            loads_LE[unit][spoken] += loads_E
            reliability[unit] += total
    frames = float(loads_LE["frame"].sum())
    if not frames:
        known = ", ".join(recogniser.languages)
        first = f"; {failures[0]}" if failures else ""
        raise MoleError(f"{manifest.path}: no readable utterance in a language of the model ({known}){first}")
    mean = {unit: total / frames for unit, total in reliability.items()}
    return RoutingLoads(recogniser.languages, experts, loads_LE, mean, failures)


def _route(recogniser: "Recogniser", audio_S: "Tensor") -> dict[str, tuple["Tensor", float]]:
    """For each unit of decision: frames [E] that each expert computes, and the sum of their reliabilities."""
    import torch

    from mole_asr.moe.losses import expert_counts
    from mole_asr.moe.routers import RoutingContext

    with torch.inference_mode():
        heard = recogniser(audio_S[None], torch.tensor([len(audio_S)]))
        evidence, rows = heard.decision.evidence, heard.frames.rows
        found = {}
        for unit, logits, reliability_logits in (
            ("utterance", evidence.logits_BN, evidence.reliability_logits_B),
            ("frame", evidence.evidence_BTN, evidence.reliability_logits_BT),
        ):
            context = RoutingContext(rows, logits, reliability_logits=reliability_logits)
            plan = recogniser.mixture.language_router(None, context).to_token_layout(rows.num_rows)
            found[unit] = (expert_counts(plan.expert_ids, plan.num_experts), float(plan.gates.sum()))
    return found


def _draw(loads: RoutingLoads, path: Path) -> None:
    """Two heat maps side by side: rows are spoken languages, columns experts, each row summing to 100 %."""
    import numpy as np
    from matplotlib.figure import Figure

    from mole_asr.moe.statistics import purity
    from mole_asr.score.charts import save_figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for place, (unit, loads_LE) in enumerate(loads.loads_LE.items(), 1):
        axes = figure.add_subplot(1, len(loads.loads_LE), place)
        shares_LE = (100 * loads_LE / loads_LE.sum(1, keepdim=True).clamp(min=1)).numpy()
        image = axes.imshow(shares_LE, vmin=0, vmax=100, cmap="Blues")
        for (spoken, expert), share in np.ndenumerate(shares_LE):
            axes.text(expert, spoken, f"{share:.0f}", ha="center", va="center", color="w" if share > 60 else "k")
        axes.set_xticks(range(len(loads.experts)), loads.experts)
        axes.set_yticks(range(len(loads.languages)), loads.languages)
        axes.set_xlabel("expert")
        axes.set_ylabel("spoken")
        axes.set_title(f"decided by {unit}: purity {float(purity(loads_LE)):.3f}", fontsize=10)
    figure.colorbar(image, ax=figure.axes, label="% of the language's frames")
    save_figure(figure, path)
