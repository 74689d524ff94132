"""Feature replay: a model keeps what its language tokenizer heard of each language, for when one is added later.

By the same examples a model tells strangers from voices that it knows (`asr/familiarity.py`).

Who learns a language from its recordings alone never hears what it is not, and takes all speech for it. No recording
of the old languages is needed against that: the last layer of the language tokenizer is linear, so what it says of an
utterance follows from the mean hidden vector (Iscen et al., "Memory-Efficient Incremental Learning Through Feature
Adaptation", 2020). Of what it says of single frames (`routing_unit: frame`) only the mean is held.

Letters: B batch, T frames, H hidden width, K examples of a language, M of all, N languages.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.generations import generations_of, mixture_of
from mole_asr.corpus.batch import Batch
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path

log = logging.getLogger(__name__)

EXAMPLES_FILE = "language_examples.safetensors"
"""In the folder of a model."""
# Of each language, at most: 20 kB.
MOST_EXAMPLES = 50


@torch.no_grad()
def hear_examples(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Listens to utterances as the model's language tokenizer does.

    Args:
        model: a recogniser; it is put into evaluation mode.
        batches: utterances that it was not trained on: those that it was are easier to tell apart.

    Returns:
        Of each language the mean hidden vectors [K, H] of some of its utterances, taken evenly.
    """
    model.eval()
    languages, device = mixture_of(model).languages, next(model.parameters()).device
    heard: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        batch = batch.to(device)
        # Told the language, so that a Whisper does not ask its decoder; the language tokenizer hears the same.
        output = model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        hidden_BH = output.decision.evidence.mean_hidden(output.frames.valid_BT).cpu()
        for hidden_H, language in zip(hidden_BH, batch.languages_B.tolist(), strict=True):
            if language >= 0:
                heard[languages[language]].append(hidden_H)
    return {code: torch.stack(_some(each)) for code, each in heard.items()}


def _some(vectors: list[Tensor]) -> list[Tensor]:
    """As many as are kept, evenly: batches are sorted by length."""
    places = torch.linspace(0, len(vectors) - 1, min(len(vectors), MOST_EXAMPLES)).long()
    return [vectors[place] for place in places]


class Replay(nn.Module):
    """The cross-entropy of a language tokenizer on examples of old languages.

    Args:
        hidden_MH: the examples.
        languages_M: int64, their languages.
    """

    hidden_MH: Tensor
    languages_M: Tensor

    def __init__(self, hidden_MH: Tensor, languages_M: Tensor) -> None:
        super().__init__()
        self.register_buffer("hidden_MH", hidden_MH, persistent=False)
        self.register_buffer("languages_M", languages_M, persistent=False)

    def forward(self, model: nn.Module) -> Tensor:
        """The loss, a mean over the examples."""
        logits_MN = mixture_of(model).language_tokenizer.languages(self.hidden_MH)
        return functional.cross_entropy(logits_MN.float(), self.languages_M)


def replay_of(examples: Mapping[str, Tensor], model: nn.Module) -> Replay | None:
    """The replay for the training of a model's last generation; None without examples. Says which languages lack them.

    Args:
        examples: of each language [K, H].
        model: a recogniser that has grown.
    """
    mixture = mixture_of(model)
    old = mixture.languages[: mixture.num_languages - generations_of(model)[-1].languages]
    if lacking := [code for code in old if code not in examples]:
        log.warning(
            "model.freeze_old: the model keeps no examples of %s, which may be taken for the new language; write it "
            "anew with validation utterances of them, or put some of them among the recordings",
            ", ".join(lacking),
        )
    kept = [(n, examples[code]) for n, code in enumerate(old) if code in examples]
    if not kept:
        return None
    ids = [n for n, each in kept for _ in each]
    return Replay(torch.cat([each for _, each in kept]), torch.tensor(ids))


def save_examples(examples: Mapping[str, Tensor], folder: str | Path) -> None:
    """Writes examples into the folder of a model; without any, what is there goes."""
    if not examples:
        (Path(folder) / EXAMPLES_FILE).unlink(missing_ok=True)
        return
    with atomic_path(Path(folder) / EXAMPLES_FILE) as temporary:
        save_file({code: each.contiguous() for code, each in examples.items()}, temporary)


def load_examples(folder: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Reads what `save_examples` wrote; a model that is older than that has no examples.

    Args:
        folder: of the model.
        model: read from there.

    Raises:
        MoleError: the file cannot be read, or holds what this model's language tokenizer cannot have heard: examples
            of another width, empty ones, or no numbers.
    """
    path = Path(folder) / EXAMPLES_FILE
    try:
        examples = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise MoleError(f"{path}: cannot be read ({error}); copy the folder anew, or delete it") from None
    width = mixture_of(model).language_tokenizer.languages.in_features
    if any(each.shape[1:] != (width,) or not len(each) or not each.isfinite().all() for each in examples.values()):
        raise MoleError(f"{path}: is not of this model; delete it, or copy the model's folder anew")
    return examples
