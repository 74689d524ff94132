"""Feature replay: what the language tokenizer heard of old languages, kept in the folder of a model.

Who learns a language from its recordings alone never hears what it is not, and takes all speech for it. No recording
of the old languages is needed against that: the last layer of the language tokenizer is linear, so of an utterance the
mean hidden vector says all (Iscen et al., "Memory-Efficient Incremental Learning Through Feature Adaptation", 2020).

Letters: B batch, T frames, H hidden width, K examples of a language, M of all, N languages.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.generations import mixture_of
from mole_asr.corpus.batch import Batch
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path

EXAMPLES_FILE = "examples.safetensors"
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
    heard: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        batch = batch.to(next(model.parameters()).device)
        output = model(batch.audio_BS, batch.audio_lengths_B)
        hidden_BTH, lengths_B = output.decision.evidence.hidden_BTH.float(), output.decision.context.rows.lengths_B
        for hidden_TH, frames, language in zip(hidden_BTH, lengths_B, batch.languages_B.tolist(), strict=True):
            if language >= 0:
                heard[mixture_of(model).languages[language]].append(hidden_TH[:frames].mean(0).cpu())
    return {code: torch.stack(each[:: -(-len(each) // MOST_EXAMPLES)]) for code, each in heard.items()}


class Replay(nn.Module):
    """The cross-entropy of a language tokenizer on examples of old languages.

    Args:
        examples: of each language [K, H]; at least of one.
        languages: codes of the model, N.
    """

    hidden_MH: Tensor
    languages_M: Tensor

    def __init__(self, examples: Mapping[str, Tensor], languages: Sequence[str]) -> None:
        super().__init__()
        codes = [code for code in languages if code in examples]
        ids = [languages.index(code) for code in codes for _ in examples[code]]
        self.register_buffer("hidden_MH", torch.cat([examples[code] for code in codes]), persistent=False)
        self.register_buffer("languages_M", torch.tensor(ids), persistent=False)

    def forward(self, model: nn.Module) -> Tensor:
        """The loss, a mean over the examples."""
        logits_MN = mixture_of(model).language_tokenizer.languages(self.hidden_MH)
        return functional.cross_entropy(logits_MN.float(), self.languages_M)


def save_examples(examples: Mapping[str, Tensor], folder: str | Path) -> None:
    """Writes examples into the folder of a model."""
    with atomic_path(Path(folder) / EXAMPLES_FILE) as temporary:
        save_file({code: each.contiguous() for code, each in examples.items()}, temporary)


def load_examples(folder: str | Path) -> dict[str, Tensor]:
    """Reads what `save_examples` wrote; a model that is older than that has no examples.

    Raises:
        MoleError: the file cannot be read.
    """
    path = Path(folder) / EXAMPLES_FILE
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise MoleError(f"{path}: cannot be read ({error}); copy the folder anew, or delete it") from None
