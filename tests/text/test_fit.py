"""`mole-asr fit` with a text config: every policy trains, saves and loads; a killed run goes on bit by bit."""

from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mole_asr.asr import fit as shared
from mole_asr.cli import main
from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.fit import fit, is_text
from mole_asr.moe.losses import load_balance_loss, router_z_loss
from mole_asr.text import curriculum
from mole_asr.text.checkpoint import load_text_model
from mole_asr.text.data import TextDataModule
from mole_asr.text.evaluate import evaluate
from mole_asr.text.model import NetworkConfig
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.task import TextTask
from mole_asr.text.windows import IGNORED, pack_windows
from tests.killed import Killed, Watch

from .conftest import NETWORK, POLICIES

Command = Callable[..., list[str]]
EPOCHS = 2
ENCODER = {"model__network__causal": "false"}
EXPERT_CHOICE_BELOW = {"model__more_experts": "[{policy: expert_choice, num_experts: 4, layers: [0]}]", **ENCODER}


@pytest.fixture
def command(texts_file: Path, tmp_path: Path) -> Command:
    """The words of a small `fit`; every key can be replaced."""

    def words(experts: ExpertsConfig | None = None, **changes: Any) -> list[str]:
        keys = {
            "output": tmp_path / "run",
            "average_decay": 0.0,
            "data.train_texts": texts_file,
            "data.valid_texts": texts_file,
            "data.window": 16,
            "data.batch_windows": 8,
            "trainer.accelerator": "cpu",
            "trainer.max_epochs": EPOCHS,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.log_every_n_steps": 1,
            **{f"model.network.{key}": value for key, value in NETWORK.items()},
            **{f"model.experts.{key}": value for key, value in vars(experts or ExpertsConfig()).items() if value},
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [f"--{key}={value}" for key, value in keys.items() if value is not None]

    return words


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch, TextTask)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_text_model(output / "model").model.state_dict()


def test_a_training_that_diverges_writes_no_model(command: Command, tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="the training has diverged"):
        fit(command(trainer__max_epochs=1, model__optimizer__adamw_lr=1e30, model__optimizer__lr=1e30))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_trains_saves_and_loads(
    command: Command, texts_file: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[TextTask] = []
    end = TextTask.on_validation_epoch_end
    monkeypatch.setattr(TextTask, "on_validation_epoch_end", lambda task: (trained.append(task), end(task))[1])
    fit(command(POLICIES[name], trainer__max_epochs=1, data__batch_windows=24))
    loaded, task = load_text_model(tmp_path / "run" / "model"), trained[-1]
    assert loaded.model.languages == ["de", "en", "ru"] == loaded.major_languages
    assert loaded.window == 16
    assert loaded.model.experts == [POLICIES[name].spelled_out(loaded.model.languages)]
    expected = task.model.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in loaded.model.state_dict().items())
    assert task.trainer.global_step >= 3
    # What the validation logged at the end is what the verb says.
    logged = {key: value.item() for key, value in task.trainer.logged_metrics.items()}
    bits = evaluate(loaded, read_texts(texts_file)).bits
    assert {code: logged[f"valid/bits_per_byte_{code}"] for code in bits} == pytest.approx(bits, rel=1e-4)
    assert logged["valid/bits_per_byte"] == pytest.approx(sum(bits.values()) / 3, rel=1e-4)
    places = POLICIES[name].places(3)
    assert [layer for layer in range(3) if f"valid/purity_{layer}" in logged] == places
    if name == "adaptive":
        assert 0 <= logged["train/several_share_1"] <= 1


@pytest.mark.parametrize(
    ("experts", "changes"),
    [
        ("adaptive", {"data__curriculum": "true", "data__temperature": 2.0, "model__network__dropout": 0.1}),
        ("post-moe", {"average_decay": 0.9, "trainer__gradient_clip_val": 1.0}),
        ("dense", ENCODER),
        ("omni", {}),
        ("adaptive", {"data__curriculum": "true", "model__experts__layers": "last 2", **EXPERT_CHOICE_BELOW}),
    ],
    ids=[
        "curriculum, resampled languages, dropout",
        "forced labels, average",
        "encoder",
        "one router for all layers",
        "curriculum, expert choice below adaptive",
    ],
)
@pytest.mark.parametrize("kill_at", [5, -1], ids=["first epoch", "last epoch"])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    command: Command, watch: Watch, tmp_path: Path, experts: str, changes: dict[str, Any], kill_at: int
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fit(command(POLICIES[experts], output=whole, **changes))
    uninterrupted, watch.rows = watch.rows, []
    per_epoch = len(uninterrupted) // EPOCHS
    assert per_epoch >= 7
    watch.kill_at = kill_at % len(uninterrupted)
    saved = max(watch.kill_at - watch.kill_at % 3, watch.kill_at - watch.kill_at % per_epoch)
    with pytest.raises(Killed):
        fit(command(POLICIES[experts], output=halves, **changes))
    watch.rows, watch.kill_at = [], None
    torch.manual_seed(12345)  # what the new process draws before must not matter
    fit(command(POLICIES[experts], output=halves, **changes))
    assert watch.rows == uninterrupted[saved:]
    expected, found = weights(whole), weights(halves)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_the_loss_is_the_weighted_sum_of_the_published_ones(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The balance loss counts tokens of one expert only for "adaptive", and there is none for "forced"."""
    seen: list[tuple[Any, float]] = []
    step = TextTask.training_step

    def training_step(task: TextTask, batch: Any, batch_index: int) -> torch.Tensor:
        output, targets = task.predict(batch)
        cost = -output.logits_BTV.log_softmax(-1).gather(-1, targets[..., None]).mean()
        plans = list(output.plans.values())
        routing = {
            "dense": 0.0,
            "forced": 0.0,
            "top_k": sum(0.3 * load_balance_loss(plan) + 0.2 * router_z_loss(plan) for plan in plans),
            "adaptive": sum(0.3 * load_balance_loss(p, one_expert_only=True) + 0.2 * router_z_loss(p) for p in plans),
        }
        total = step(task, batch, batch_index)
        seen.append((total.item(), float((cost + routing[task.model.experts[0].policy]).detach())))
        return total

    monkeypatch.setattr(TextTask, "training_step", training_step)
    for name in ("dense", "post-moe", "top-2", "adaptive"):
        fit(
            command(
                POLICIES[name],
                output=Path(command()[0].partition("=")[2]) / name,
                trainer__max_steps=2,
                model__loss_weights__balance=0.3,
                model__loss_weights__router_z=0.2,
            )
        )
    found, expected = zip(*seen, strict=True)
    assert len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_label_is_forced_in_training(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[bool] = []
    predict = TextTask.predict

    def spy(task: TextTask, batch: Any, generator: Any = None) -> Any:
        output, targets_BT = predict(task, batch, generator)
        if task.training:
            labels_N = batch.languages_B.repeat_interleave(targets_BT.shape[1])
            forced.extend(bool((plan.expert_ids == labels_N[:, None]).any(1).all()) for plan in output.plans.values())
        return output, targets_BT

    monkeypatch.setattr(TextTask, "predict", spy)
    fit(command(POLICIES["post-moe"], trainer__max_steps=2))
    assert forced == [True] * 4  # two steps, two layers


def test_the_second_epoch_follows_the_curriculum(
    command: Command, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: dict[int, torch.Tensor] = {}
    record = TextDataModule.record

    def spy(data: TextDataModule, rows_B: torch.Tensor, shares_BL: torch.Tensor) -> None:
        for row, shares_L in zip(rows_B.tolist(), shares_BL, strict=True):
            shares.setdefault(row, shares_L.double())
        record(data, rows_B, shares_BL)

    def most_first(shares_WL: np.ndarray) -> np.ndarray:
        return np.argsort(-shares_WL.mean(axis=1), kind="stable")

    monkeypatch.setattr(TextDataModule, "record", spy)
    # The published order starts from one of the windows of the fewest, of which there are several.
    monkeypatch.setattr(curriculum, "curriculum_order", most_first)
    fit(command(POLICIES["adaptive"], data__curriculum="true"))
    batches = [[float(shares[row].mean()) for row in rows] for rows in watch.rows[len(watch.rows) // 2 :]]
    assert sorted(chain(*watch.rows[len(watch.rows) // 2 :])) == sorted(shares)
    assert max(batches[0]) > min(batches[-1]) + 0.1
    assert all(min(before) >= max(after) - 1e-6 for before, after in pairwise(batches))


def test_an_encoder_is_asked_what_it_cannot_see(texts_file: Path) -> None:
    languages = ["de", "en", "ru"]
    task = TextTask("bytes", languages, languages, 16, NetworkConfig(**NETWORK, causal=False))
    read: list[torch.Tensor] = []
    task.model.register_forward_pre_hook(lambda model, arguments: read.append(arguments[0]))
    batch = pack_windows(read_texts(texts_file), languages, task.vocabulary, 16, fill=True).batch(np.arange(20))
    _, targets_BT = task.predict(batch, torch.Generator().manual_seed(0))
    asked_BT = targets_BT != IGNORED
    assert torch.equal(read[0] == task.vocabulary.mask, asked_BT) and 0.05 < asked_BT.float().mean() < 0.3
    assert torch.equal(targets_BT[asked_BT], batch.tokens_BS[:, 1:][asked_BT])


def test_validation_texts_too_short_to_hide_anything_are_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "ok", "language": "en"}\n')
    changes = {"data__valid_texts": tmp_path / "short.jsonl", "model__mask_share": 0.001, "trainer__max_epochs": 1}
    with pytest.raises(MoleError, match=r"^data\.valid_texts: so short that nothing of them was hidden"):
        fit(command(**ENCODER, **changes))


def test_a_dense_model_becomes_experts(
    command: Command, texts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(command(output=tmp_path / "dense", trainer__max_steps=3))
    changes = {f"model__network__{key}": None for key in NETWORK}
    changes |= {"model__init_from": tmp_path / "dense" / "model", "trainer__max_steps": 1}
    changes |= {"model__optimizer__lr": 0.0, "model__optimizer__adamw_lr": 0.0}
    fit(command(POLICIES["families"], **changes))
    assert f"model.network is that of {tmp_path / 'dense' / 'model'}: d_model 16, d_ff 24" in capsys.readouterr().err
    texts = read_texts(texts_file)
    dense, experts = (load_text_model(tmp_path / run / "model") for run in ("dense", "run"))
    assert experts.model.experts[0].policy == "forced"
    # Nothing was learnt (rates of zero): the function must be that of the dense model.
    assert evaluate(experts, texts).bits == pytest.approx(evaluate(dense, texts).bits, rel=1e-5)
    with pytest.raises(MoleError, match=r"model\.network\.d_ff: 8 is not the 24 .*leave model\.network out$"):
        fit(command(output=tmp_path / "other", model__init_from=tmp_path / "dense" / "model", model__network__d_ff=8))


def test_pieces_of_a_tokenizer_are_a_vocabulary(
    command: Command, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(command(data__vocabulary=tokenizer_folder, trainer__max_steps=2))
    assert (tmp_path / "run" / "model" / "tokenizer.model").exists()
    assert main(["generate", str(tmp_path / "run" / "model"), "the dog", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the dog")
    with pytest.raises(MoleError, match="another vocabulary"):
        fit(command(trainer__max_steps=4))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__experts__polcy": "top_k"}, ["model.experts.polcy", "did you mean model.experts.policy?"]),
        ({"model__experts__policy": "best"}, ["experts.policy", "best"]),
        ({"model__network__num_heads": 5}, ["model.network.d_model: 16"]),
        ({"model__network__num_hads": 5}, ["model.network.num_hads", "did you mean model.network.num_heads?"]),
        ({"model__network__num_heads": "many"}, ["model.network", "many"]),
        ({"model__more_experts": "[{policy: best}]"}, ["model.more_experts", "best", "adaptive"]),
        ({"model__more_experts": "[{polcy: top_k}]"}, ["polcy", "did you mean model.more_experts.policy?"]),
        ({"data__train_texts": "nowhere.jsonl"}, ["nowhere.jsonl", "prepare texts"]),
        ({"data__languages": "[xx]"}, ["data.languages", "xx"]),
        ({"data__curriculum": "true"}, ["data.curriculum", "adaptive"]),
        ({"model__new_activation": "relu"}, ["model.new_activation", "model.init_from"]),
    ],
)
def test_a_wrong_key_or_value_is_named(command: Command, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(MoleError) as caught:
        fit(command(**changes))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_config_says_which_kind_of_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_text(["--data.train_texts", "a.jsonl"]) and is_text(["--data.train_text=a.jsonl"])
    assert not is_text(["--config", "conf/asr/prompts5.yaml"]) and not is_text(["--config=nowhere.yaml"])
    packaged = sorted(path.name for path in (Path(shared.__file__).parents[2] / "conf" / "text").glob("*.yaml"))
    assert "adaptive.yaml" in packaged
    for name in packaged:
        words = ["--config", f"conf/text/{name}"]
        assert is_text(words)
        with pytest.raises(SystemExit) as end:
            fit([*words, "--print_config"])
        assert not end.value.code
        config = yaml.safe_load(capsys.readouterr().out)
        written = yaml.safe_load(
            (Path(shared.__file__).parents[2] / "conf" / "text" / name).read_text(encoding="utf-8")
        )
        assert config["output"] == written["output"] and config["data"]["window"] == written["data"]["window"]
