"""What is compared: systems (how a model is made) and conditions (what it learns from and is tested on)."""

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
BASE = HERE / "base.yaml"


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        config: file in `systems/` that is laid over the base; None: `<name>.yaml`.
        weights_of: the system whose trained model is taken; None: it trains its own.
        told: whether the true language is told in the test, too.
        monolingual: a model a language, trained on that language alone.
        as_large_as: the one feed-forward part is as wide as all experts of that system together.
    """

    name: str
    title: str
    config: str | None = None
    weights_of: str | None = None
    told: bool = False
    monolingual: bool = False
    as_large_as: str | None = None

    @property
    def config_path(self) -> Path:
        """The file that is laid over the base."""
        return HERE / "systems" / f"{self.config or self.weights_of or self.name}.yaml"


@dataclass(frozen=True)
class TestSet:
    """Utterances to recognise: a manifest below the folder of the corpora, or some of it.

    Attributes:
        name: of the test set.
        manifests: relative paths.
        prefixes: of the ids that are taken; empty: all.
        share: of each language's hours, by the hash of the id: what is enough saves time.
    """

    name: str
    manifests: tuple[str, ...]
    prefixes: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Condition:
    """What is learned from and tested on; `conditions/<name>.yaml` is laid over the base.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        corpus: folder with the manifests for training, below the folder of the corpora.
        tests: test sets; those whose manifests are not there are passed over.
        shares: language -> share of its training hours that is used.
        synthetic: manifest of synthetic voices that are trained on too, below the folder of the corpora.
        low: languages that the tables call low-resource.
    """

    name: str
    title: str
    corpus: str
    tests: tuple[TestSet, ...]
    shares: dict[str, float] = field(default_factory=dict)
    synthetic: str | None = None
    low: tuple[str, ...] = ()

    @property
    def config_path(self) -> Path:
        """The file that is laid over the base."""
        return HERE / "conditions" / f"{self.name}.yaml"


SYSTEMS = {
    system.name: system
    for system in (
        System("dense", "dense"),
        System("dense-total", "dense, as many parameters in all as MoLE", config="dense", as_large_as="mole"),
        System("dense-lid", "dense + language-ID multitask"),
        System("dense-embedding", "dense + true-language embedding (told the language)", told=True),
        System("monolingual", "monolingual dense models (told the language)", config="dense", monolingual=True),
        System("switch", "Switch, top-1"),
        System("omni", "Omni-router, top-1"),
        System("lr-moe", "LR-MoE"),
        System("dlg-moe", "DLG-MoE"),
        System("mole", "MoLE, r = largest posterior"),
        System("mole-true", "the same model, told the language", weights_of="mole", told=True),
        System("mole-entropy", "MoLE, r by entropy"),
        System("mole-sigmoid", "MoLE, r by a head"),
        System("mole-gumbel", "MoLE, Gumbel"),
        System("mole-frame", "MoLE, by frame"),
        System("mole-family", "MoLE, an expert a family"),
        System("mole-r1", "MoLE with r = 1"),
        System("mole-r0", "MoLE with r = 0"),
    )
}

_UNSEEN = "voices13/cuts_unseen.jsonl"
# New speakers for a model of the five studio voices; the prefixes are sources, as `prepare voices13` names ids.
_PROMPTS_TESTS = (
    TestSet("test", ("prompts5/cuts_test.jsonl",)),
    TestSet("noisy", ("prompts5/cuts_test_noisy.jsonl",)),
    TestSet("telephone", ("prompts5/cuts_test_telephone.jsonl",)),
    TestSet(
        "unseen",
        (_UNSEEN, "voices13/cuts_test.jsonl"),
        ("tuxpaint-es", "tuxpaint-fr", "tuxpaint-ru", "queen-en", "festvox-ru"),
        share=0.4,
    ),
)
_LOW13 = ("be", "bg", "ca", "da", "el", "es", "fr", "it", "ro")
_VOICES_TESTS = (
    TestSet("test", ("voices13/cuts_test.jsonl",)),
    TestSet("noisy", ("voices13/cuts_test_noisy.jsonl",)),
    TestSet("telephone", ("voices13/cuts_test_telephone.jsonl",)),
    TestSet("unseen", (_UNSEEN,)),
)
_SHARES = {"fr": 0.5, "es": 0.25, "ru": 0.1}

CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("prompts5-full", "five studio voices, all speech", "prompts5", _PROMPTS_TESTS),
        Condition(
            "prompts5-low",
            "five studio voices, French 50 %, Spanish 25 %, Russian 10 %",
            "prompts5",
            _PROMPTS_TESTS,
            _SHARES,
            low=tuple(sorted(_SHARES)),
        ),
        Condition("prompts5-augmented", "five studio voices, all augmentation", "prompts5", _PROMPTS_TESTS),
        Condition(
            "prompts5-synthetic",
            "the same, and synthetic voices that read the same texts",
            "prompts5",
            _PROMPTS_TESTS,
            synthetic="prompts5-synthetic/cuts_train.jsonl",
        ),
        Condition("voices13", "thirteen languages as they come", "voices13", _VOICES_TESTS, low=_LOW13),
    )
}
